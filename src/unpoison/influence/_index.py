"""`InfluenceIndex`: the influence of training examples, read from a store that one pass over them makes.

With w_j the gradient of example j in the metric of the inverse curvature (`_sketch`), everything that a
tracer asks is an inner product: influence <w_q, w_j>, self-influence |w_j|^2, cosine <w_j, w_k> / |w_j| /
|w_k|. An index keeps, of each example,

    c_j = B^T u_j  and  z_j = R (u_j - B c_j)  in float16,  |w_j|,  |g_j|,  and the measurement,

where u_j is w_j / |w_j|, sketched to D numbers where it has more; the columns of B, Float[D m], are an
orthonormal basis of the space that the sketches of m training examples, drawn at random, span (the Nystroem
method; Williams and Seeger, 2001); and R sketches what lies outside of that space to r numbers. Then

    <u_q, u_j>  is taken as  <c_q, c_j> + t,

with t = <z_q, z_j> where that is beyond 4 |z_q| |z_j| / sqrt(r), else 0.

Outside of the space most gradients are nearly orthogonal, and a random projection to m numbers alone would
add noise of 1 / sqrt(m) to every cosine. What a few examples share that is in no example of the basis, such
as a rare poison, is far beyond that noise, and is kept by the second term. Lengths are exact.

A query pays for its own gradient and for m multiplications an example. Stages of `build`:

1. factors    by `fit_factors`, unless they are given;
2. basis      from m examples;
3. shards     of `shard_examples` rows each, one after the other or by several processes. What is there and
              sound is not made again; killed at any moment, the same call goes on and ends with the same
              digest.

Where whole gradients of all examples take at most 8 GiB, u_j itself is kept in place of both, in float16 or
int8 (`_index_rows`).

Cost: stages 1 and 3 read the training set twice and once; D m multiplications an example beside `_sketch`.
Memory: 8 D m bytes for stage 2 and 4 D m for stage 3 (half of that in bfloat16), beside `_sketch`. Disk:
2 (m + r) + 32 bytes an example, and the factors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, final

import torch
from torch import Tensor, nn

from unpoison._artefacts import canonical_json, digest
from unpoison._executors import Executor
from unpoison._inputs import count_of, rows_of
from unpoison._memory import limited
from unpoison._progress import Progress
from unpoison._seeds import generator
from unpoison.data import Examples
from unpoison.errors import InputError, MismatchError
from unpoison.influence._factors import FACTOR_EXAMPLES, Factors, model_fingerprint
from unpoison.influence._index_files import (
    IndexFiles,
    Span,
    factors_digest,
    part_of,
    read_tensors,
    same_part,
)
from unpoison.influence._index_rows import products, unpacked
from unpoison.influence._index_space import Space, code, coordinates_of, damping_of, sketched
from unpoison.influence._projection import count_sketch
from unpoison.influence._queries import Damping, RelativeDamping
from unpoison.influence._sketch import Sketcher
from unpoison.tasks import Batch, ClassificationTask, Task

if TYPE_CHECKING:
    from unpoison.influence._index_estimate import IndexEstimate

Gradient = Literal["measurement", "loss"]
# The probability of more by chance is 6e-5.
_BEYOND: Final = 4.0
# To how many numbers whole gradients are sketched to find the plane.
_PLANE: Final = 2048
_QUERY_BYTES: Final = 256 << 20


@final
@dataclass(frozen=True, eq=False)
class IndexQueries:
    """Queries in the coordinates of an index.

    Arguments:
        values: Float64[q m], c.
        residuals: Float64[q r], z.
        index: the digest of the basis that they belong to.
    """

    values: Tensor
    residuals: Tensor
    index: str

    def __len__(self) -> int:
        return len(self.values)

    def joined(self, other: IndexQueries) -> IndexQueries:
        """The queries of both, of one index."""
        values, residuals = (
            torch.cat(both)
            for both in zip((self.values, self.residuals), (other.values, other.residuals), strict=True)
        )
        return IndexQueries(values, residuals, self.index)


@final
class InfluenceIndex:
    """Influences on a model from a store; see the module's docstring. Made by `build` or `open`.

    Attributes:
        directory: where it lies.
        factors: EK-FAC factors.
        damping: of the curvature.
        gradient: whose gradients the rows are, "measurement" or "loss".
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.directory = Path(path)
        self._files = IndexFiles(self.directory)
        self._record = self._files.record()
        if code() != self._record["code"]:
            raise MismatchError(f"{path}: made by another version of unpoison; make the index anew")
        if None in (self._record["basis"], self._record["factors"]):
            raise InputError(f"{path}: unfinished; give the same unpoison index command again")
        self.factors = Factors.load(self._files.factors)
        if factors_digest(self.factors) != self._record["factors"]:
            raise InputError(f"{path}: the factors are damaged; unpoison index makes it anew")
        tensors, made_of, known = read_tensors(self._files.basis)
        if (made_of, known) != (self._record["factors"], self._record["basis"]):
            raise InputError(f"{path}: the basis is of another index; unpoison index makes it anew")
        self._basis = tensors
        self.damping = damping_of(self._record["damping"])
        self.gradient: Gradient = self._record["gradient"]
        self._waiting = 0
        if len(self._record["parts"]) > 1 and self._files.missing(self._record)[1]:
            self._waiting = self._record["parts"].pop()["examples"]
        self._spans, missing = self._files.missing(self._record)
        self._spaces: dict[torch.device, Space] = {}
        self._sound: set[Span] = set()
        self._columns: dict[Span, dict[str, Tensor]] = {}
        if missing:
            raise InputError(
                f"{path}: unfinished, {len(missing)} of {len(self._spans)} shards are missing; give "
                "the same unpoison index command again"
            )

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> InfluenceIndex:
        """Open a finished index; its rows are read and checked when they are first used.

        Raises:
            InputError: there is none, or it is unfinished or damaged.
            MismatchError: the code that made its rows was another.
        """
        return cls(path)

    @classmethod
    def build(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        examples: Examples,
        task: Task | None = None,
        *,
        seed: int = 0,
        factors: Factors | None = None,
        damping: Damping | None = None,
        modules: Sequence[str] | None = None,
        covariance_examples: int | None = FACTOR_EXAMPLES,
        eigenvalue_examples: int | None = FACTOR_EXAMPLES,
        gradient: Gradient = "measurement",
        numbers: int | None = None,
        sketch: int | None = None,
        memory: int | str | None = None,
        processes: int = 1,
        executor: Executor | None = None,
        shard_examples: int = 4096,
        batch_size: int = 128,
        workspace_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> InfluenceIndex:
        """Make an index, or go on with one that was interrupted or damaged.

        Arguments:
            path: a directory.
            model: any module; used in evaluation mode and left as it was.
            examples: the training set.
            task: `ClassificationTask()` by default.
            seed: of the factors, of the choice of examples for the basis, and of the sketch.
            factors: fitted to this model and these examples; fitted here by default.
            damping: `RelativeDamping()` by default; queries may ask for another.
            modules: as for `fit_factors`.
            covariance_examples: as for `fit_factors`; of all when None.
            eigenvalue_examples: as for `fit_factors`; of all when None.
            gradient: what to differentiate at the training examples, see `Task.measurement`.
            numbers: m, at most the number of examples; by default gradients are kept whole where all of them
                take at most 8 GiB and a quarter of the free disk, and else m is 2,048, fewer where memory is
                short.
            sketch: D, at least m; 262,144 by default, fewer where memory is short.
            memory: bytes for all of it, or text such as "8GB"; nine tenths of what is free by default.
            processes: how many make shards at a time, with a thread each where there are several. They are
                forked, so with a model on a GPU, and where there is no fork, there is one.
            executor: makes shards in place of processes, on a cluster for instance; it is left open. What the
                workers need is pickled, and the directory and the data must have the same paths for all.
            shard_examples: rows a shard. Rows are equal to the last bit for equal shards, batches and
                threads.
            batch_size: examples of a forward pass.
            workspace_bytes: of per-example gradients at a time.
            progress: called with the stage, examples done and examples to do.

        Raises:
            InputError: an option is out of range, or the memory does not suffice.
            MismatchError: another index lies at `path`, or the factors are of something else.
        """
        from unpoison.influence._index_build import Plan, build

        plan = Plan(
            seed=seed,
            damping=RelativeDamping() if damping is None else damping,
            modules=None if modules is None else tuple(modules),
            covariance_examples=covariance_examples,
            eigenvalue_examples=eigenvalue_examples,
            gradient=gradient,
            numbers=numbers,
            sketch=sketch,
            processes=processes,
            shard_examples=shard_examples,
            batch_size=batch_size,
            workspace_bytes=workspace_bytes,
        )
        files = IndexFiles(Path(path))
        with limited(memory):
            build(files, plan, model, examples, task or ClassificationTask(), factors, executor, progress)
        made = cls(path)
        made._sound.update(made._spans)  # all have just been made or checked
        return made

    @classmethod
    def estimate(
        cls,
        model: nn.Module,
        examples: Examples,
        task: Task | None = None,
        *,
        modules: Sequence[str] | None = None,
        covariance_examples: int | None = FACTOR_EXAMPLES,
        eigenvalue_examples: int | None = FACTOR_EXAMPLES,
        numbers: int | None = None,
        sketch: int | None = None,
        memory: int | str | None = None,
        batch_size: int = 128,
        workspace_bytes: int | None = None,
    ) -> IndexEstimate:
        """What `build` will take with these options, from some hundred examples.

        Arguments:
            model: as for `build`, like the rest.
            examples: the training set.
            task: `ClassificationTask()` by default.
            modules: whose parameters to track.
            covariance_examples: as for `fit_factors`; of all when None.
            eigenvalue_examples: as for `fit_factors`; of all when None.
            numbers: m.
            sketch: D.
            memory: as for `build`.
            batch_size: examples of a forward pass.
            workspace_bytes: of per-example gradients at a time.

        Raises:
            InputError: as for `build`.
        """
        from unpoison.influence._index_build import Plan
        from unpoison.influence._index_estimate import estimate

        plan = Plan(
            seed=0,
            damping=RelativeDamping(),
            modules=None if modules is None else tuple(modules),
            covariance_examples=covariance_examples,
            eigenvalue_examples=eigenvalue_examples,
            gradient="measurement",
            numbers=numbers,
            sketch=sketch,
            processes=1,
            shard_examples=1,
            batch_size=batch_size,
            workspace_bytes=workspace_bytes,
        )
        with limited(memory):
            return estimate(plan, model, examples, task or ClassificationTask())

    def append(
        self,
        model: nn.Module,
        examples: Examples,
        task: Task | None = None,
        *,
        processes: int = 1,
        executor: Executor | None = None,
        workspace_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> InfluenceIndex:
        """The index with more examples after those that it has, which are not read again.

        Factors and basis stay those of the first examples. Interrupted, the index is what it was, and the
        same call goes on; with other examples the interrupted ones are dropped.

        Arguments:
            model: the one that the index is of.
            examples: the new ones alone.
            task: as for `build`, like the rest.
            processes: how many make shards at a time.
            executor: as for `build`.
            workspace_bytes: of per-example gradients at a time.
            progress: called with the stage, examples done and examples to do.

        Raises:
            MismatchError: the model or the task is another.
        """
        from unpoison.influence._index_build import append

        self.check(model)
        append(
            self._files,
            model,
            examples,
            task or ClassificationTask(),
            processes,
            executor,
            workspace_bytes,
            progress,
        )
        return InfluenceIndex(self.directory)

    def __len__(self) -> int:
        """How many examples it has."""
        return self._spans[-1].stop

    @property
    def modules(self) -> list[str] | None:
        """The names or patterns of the modules that were asked for."""
        modules: list[str] | None = self._record["modules"]
        return modules

    @property
    def numbers(self) -> int:
        """m, the numbers kept of each example."""
        return self._basis["basis"].shape[0] or self._basis["basis"].shape[1]

    @property
    def exact(self) -> bool:
        """Whether rows are whole gradients in float16, so that influences are exact up to rounding."""
        return self.numbers == self.factors.num_parameters and self._record["type"] == "float16"

    @property
    def settings(self) -> dict[str, Any]:
        """What to say of the index, as JSON values."""
        sizes = {"numbers": self.numbers, "sketch": self._basis["basis"].shape[1]}
        return {"digest": self.digest, **sizes, "type": self._record["type"]}

    @cached_property
    def digest(self) -> str:
        """Equal for equal content: of what it was made of and of all rows."""
        known = {key: value for key, value in self._record.items() if key not in ("format", "memory")}
        shards = [read_tensors(self._files.shard(one), "labels")[2] for one in self._spans]
        return digest(canonical_json(known), *shards)

    @property
    def calibration(self) -> Path:
        """Where a detector keeps what it learns of the model through the index."""
        return self.directory / "calibration"

    def check(self, model: nn.Module, examples: Examples | None = None) -> None:
        """Raise `MismatchError` unless the index is of this model (and of these examples)."""
        if model_fingerprint(model) != self._record["model"]:
            raise MismatchError(f"{self.directory}: the index of another model; make one of this model")
        if examples is None:
            return
        parts, first = self._record["parts"], 0
        if len(examples) == len(self):
            for part in parts:
                last = first + part["examples"]
                own = examples if len(parts) == 1 else examples.subset(torch.arange(first, last))
                if not same_part(part, part_of(own)):
                    break
                first = last
        if first != len(examples) or first != len(self):
            waiting = f"; {self._waiting} more were not appended to the end" if self._waiting else ""
            raise MismatchError(
                f"{self.directory}: the index of another training set than {examples.name}; give the very "
                f"set that was indexed, in the same order{waiting}"
            )

    def queries(
        self,
        model: nn.Module,
        queries: Batch,
        task: Task | None = None,
        *,
        combine: Tensor | None = None,
        damping: Damping | None = None,
        batch_size: int = 128,
        workspace_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> IndexQueries:
        """Measurement gradients of queries, combined, in the coordinates of the index.

        Arguments:
            model: the one that the index is of.
            queries: a batch of q examples, as `task.measurement` takes them.
            task: its `measurement` is differentiated; `ClassificationTask()` by default.
            combine: Float[k, q], the combinations to form; the identity by default.
            damping: that of the index by default. With another one influences are less accurate the smaller
                it is.
            batch_size: queries of a forward pass.
            workspace_bytes: of per-example gradients at a time.
            progress: called with "queries", queries done and queries to do.

        Raises:
            MismatchError: the model is another.
        """
        self.check(model)
        asked, count = task or ClassificationTask(), count_of(queries[0])
        parts, total = [], None
        with self._sketcher(model, asked.measurement, damping, workspace_bytes) as sketcher:
            space = self._space(sketcher.device)
            if combine is not None:
                total = torch.zeros(len(combine), space.width, dtype=torch.float64, device=sketcher.device)
            for start in range(0, count, batch_size):
                rows = slice(start, min(start + batch_size, count))
                found = sketcher.batch(tuple(rows_of(part, rows) for part in queries), rows.stop - rows.start)
                if total is None or combine is None:
                    parts.append(coordinates_of(space, found.rows))
                else:  # differences of much alike gradients are formed before anything is rounded
                    total += combine[:, rows].to(total) @ found.rows.to(total)
                if progress is not None:
                    progress("queries", rows.stop, count)
            if total is not None:
                parts.append(coordinates_of(space, total))
        values, residuals = (torch.cat(both) for both in zip(*parts, strict=True))
        return IndexQueries(values, residuals, self._record["basis"])

    def influence(self, queries: IndexQueries, rows: Tensor | None = None) -> Tensor:
        """Float64[q n]: the influence of the examples, or of those at Int64[k] `rows`, on the queries.

        Positive = proponent, as in `score`, of the gradient that the index is of.

        Raises:
            MismatchError: the queries are of another index.
            InputError: a shard is damaged.
        """
        if queries.index != self._record["basis"]:
            raise MismatchError(f"{self.directory}: these queries were made with another index")
        return self._products(queries, rows) * self.lengths(rows)

    def similar(self, indices: Sequence[int] | Tensor, count: int = 10) -> tuple[Tensor, Tensor]:
        """For each of k examples those whose gradients have the largest cosine with its own.

        Arguments:
            indices: of the examples.
            count: how many, beside the example itself.

        Returns:
            Int64[k count] indices and Float64[k count] cosines, the largest first.

        Raises:
            InputError: there is no such example, or the count is negative.
        """
        if count < 0:
            raise InputError(f"similar: count must be at least 0, found {count}")
        chosen = self._indices(torch.as_tensor(indices, dtype=torch.int64).reshape(-1))
        cosines = self.cosines(chosen)
        cosines[torch.arange(len(chosen)), chosen] = -torch.inf
        found = cosines.topk(min(count, len(self) - 1), dim=1)
        return found.indices, found.values

    def cosines(self, indices: Tensor, rows: Tensor | None = None) -> Tensor:
        """Float64[k n]: the cosines of gradients at Int64[k] with those of all examples, or of `rows`."""
        found = []
        for own in torch.split(self._indices(indices), max(8, _QUERY_BYTES // (8 * self.numbers))):
            values = self._coordinates(lambda some: some.double(), own)
            residuals = self._column("residuals", own)
            found.append(self._products(IndexQueries(values, residuals, self._record["basis"]), rows))
        return (
            torch.cat(found) if found else torch.zeros(0, len(self) if rows is None else len(rows)).double()
        )

    def mean_cosines(self, indices: Tensor, rows: Tensor | None = None) -> Tensor:
        """Float64[n]: the mean cosine of each gradient, or of those of `rows`, with those at Int64[k].

        One product an example, with the mean of the k unit gradients.

        Raises:
            InputError: there is no such example, or none is given.
        """
        indices = self._indices(indices)
        if not len(indices):
            raise InputError(f"{self.directory}: mean_cosines needs an example at least")
        values, residuals = torch.zeros(1, self.numbers).double(), self._column("residuals", indices)
        for own in torch.split(indices, max(8, _QUERY_BYTES // (8 * self.numbers))):
            values += self._coordinates(lambda some: some.double(), own).sum(0)
        mean = values / len(indices), residuals.mean(0, keepdim=True)
        return self._products(IndexQueries(*mean, self._record["basis"]), rows)[0]

    def principal_plane(self, directions: int = 2) -> Tensor:
        """Float32[n directions]: the unit gradients on the directions in which they differ most.

        Of what lies in the space of the basis; of whole gradients, a sketch to so many numbers as a basis
        has by default. Examples that lie together have similar gradients.

        Cost: two passes over the rows; memory for the square of these numbers beside a shard.
        """
        width = min(self.numbers, _PLANE)
        places, signs = count_sketch(self.numbers, width, generator(self._record["seed"], "plane"))

        def short(values: Tensor) -> Tensor:
            return values if width == self.numbers else sketched(values, places, signs, width)

        total, second = torch.zeros(width).double(), torch.zeros(width, width).double()

        def add(values: Tensor) -> Tensor:
            nonlocal total, second
            values = short(values)
            total = total + values.sum(0).double()
            second += (values.t() @ values).double()
            return values[:, :0]

        self._coordinates(add)
        mean = total / len(self)
        _, vectors = torch.linalg.eigh(second / len(self) - torch.outer(mean, mean))
        axes, middle = vectors.flip(1)[:, :directions].float(), mean.float()
        plane = self._coordinates(lambda values: (short(values) - middle) @ axes)
        return torch.nn.functional.pad(plane, (0, directions - plane.shape[1]))

    @property
    def self_influence(self) -> Tensor:
        """Float64[n]: the influence of each example on itself, exactly."""
        return self.lengths().square()

    def lengths(self, rows: Tensor | None = None) -> Tensor:
        """Float64[n]: the roots of the self-influences."""
        return self._column("lengths", rows)

    def gradient_norms(self, rows: Tensor | None = None) -> Tensor:
        """Float64[n]: the norms of the gradients."""
        return self._column("norms", rows)

    def values(self, rows: Tensor | None = None) -> Tensor:
        """Float64[n]: the function whose gradients the rows are."""
        return self._column("values", rows)

    def captured(self, rows: Tensor | None = None) -> Tensor:
        """Float64[n]: the share of each squared length that lies in the space of the basis."""
        if not len(self._basis["basis"]):  # of all sketches
            return torch.ones(len(self) if rows is None else len(rows)).double()
        return self._coordinates(lambda some: some.double().square().sum(1), rows)

    def labels(self) -> Tensor:
        """Int64[n]."""
        return self._gathered(lambda shard, own: shard["labels"][own], None, "labels")

    def names(self) -> tuple[list[str] | None, list[str]]:
        """What people call the examples, where they have names, and the names of the classes."""
        parts = [self._files.names(part) for part in range(len(self._record["parts"]))]
        known = [part["ids"] for part in parts]
        return None if None in known else [name for one in known for name in one], parts[0]["class_names"]

    def _space(self, device: torch.device) -> Space:
        if self._spaces.get(device) is None:
            self._spaces[device] = Space.of_record(self._basis, self._record, device)
        return self._spaces[device]

    def _sketcher(
        self, model: nn.Module, function: Any, damping: Damping | None, workspace_bytes: int | None
    ) -> Sketcher:
        return Sketcher(
            model,
            self.factors,
            self.damping,
            function,
            dimensions=self._record["sketch"],
            seed=self._record["seed"],
            reweighted=None if damping is None or damping == self.damping else damping,
            workspace_bytes=workspace_bytes,
        )

    def _indices(self, indices: Tensor) -> Tensor:
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise InputError(
                f"{self.directory}: has the examples 0..{len(self) - 1}, found {indices.tolist()[:5]}"
            )
        return indices

    def _products(self, queries: IndexQueries, rows: Tensor | None = None) -> Tensor:
        """Float64[q n]: inner products of queries with the unit gradients of examples."""
        values, residuals = queries.values.float(), queries.residuals.float()
        noise = _BEYOND * residuals.norm(dim=1) / math.sqrt(max(residuals.shape[1], 1))

        def read(shard: Mapping[str, Tensor], own: Tensor | slice) -> Tensor:
            outside = shard["residuals"][own].float()
            beyond = outside @ residuals.t()
            beyond.masked_fill_(beyond.abs() <= outside.norm(dim=1)[:, None] * noise, 0)
            return beyond.add_(products(shard, own, values))

        return self._gathered(read, rows, *self._kept, "residuals").t().double()

    @property
    def _kept(self) -> list[str]:
        """The tensors that hold the coordinates."""
        return ["coordinates", "scales"] if self._record["type"] == "int8" else ["coordinates"]

    def _coordinates(self, of: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> Tensor:
        """What `of` makes of the coordinates, Float32[k m], of so many examples as a shard has."""
        return self._gathered(lambda shard, own: of(unpacked(shard, own, self.numbers)), rows, *self._kept)

    def _column(self, name: str, rows: Tensor | None) -> Tensor:
        return self._gathered(lambda shard, own: shard[name][own].double(), rows, name)

    def _gathered(self, read: Any, rows: Tensor | None, *names: str) -> Tensor:
        """What `read` gives of each shard, of which it gets these tensors, and places in it, in the order of
        the rows.

        One shard is held at a time, so that memory does not grow with what lies on the disk.
        """
        count = len(self) if rows is None else len(rows)
        result: Tensor | None = None
        for span, places, own in self._places(rows):
            part: Tensor = read(self._shard(span, *names), own)
            if result is None:
                result = part.new_zeros(count, *part.shape[1:])
            result[places] = part
        if result is None:
            result = read(self._shard(self._spans[0], *names), slice(0, 0))
        return result

    def _places(self, rows: Tensor | None) -> Iterator[tuple[Span, Tensor | slice, Tensor | slice]]:
        """For each shard that has some of the rows, their places among the rows and in the shard."""
        if rows is None:
            yield from ((one, slice(one.start, one.stop), slice(None)) for one in self._spans)
            return
        rows = self._indices(rows.cpu())
        owners = torch.bucketize(rows, torch.tensor([one.stop for one in self._spans]), right=True)
        order, counts = owners.argsort(stable=True), torch.bincount(owners, minlength=len(self._spans))
        for span, places in zip(self._spans, torch.split(order, counts.tolist()), strict=True):
            if len(places):
                yield span, places, rows[places] - span.start

    def _shard(self, span: Span, *names: str) -> dict[str, Tensor]:
        """Tensors of a shard, all of whose content is checked once, when what is one number a row is kept."""
        path = self._files.shard(span)
        if not self._columns.get(span):
            tensors, made_of, _ = read_tensors(path, check=span not in self._sound)
            if made_of != self._record["basis"] or len(tensors["labels"]) != span.stop - span.start:
                raise InputError(f"{path}: of another index; unpoison index makes it anew")
            self._sound.add(span)
            self._columns[span] = {name: part.clone() for name, part in tensors.items() if part.dim() == 1}
        known = self._columns[span]
        return known if known.keys() >= set(names) else read_tensors(path, *names, check=False)[0]
