"""How far the influence of a training example collapses when an input is asked about another label.

The influence of example j on the answer y at the input x is that on the margin of y (`ClassificationTask`).
Asked about another label y', it is that on the margin of y'. The collapse is the difference, on average over
all y' but y, and so the influence on one function of the logits,

    f(x) = margin of y - mean over y' != y of the margin of y',

whose gradient costs one backward pass. It is what Delta-Influence estimates from random draws of y'; the
image is left as it is. The training gradient is that of the example's own margin, which does not vanish
where an example is fitted perfectly, and the result is divided by that gradient's norm (renormalised
influence; Hammoudeh and Lowd, "Identifying a Training-Set Attack's Target Using Renormalized Influence
Estimation", CCS 2022), so that a few examples with large gradients do not outweigh the rest.

Only examples with the label y are scored: poison bears the label that it causes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from unpoison._inputs import count_of
from unpoison._progress import Progress
from unpoison._stable import margins
from unpoison.data import Inputs
from unpoison.detectors._search import Search
from unpoison.influence import IndexQueries, PreconditionedQueries, precondition, score
from unpoison.tasks import Batch, ClassificationTask, Task

_QUERY_BYTES: Final = 1 << 30
_INDEXED: Final = 512


@final
class LabelCollapse(Task):
    """Minus the margin of the label, plus the mean margin of the other labels."""

    def __init__(self) -> None:
        self._task = ClassificationTask()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return self._task.loss(model, batch)

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """Float[q]: falls as the label gets more likely than the others."""
        every = margins(self._task.logits(model, batch[0]))
        own = every.gather(1, batch[1][:, None])[:, 0]
        return own - (every.sum(1) - own) / (every.shape[1] - 1)

    def sampled_loss(self, model: nn.Module, batch: Batch, noise: Tensor) -> Tensor:
        """Cross-entropy under drawn labels."""
        return self._task.sampled_loss(model, batch, noise)


Queries = PreconditionedQueries | IndexQueries


def queries_of(
    search: Search, inputs: Inputs, label: int, task: Task, *, mean: bool = False, exact: bool = False
) -> Queries:
    """The queries of q inputs about a label, for the index where there is one and they need not be `exact`.

    Where `mean`, one of their mean gradient, of which progress is told.
    """
    count = count_of(inputs)
    batch = (inputs, torch.full((count,), label))
    options: dict[str, Any] = {
        "combine": torch.full((1, count), 1 / count) if mean else None,
        "damping": search.damping,
        "batch_size": search.batch_size,
        "progress": search.progress if mean else None,
    }
    if search.index is not None and not exact:
        return search.index.queries(search.model, batch, task, **options)
    return precondition(search.model, search.factors, batch, task, **options)


def normalised(search: Search, queries: Queries, rows: Tensor, progress: Progress | None = None) -> Tensor:
    """Float64[q k], on the CPU: influences of the training examples at Int64[k] over their gradient norms."""
    if isinstance(queries, IndexQueries):
        assert search.index is not None
        norms = search.index.gradient_norms(rows)
        return search.index.influence(queries, rows) / torch.where(norms > 0, norms, torch.inf)
    scores = score(
        search.model,
        queries,
        search.training_set.subset(rows),
        ClassificationTask(),
        gradient="measurement",
        gradient_norms=True,
        batch_size=search.batch_size,
        progress=progress,
    )
    assert scores.gradient_norms is not None
    norms = scores.gradient_norms.cpu().double()
    return scores.values.cpu().double() / torch.where(norms > 0, norms, torch.inf)


def joined(first: Queries, second: Queries) -> Queries:
    """The queries of both, of one kind and model."""
    if isinstance(first, IndexQueries):
        assert isinstance(second, IndexQueries)
        return first.joined(second)
    assert isinstance(second, PreconditionedQueries)
    values = {name: torch.cat([value, second.values[name]]) for name, value in first.values.items()}
    return replace(first, values=values)


def queries_at_a_time(search: Search) -> int:
    """How many queries fit into 1 GiB of float32, for an index of float64; at least 8."""
    if search.index is not None:
        return min(_INDEXED, most_queries(2 * search.index.numbers))
    return most_queries(search.factors.num_parameters)


def most_queries(parameters: int) -> int:
    """How many queries of so many tracked parameters are held at a time."""
    return max(8, _QUERY_BYTES // (4 * max(parameters, 1)))
