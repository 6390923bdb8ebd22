"""`Reader`: the penultimate features of training examples, read in bounded memory; and principal components.

Features are the input of the network's last layer. They are read either class by class, so that at most the
largest class is in memory, or in the order of the training set, so that at most a batch is. Inputs are moved
to the model's device batch by batch, and the features stay there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs, placed
from unpoison._progress import Progress
from unpoison.data import Examples
from unpoison.errors import InputError
from unpoison.models import FeatureTap, features, forward, preserved


@final
@dataclass(frozen=True, eq=False)
class ClassFeatures:
    """One class: Int64[m] `indices` into the training set, on the CPU, and its Float32[m d] `values`."""

    label: int
    indices: Tensor
    values: Tensor


@final
class Reader:
    """Reads the features of a training set.

    Arguments:
        model: takes a batch of inputs; used in evaluation mode and left as it was.
        training_set: what to read.
        module: the module whose input is read; the last Linear that the forward pass calls when None (the
            last Conv2d where there is no Linear).
        batch_size: images of a forward pass.
        progress: called with "features", examples done and examples to do.

    Raises:
        InputError: the set is empty, there is no such module, or a feature is not a finite number.
    """

    def __init__(
        self,
        model: nn.Module,
        training_set: Examples,
        *,
        module: str | None,
        batch_size: int,
        progress: Progress | None = None,
    ) -> None:
        if not len(training_set):
            raise InputError(f"{training_set.name}: there are no examples to read")
        tensors = (*model.parameters(), *model.buffers())
        self.device = next((tensor.device for tensor in tensors), training_set.device)
        self.model, self.training_set, self.progress = model, training_set, progress
        self.batch_size = batch_size
        self.module = (
            last_module(model, placed(training_set.batch(0, 1)[0], self.device)) if module is None else module
        )

    def of(self, training_set: Examples) -> Reader:
        """A reader of the same features of other examples, without progress."""
        return Reader(self.model, training_set, module=self.module, batch_size=self.batch_size)

    def by_class(self) -> Iterator[ClassFeatures]:
        """The classes that have examples, in order. Memory: the features of one class and a batch."""
        labels = self.training_set.labels.cpu()
        order = labels.argsort(stable=True)
        counts = torch.bincount(labels, minlength=self.training_set.num_classes).tolist()
        ends, waiting, done, start = torch.tensor(counts).cumsum(0).tolist(), [], 0, 0
        current = 0
        for inputs, _ in self.training_set.in_batches(self.batch_size, order):
            stop = min(done + self.batch_size, len(order))
            waiting.append(self._read(inputs, order[done:stop]))
            done = stop
            self._tell(done, len(order))
            while current < len(counts) and ends[current] <= done:
                rows = ends[current] - start
                if rows:
                    values = torch.cat(waiting)
                    yield ClassFeatures(current, order[start : ends[current]], values[:rows])
                    waiting = [values[rows:].clone()] if len(values) > rows else []
                    start = ends[current]
                current += 1

    def in_order(self) -> Iterator[tuple[int, Tensor]]:
        """The index of the first example and Float32[b d], batch by batch in the order of the set."""
        count = len(self.training_set)
        starts = range(0, count, self.batch_size)
        for start, (inputs, _) in zip(starts, self.training_set.in_batches(self.batch_size), strict=True):
            rows = torch.arange(start, min(start + self.batch_size, count))
            yield start, self._read(inputs, rows)
            self._tell(int(rows[-1]) + 1, count)

    def all(self) -> Tensor:
        """Float32[n d] in the order of the set. Memory: all of it, and a batch."""
        batches = self.in_order()
        _, first = next(batches)
        # Batches joined at the end would be there twice.
        values = first.new_empty(len(self.training_set), first.shape[1])
        values[: len(first)] = first
        for start, batch in batches:
            values[start : start + len(batch)] = batch
        return values

    def _read(self, inputs: Inputs, rows: Tensor) -> Tensor:
        there = placed(inputs, self.device)
        if isinstance(there, Mapping):
            with (
                preserved(self.model),
                torch.no_grad(),
                FeatureTap(self.model, self.module, side="input") as tap,
            ):
                forward(self.model, there)
                read = tap.value.detach().flatten(1).float()
        else:
            read = features(self.model, self.module, there, batch_size=self.batch_size, side="input").float()
        if not bool(torch.isfinite(read).all()):
            row = int((~torch.isfinite(read)).any(1).nonzero()[0])
            raise InputError(
                f"{self.training_set.name}: the features of example {int(rows[row])} at module "
                f"{self.module!r} are not finite numbers; train the model anew or name another module"
            )
        return read

    def _tell(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress("features", done, total)


def principal_plane(
    model: nn.Module,
    training_set: Examples,
    *,
    directions: int = 2,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Tensor:
    """Float32[n directions]: the penultimate features of all examples, on those of largest variance.

    A picture of which examples the model takes for alike. What little variance there is beyond the plane is
    not seen in it, so nothing is decided by it.

    Arguments:
        model: takes a batch of inputs; used in evaluation mode and left as it was.
        training_set: what to read.
        directions: how many; those without variance are zero.
        batch_size: images of a forward pass.
        progress: called with "features", examples done and examples to do.

    Raises:
        InputError: the set is empty, or a feature is not a finite number.

    Cost: a forward pass over the set. Memory: the features of all examples.
    """
    values = Reader(model, training_set, module=None, batch_size=batch_size, progress=progress).all()
    centred = values - values.mean(0)
    axes = principal(centred, directions)[1].to(centred.dtype)
    plane = (centred @ axes).cpu()
    return torch.nn.functional.pad(plane, (0, directions - plane.shape[1]))


def last_module(model: nn.Module, inputs: Inputs) -> str:
    """The path of the last Linear that is called for a batch of one input, or else of the last Conv2d.

    Raises:
        InputError: the model calls neither.

    >>> last_module(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
    ...             torch.zeros(1, 1, 2, 2))
    '3'
    """
    called: dict[type[nn.Module], str] = {}

    def note(kind: type[nn.Module], name: str) -> Any:
        def hook(*_: object) -> None:
            called[kind] = name

        return hook

    with preserved(model), torch.no_grad():
        for name, module in model.named_modules():
            for kind in (nn.Linear, nn.Conv2d):
                if isinstance(module, kind):
                    module.register_forward_hook(note(kind, name))
        forward(model, inputs)
    if not called:
        raise InputError(
            "the model calls no Linear and no Conv2d module; name the module to read features of"
        )
    return called.get(nn.Linear, called.get(nn.Conv2d, ""))


def principal(centred: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The directions of largest variance of Float[n d] `centred`.

    Returns:
        Float64[k] variances (divided by n), decreasing, and Float64[d k] directions, each with a largest
        entry that is positive; k is at most `count`, n and d, and directions without variance are left out.

    Cost: min(n, d)^2 max(n, d) multiplications; memory min(n, d)^2 numbers.
    """
    n, d = centred.shape
    exact = centred.double()
    gram = exact.t() @ exact if d <= n else exact @ exact.t()
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    # Rounding leaves eigenvalues of about d * 1e-16 of the largest where there is no variance at all.
    kept = values > max(n, d) * 1e-14 * values.amax().clamp(min=1e-300)
    values, vectors = values[kept], vectors[:, kept]
    if d > n:
        vectors = exact.t() @ vectors / values.sqrt()
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) if vectors.shape[1] else vectors[:1]
    return values / n, vectors * largest.sign()
