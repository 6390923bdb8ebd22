"""TRAK: which training examples raise the margin of the wrong label, by projected gradients.

Park, Georgiev, Ilyas, Leclerc and Madry, "TRAK: Attributing Model Behavior at Scale" (ICML 2023, arXiv
2303.14186). With the margin f(z) = log(p / (1 - p)) of an example's label and one trained network:

1. Phi, Float[n d]: the gradients of f at all training examples, projected to d numbers by a random matrix;
2. phi, Float[d]: the same at the observed input, for the wrong label (the mean where there are several);
3. attribution of example j: phi^T (Phi^T Phi)^-1 Phi_j (1 - p_j).

A positive attribution raises the margin of the wrong label. The comparison with Delta-Influence says that it
thresholded TRAK, but not at what. The rule here is ours and states no share: attributions minus their median
are divided by their median absolute deviation, and those above `threshold` are flagged. As EK-FAC with a
threshold, TRAK names examples for any prediction, poisoned or not.

The projection is the count-sketch of `unpoison.influence.project` in place of a Gaussian matrix: as good for
inner products, and thousands of times cheaper on a processor. d is at most a quarter of the number of
examples, so that Phi^T Phi can be inverted; directions without any gradient are left out. Only linear
and convolution layers are tracked by default. The paper averages over several networks; here there is one.

Cost: one pass over the training set, n d^2 multiplications for Phi^T Phi and d^3 / 3 to solve with it.
Memory: n d numbers, and what `unpoison.influence.project` states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import check_options
from unpoison._progress import Progress
from unpoison._seeds import derive_seed
from unpoison.data import Examples, TensorExamples
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._search import Search, Searcher
from unpoison.errors import InputError
from unpoison.influence import Parts, Projected, coverage, project, projection_bytes
from unpoison.registry import Presets
from unpoison.tasks import ClassificationTask


@final
@register(
    name="trak",
    title="TRAK with a threshold",
    summary="Flags the examples to which projected gradients attribute the wrong answer.",
    paper="Park et al. 2023, arXiv 2303.14186",
    cost="one pass with per-example gradients",
    presets=("original",),
    needs_observation=True,
)
@dataclass(frozen=True, kw_only=True)
class TRAK(Searcher):
    """Flag the examples whose attribution to the wrong prediction is an outlier.

    Arguments:
        dimensions: d, at most; 2048 is what the published package takes.
        threshold: in median absolute deviations (times 1.4826) above the median attribution.
        modules: which modules' parameters to track; all linear and convolution layers by default.
        batch_size: examples of a forward pass.
        workspace_bytes: of per-example gradients at a time; default 8 MiB, on CUDA 1 GiB.
    """

    PRESETS: ClassVar[Presets] = {
        "original": {},
    }

    dimensions: int = 2048
    threshold: float = 5.0
    modules: tuple[str, ...] | None = None
    batch_size: int = 128
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        check_options(
            self.method.name, self, dimensions="[1, inf)", batch_size="[1, inf)", workspace_bytes="[1, inf)"
        )

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        dimensions = min(self.dimensions, max(1, measured.examples // 4))
        projected = projection_bytes(
            measured.model,
            measured.activations,
            modules=self.modules,
            batch_size=min(self.batch_size, measured.examples),
            dimensions=dimensions,
            examples=measured.examples,
            workspace_bytes=self.workspace_bytes,
        )
        return {**projected, "products": 8 * 4 * dimensions**2}

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        training_set, count = search.training_set, len(search.observation)
        train, queries = _projected(
            search.model,
            training_set,
            TensorExamples(search.observation.inputs, torch.full((count,), search.answer)),
            dimensions=min(self.dimensions, max(1, len(training_set) // 4)),
            seed=derive_seed(search.seed, "trak"),
            modules=self.modules,
            batch_size=self.batch_size,
            workspace_bytes=self.workspace_bytes,
            progress=search.progress,
        )
        search.coverage = coverage(search.model, train.layers)
        attributions = _attributed(train, queries, training_set.name)
        raw = attributions.mean(0).double()
        centre = raw.median()
        spread = 1.4826 * (raw - centre).abs().median()
        if not float(spread) > 0:  # more than half of the examples have no gradient at all
            spread = raw.std(correction=0).clamp(min=1e-300)
        return search.findings(
            scores=(raw - centre) / spread,
            threshold=self.threshold,
            how=f"attribution more than {self.threshold:g} deviations above the median, by the median "
            "absolute deviation; given in advance",
            words=f"have an outlying attribution to the answer {search.answer_name!r}",
            evidence={"influence_before": raw},
        )


def trak_scores(
    model: nn.Module,
    training_set: Examples,
    observed: TensorExamples,
    *,
    dimensions: int,
    seed: int,
    modules: tuple[str, ...] | None = None,
    batch_size: int = 128,
    workspace_bytes: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Float[m n]: the attribution of each observed margin to each training example.

    Arguments:
        model: left as it was.
        training_set: read once.
        observed: m inputs and Int64[m] labels.
        dimensions: d.
        seed: of the projection.
        modules: see `project`, like the rest.
        batch_size: examples of a forward pass.
        workspace_bytes: of per-example gradients at a time.
        progress: called with the stage, examples done and examples to do.

    Raises:
        InputError: a gradient is not finite.
    """
    train, queries = _projected(
        model,
        training_set,
        observed,
        dimensions=dimensions,
        seed=seed,
        modules=modules,
        batch_size=batch_size,
        workspace_bytes=workspace_bytes,
        progress=progress,
    )
    return _attributed(train, queries, training_set.name)


def _projected(
    model: nn.Module,
    training_set: Examples,
    observed: TensorExamples,
    *,
    progress: Progress | None,
    **options: Any,
) -> tuple[Projected, Projected]:
    """The projected gradients of the training examples, and those of the observed margins."""
    # The measurement is minus the margin; the two signs cancel in the product.
    measured = ClassificationTask().measurement
    return (
        project(model, training_set, measured, progress=progress, **options),
        project(model, observed, measured, **options),
    )


def _attributed(train: Projected, queries: Projected, name: str) -> Tensor:
    """Float[m n]."""
    if not all(bool(part.gradients.isfinite().all()) for part in (train, queries)):
        raise InputError(f"{name}: the gradients of the model are not finite numbers; train it anew")
    doubt = train.values.sigmoid()  # 1 - p, without cancellation
    solved = _solve(train.gradients, queries.gradients)
    return (solved @ train.gradients.t()) * doubt


def _solve(phi: Tensor, queries: Tensor) -> Tensor:
    """Float[m d]: each row of Float[m d] `queries`, multiplied by (Phi^T Phi)^+, in float64."""
    gram = (phi.t() @ phi).double()
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal()
    if not int(failed) and bool(pivots.amin().square() > 1e-6 * pivots.amax().square()):
        return torch.cholesky_solve(queries.double().t(), factor).t().to(phi.dtype)
    # Fewer gradients than dimensions: the pseudo-inverse.
    values, vectors = torch.linalg.eigh(gram)
    # Products in float32 leave about 1e-6 of the largest where there is no gradient.
    kept = values > 1e-6 * values.amax()
    basis = vectors[:, kept]
    solved: Tensor = (queries.double() @ basis) / values[kept] @ basis.t()
    return solved.to(phi.dtype)
