"""What an `InfluenceIndex` will take: each stage is timed on some examples, and reckoned for all of them.

Examples cost the same whatever their number; the eigendecompositions of `fit_factors` are timed as a whole;
the basis grows with m^2 D and m^3. Memory and disk follow from the sizes alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import nn

from unpoison._memory import peak_bytes
from unpoison._seeds import derive_seed, generator
from unpoison.data import Examples
from unpoison.influence._factors import fit_factors
from unpoison.influence._index_build import Plan, bytes_needed, size_of
from unpoison.influence._index_files import content_digest
from unpoison.influence._index_rows import packed, row_bytes
from unpoison.influence._index_space import LEADING, RESIDUAL, Space, quick_type, span_of, unit_rows
from unpoison.influence._sketch import Sketcher
from unpoison.influence._sweep import where
from unpoison.tasks import Task

_MEASURED: Final = 256
_PROBE: Final = 256
# Quotes, a comma, a line and its indentation in the file of names.
_AROUND_A_NAME: Final = 8


@final
@dataclass(frozen=True, kw_only=True)
class IndexEstimate:
    """What an index is reckoned to take.

    Arguments:
        examples: how many the index is of.
        measured: how many were timed.
        numbers: m.
        sketch: D.
        fixed_seconds: of what does not depend on the number of examples, and is done by one process.
        factor_seconds: of the two passes for the factors, by one process.
        shard_seconds: of the shards, by one process.
        peak_bytes: of memory, for one process.
        disk_bytes: of the files.
    """

    examples: int
    measured: int
    numbers: int
    sketch: int
    fixed_seconds: float
    factor_seconds: float
    shard_seconds: float
    peak_bytes: int
    disk_bytes: int

    def seconds(self, processes: int = 1) -> float:
        """In all, where so many processes make shards and each has a processor core of its own."""
        return self.fixed_seconds + self.factor_seconds + self.shard_seconds / processes


def estimate(plan: Plan, model: nn.Module, examples: Examples, task: Task) -> IndexEstimate:
    """Time the stages on at most 256 examples, spread over the set, and reckon for all."""
    total, before = len(examples), peak_bytes(where(model)[0])
    step = max(1, total // _MEASURED)
    some = examples.subset(torch.arange(0, total, step)[:_MEASURED])
    count = len(some)
    times: dict[str, list[float]] = {}

    def told(stage: str, done: int, of: int, /, **_: Any) -> None:
        times.setdefault(stage, []).append(time.perf_counter())

    size = max(1, min(plan.batch_size, count // 2))
    began = time.perf_counter()
    factors = fit_factors(
        model,
        some,
        task,
        seed=derive_seed(plan.seed, "factors"),
        modules=plan.modules,
        batch_size=size,
        workspace_bytes=plan.workspace_bytes,
        progress=told,
    )
    ended = time.perf_counter()
    # The first batch of a pass also warms up, or waits for the eigendecompositions.
    per_example = {
        stage: (ends[-1] - ends[0]) / max(count - size, 1) if len(ends) > 1 else (ended - began) / count
        for stage, ends in times.items()
    }
    read = {
        "covariance": min(plan.covariance_examples or total, total),
        "eigenvalues": min(plan.eigenvalue_examples or total, total),
    }
    decompositions = max(0.0, ended - began - count * sum(per_example.values()))
    kept = size_of(plan, factors, total, where(model)[0])
    numbers, sketch = kept.numbers, kept.sketch
    function = task.measurement if plan.gradient == "measurement" else task.loss
    with Sketcher(
        model,
        factors,
        plan.damping,
        function,
        dimensions=sketch,
        seed=plan.seed,
        workspace_bytes=plan.workspace_bytes,
    ) as sketcher:
        dimensions = sketcher.dimensions
        spanning = 0 if numbers == sketch else numbers  # examples of the basis
        blank = torch.zeros(spanning, dimensions, device=sketcher.device, dtype=quick_type(sketcher.device))
        leading = blank[:LEADING].float()
        space = Space(blank, leading, 0)

        def rows(low: int) -> None:
            high = min(low + size, count)
            found = sketcher.batch(some.batch(low, high), high - low)
            values, residuals = space.of(unit_rows(found.rows, found.lengths))
            content_digest({**packed(values, kept.quantised), "residuals": residuals.half()})

        def all_rows() -> None:
            for low in range(0, count, size):
                rows(low)

        rows(0)
        spent = _timed(all_rows)
    probe, basis = min(_PROBE, spanning), 0.0
    if probe:
        rows_of_probe = torch.randn(probe, dimensions, generator=generator(0)).to(sketcher.device)
        basis = _timed(lambda: span_of(rows_of_probe)) * (numbers / probe) ** 2.5
    factor_bytes = 4 * sum(
        part.numel()
        for layer in factors.layers.values()
        for part in (layer.eigenvalues, layer.input_basis, layer.output_basis)
        if part is not None
    )
    outside = min(RESIDUAL, dimensions) if spanning else 0
    disk = row_bytes(numbers, kept.quantised) + 2 * outside + 32
    return IndexEstimate(
        examples=total,
        measured=count,
        numbers=numbers,
        sketch=dimensions,
        fixed_seconds=decompositions + basis + spent / count * min(spanning, total),
        factor_seconds=sum(read[stage] * seconds for stage, seconds in per_example.items()),
        shard_seconds=spent / count * total,
        peak_bytes=max(
            peak_bytes(sketcher.device),
            before + bytes_needed(plan, factors, kept, sketcher.device),
        ),
        disk_bytes=factor_bytes
        + blank.nbytes
        + leading.nbytes
        + total * disk
        + sum(len(name) + _AROUND_A_NAME for name in examples.ids or ()),
    )


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
