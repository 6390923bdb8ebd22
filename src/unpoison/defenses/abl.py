"""Anti-Backdoor Learning: what is learned too fast is set aside, and unlearned in the end.

Li, Lyu, Koren, Lyu, Li and Ma 2021, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data"
(NeurIPS, arXiv 2110.11571). Networks fit backdoored examples sooner than others. Stages:

1. until the turning epoch, local gradient ascent: an example whose loss is below `gamma` is ascended, so that
   the loss of most stays near it, while that of backdoored examples falls below all the same;
2. at the turning epoch the `isolated` share of the examples with the lowest loss is set aside, and the rest
   is learned from;
3. in the last epochs, global gradient ascent: the mean loss of the rest is lowered, and that of the isolated
   examples raised, each step with a batch of both.

It is a defense and no unlearner, because what is isolated is seen while the network learns. What was set
aside is what the run dropped.

The preset "published" ascends from the turning epoch on, without a limit, as the paper's equation does. Our
default ascends in the last fifth of the epochs, where the learning rate is low, and only up to a loss of
`limit`, beyond which ascent breaks the network and forgets nothing more.

Cost: one training, and a forward pass over the set. Memory: one bit an example.

Limits: it isolates examples of any set, also of a clean one, which then lack. Poison that is learned no
faster than the rest (clean-label poison, low budgets) is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import PositiveFloat
from unpoison._stable import cross_entropy
from unpoison.data import TrainingSet
from unpoison.defenses._methods import register
from unpoison.registry import Presets
from unpoison.training import Batch, Defense, Recipe, Step, predict


@final
class _Memory:
    """The state of the run."""

    def __init__(self) -> None:
        self.begin(None, 0)

    def begin(self, examples: TrainingSet | None, epochs: int) -> None:
        """Clear the state for a new run."""
        self.examples, self.epochs = examples, epochs
        self.isolated: Tensor | None = None
        self.epoch = 0
        self.ascended = 0


@final
@register(
    name="abl",
    title="Anti-Backdoor Learning (ABL)",
    summary="Sets the examples aside that are learned fastest, and unlearns them in the last epochs.",
    paper="Li et al. 2021, arXiv 2110.11571",
    cost="one training",
    presets=("default", "published"),
)
@dataclass(frozen=True, kw_only=True)
class ABL(Defense):
    """Isolation of examples with low loss, and gradient ascent on them.

    Arguments:
        turning: the fraction of the epochs before which examples are isolated, in (0, 1).
        isolated: the fraction of the examples that is, in (0, 1); one at least.
        gamma: the loss below which an example is ascended before that, above 0.
        unlearning: the fraction of the epochs, from the last, with ascent on what was isolated, in [0, 1]; it
            never begins before the turning epoch.
        limit: the loss up to which an isolated example is ascended, above 0; None for any.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {"default": {}, "published": {"unlearning": 1.0, "limit": None}}

    turning: Annotated[float, "(0, 1)"] = 0.2
    isolated: Annotated[float, "(0, 1)"] = 0.01
    gamma: PositiveFloat = 0.5
    unlearning: Annotated[float, "[0, 1]"] = 0.2
    limit: PositiveFloat | None = 5.0
    _memory: _Memory = field(default_factory=_Memory, init=False, repr=False, compare=False)

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """Clear the state."""
        self._memory.begin(training_set, recipe.epochs)
        return training_set

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        """All alive, without what was isolated at the turning epoch."""
        memory = self._memory
        if epoch == self._turning_epoch and memory.isolated is None:
            candidates = alive.nonzero()[:, 0]
            logits = predict(model, training_set.images[candidates])
            losses = cross_entropy(logits, training_set.labels[candidates], reduction="none")
            count = min(max(1, int(self.isolated * len(candidates))), len(candidates) - 1)
            memory.isolated = torch.zeros_like(alive)
            memory.isolated[candidates[losses.argsort(stable=True)[:count]]] = True
        return alive if memory.isolated is None else alive & ~memory.isolated.to(alive.device)

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch, and in the last epochs as many isolated examples, or all of them, behind it."""
        memory = self._memory
        memory.epoch, memory.ascended = batch.epoch, 0
        images, labels = batch.images, batch.labels
        if memory.isolated is not None and self._unlearns(batch.epoch):
            assert memory.examples is not None
            pool = memory.isolated.nonzero()[:, 0].to(images.device)
            draw = torch.randperm(len(pool), generator=batch.generator, device=images.device)
            chosen = pool[draw[: len(images)]]
            memory.ascended = len(chosen)
            images = torch.cat([images, memory.examples.images.to(images.device)[chosen]])
            labels = torch.cat([labels, memory.examples.labels.to(labels.device)[chosen]])
        return batch.augment(images), labels

    def gradients(self, step: Step) -> tuple[Tensor, Tensor]:
        """Local gradient ascent before the turning epoch, global ascent in the last ones."""
        memory = self._memory
        logits = step.logits_of(step.images)
        losses = step.loss_of(logits, step.targets, reduction="none")
        if memory.ascended:
            raised = losses[-memory.ascended :]
            raised = raised if self.limit is None else raised.clamp(max=self.limit)
            loss = losses[: -memory.ascended].mean() - raised.mean()
        elif memory.epoch < self._turning_epoch:
            loss = ((losses.detach() - self.gamma).sign() * losses).mean()
        else:
            loss = losses.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss, logits

    def state(self) -> dict[str, Tensor]:
        """What was isolated."""
        isolated = self._memory.isolated
        return {} if isolated is None else {"isolated": isolated}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Accept it."""
        self._memory.isolated = state.get("isolated")

    def report(self) -> dict[str, Any]:
        """How many examples were isolated, and before which epoch."""
        isolated = self._memory.isolated
        count = 0 if isolated is None else int(isolated.sum())
        return {"abl": {"isolated": count, "turning_epoch": self._turning_epoch}}

    @property
    def _turning_epoch(self) -> int:
        return max(1, round(self.turning * self._memory.epochs))

    def _unlearns(self, epoch: int) -> bool:
        return epoch >= round((1 - self.unlearning) * self._memory.epochs)
