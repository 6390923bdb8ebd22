"""The base of defenses that drop examples during training: their rounds and reports."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import Fraction, NonNegativeInt, PositiveInt
from unpoison._seeds import derive_seed
from unpoison._statistics import Proportion
from unpoison.data import TrainingSet
from unpoison.defenses._gradients import training_logits
from unpoison.errors import InputError
from unpoison.registry import Method
from unpoison.training import Defense, Recipe


@final
@dataclass(frozen=True)
class DropJudgement:
    """The quality of a drop, given the truth.

    Arguments:
        precision: the share of poisons among the dropped examples.
        recall: the share of poisons that were dropped.
        clean: the share of clean examples that were dropped.
    """

    precision: Proportion
    recall: Proportion
    clean: Proportion


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class DropReport:
    """What one round dropped.

    Arguments:
        epoch: the epoch that the round preceded.
        seconds: of the round, its forward pass included.
        included: Bool[n], the examples of the run; on the CPU, like the next two.
        dropped: Bool[n], the examples that are dropped after the round.
        dropped_now: Bool[n], those of `dropped` that were not dropped before.
    """

    epoch: int
    seconds: float
    included: Tensor
    dropped: Tensor
    dropped_now: Tensor

    @property
    def alive(self) -> int:
        """How many examples are trained on after the round."""
        return int((self.included & ~self.dropped).sum())

    @property
    def newly(self) -> int:
        """How many examples this round dropped."""
        return int(self.dropped_now.sum())

    @property
    def in_all(self) -> int:
        """How many examples are dropped after the round."""
        return int(self.dropped.sum())

    def judge(self, poison: Tensor, *, this_round: bool = False) -> DropJudgement:
        """Precision and recall of all drops so far, or of this round alone.

        Arguments:
            poison: Bool[n], the truth; or Int64[k], the indices of the poisons in the training set.
            this_round: count only what this round dropped.

        Raises:
            InputError: `poison` is neither.
        """
        if poison.dtype == torch.int64 and poison.ndim == 1:
            truth = torch.zeros_like(self.included)
            truth[poison.cpu()] = True
        elif poison.dtype == torch.bool and poison.shape == self.included.shape:
            truth = poison.cpu()
        else:
            raise InputError(
                f"poison: expected bool [{len(self.included)}] or int64 indices, found {poison.dtype} "
                f"of shape {tuple(poison.shape)}"
            )
        truth = truth & self.included
        clean = self.included & ~truth
        out = self.dropped_now if this_round else self.dropped
        hits, errors = int((out & truth).sum()), int((out & clean).sum())
        return DropJudgement(
            precision=Proportion(hits, hits + errors),
            recall=Proportion(hits, int(truth.sum())),
            clean=Proportion(errors, int(clean.sum())),
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "epoch": self.epoch,
            "alive": self.alive,
            "dropped": self.newly,
            "dropped_in_all": self.in_all,
            "seconds": self.seconds,
        }


@final
class Drops:
    """The state of a dropping defense in a run."""

    def __init__(self) -> None:
        self.begin(0, None)

    def begin(self, seed: int, recipe: Recipe | None) -> None:
        """Clear the state for a new run, with this recipe where it is known."""
        self.seed, self.recipe = seed, recipe
        self.included: Tensor | None = None
        self.reports: list[DropReport] = []

    def start(self, included: Tensor) -> None:
        """Clear the rounds; these examples are trained on in the first epoch."""
        self.included, self.reports = included.cpu().clone(), []

    @property
    def alive(self) -> Tensor:
        """Bool[n], on the CPU."""
        assert self.included is not None
        return self.included & ~self.reports[-1].dropped if self.reports else self.included

    def record(self, epoch: int, dropped: Tensor, seconds: float) -> None:
        """Add a round."""
        assert self.included is not None
        now = dropped & ~self.reports[-1].dropped if self.reports else dropped
        self.reports.append(
            DropReport(epoch=epoch, seconds=seconds, included=self.included, dropped=dropped, dropped_now=now)
        )

    def state(self) -> dict[str, Tensor]:
        """As tensors, for the checkpoint."""
        if self.included is None:
            return {}
        empty = torch.empty(0, len(self.included), dtype=torch.bool)
        return {
            "included": self.included,
            "dropped": torch.stack([one.dropped for one in self.reports]) if self.reports else empty,
            "epochs": torch.tensor([one.epoch for one in self.reports], dtype=torch.int64),
            "seconds": torch.tensor([one.seconds for one in self.reports], dtype=torch.float64),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        if "included" in state:
            self.start(state["included"])
            for epoch, dropped, seconds in zip(
                state["epochs"].tolist(), state["dropped"].cpu(), state["seconds"].tolist(), strict=True
            ):
                self.record(epoch, dropped, seconds)


class DroppingDefense(Defense):
    """A defense that drops examples in rounds, between epochs.

    `train` calls it. In a loop of your own, call it before each epoch, with the logits of all examples in
    order:

        if defense.is_round(epoch):
            keep = defense.select(epoch, logits, labels)

    `reports` describes the rounds so far.
    """

    method: ClassVar[Method]
    _drops: Drops

    def is_round(self, epoch: int) -> bool:
        """Whether there is a round before `epoch`, counted from 0."""
        return self._is_round(epoch, self._drops.recipe)

    @abstractmethod
    def _is_round(self, epoch: int, recipe: Recipe | None) -> bool:
        """Likewise, given the recipe of the run; None outside of `train`."""

    @abstractmethod
    def _out(
        self, epoch: int, logits: Tensor | None, labels: Tensor, included: Tensor, alive: Tensor
    ) -> Tensor:
        """Bool[n]: the examples that are dropped from `epoch` on; all on the device of the labels."""

    def _look(self, model: nn.Module, training_set: TrainingSet) -> Tensor | None:
        """The logits that `_out` is given."""
        return training_logits(model, training_set)

    @property
    def reports(self) -> tuple[DropReport, ...]:
        """One report for each round of the latest run."""
        return tuple(self._drops.reports)

    def sizes_so_far(self) -> tuple[tuple[int, int], ...]:
        """The epoch of each round and how many examples it dropped, for the controls.

        Raises:
            InputError: there was no round yet.
        """
        sizes = tuple((report.epoch, report.newly) for report in self.reports)
        if not sizes:
            raise InputError(f"{self!r}: has had no round yet; train with it first")
        return sizes

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """Clear the state, and read the schedule of the recipe."""
        self._drops.begin(seed, recipe)
        return training_set

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        """Bool[n]: the examples to train on in `epoch`."""
        if epoch == 0 or self._drops.included is None:
            self._drops.start(alive)
        if not self.is_round(epoch):
            return self._drops.alive.to(alive.device)
        clock = time.perf_counter()
        return self._round(epoch, self._look(model, training_set), training_set.labels, clock)

    def select(self, epoch: int, logits: Tensor, labels: Tensor) -> Tensor:
        """Do a round now. Bool[n]: the examples to train on from `epoch` on.

        Arguments:
            epoch: counted from 0; at 0 earlier rounds are cleared.
            logits: Float[n classes] of all examples, dropped ones included, in the same order every time; in
                eval mode and without augmentation.
            labels: Int64[n], on the same device.

        Raises:
            InputError: the shapes do not fit, or logits are not finite.
        """
        if epoch == 0 or self._drops.included is None:
            self._drops.start(torch.ones(len(labels), dtype=torch.bool))
        return self._round(epoch, logits, labels, time.perf_counter())

    def _round(self, epoch: int, logits: Tensor | None, labels: Tensor, clock: float) -> Tensor:
        drops = self._drops
        assert drops.included is not None
        if labels.shape != drops.included.shape:
            raise InputError(
                f"labels: expected {len(drops.included)} of them, as in the round before, found {len(labels)}"
            )
        included, alive = drops.included.to(labels.device), drops.alive.to(labels.device)
        out = self._out(epoch, logits, labels, included, alive) & included
        drops.record(epoch, out.cpu(), time.perf_counter() - clock)
        return included & ~out

    def _round_seed(self, epoch: int) -> int:
        return derive_seed(0, "round", epoch, self._drops.seed)

    def state(self) -> dict[str, Tensor]:
        """The rounds so far."""
        return self._drops.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        self._drops.restore(state)

    def report(self) -> dict[str, Any]:
        """The sizes and the seconds of all rounds."""
        return {"rounds": [report.to_dict() for report in self.reports]}


def check_ascending(name: str, epochs: Sequence[int] | None) -> None:
    """Check that epochs are numbered from 0 and in ascending order."""
    if epochs is not None and (not epochs or list(epochs) != sorted(set(epochs)) or epochs[0] < 0):
        raise InputError(f"{name}: epochs must be ascending whole numbers, found {epochs!r}")


def on_schedule(epoch: int, interval: int, warm_up: int, last: int | None, recipe: Recipe | None) -> bool:
    """Whether `epoch` is a multiple of `interval` between warm-up and last epoch.

    Without a last epoch it is the recipe's last milestone, or three quarters of its epochs.
    """
    if last is None and recipe is not None:
        last = recipe.milestones[-1] if recipe.milestones else round(0.75 * recipe.epochs)
    return epoch >= warm_up and epoch % interval == 0 and (last is None or epoch <= last)


@dataclass(frozen=True, kw_only=True)
class ControlDrop(DroppingDefense):
    """The schedule of a control: rounds of the sizes, and at the epochs, of another defense, or of its own.

    Arguments:
        sizes: pairs of an epoch and how many examples to drop before it; if there are any, they are the whole
            schedule. `like(defense)` takes them from a defense after its run.
        share: without sizes, the share of the run's examples that each round drops, in [0, 1].
        interval: without sizes, epochs from round to round; rounds are at its multiples.
        warm_up: without sizes, the first epoch that may have a round.
        last_epoch: without sizes, the last one; None is the recipe's last milestone, or three quarters of the
            epochs.

    Raises:
        InputError: a value is out of its range.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    share: Fraction = 0.01
    interval: PositiveInt = 2
    warm_up: NonNegativeInt = 10
    last_epoch: NonNegativeInt | None = None
    _drops: Drops = field(default_factory=Drops, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = self.sizes
        super().__post_init__()
        pairs = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in self.sizes]
        whole = all(isinstance(value, int) and value >= 0 for pair in pairs for value in pair)
        if not whole or any(len(pair) != 2 for pair in pairs):
            raise InputError(f"{self.method.name}: sizes must be pairs (epoch, how many), found {given!r}")
        if pairs:
            check_ascending(f"{self.method.name}: sizes", [epoch for epoch, _ in pairs])
        object.__setattr__(self, "sizes", tuple(pairs))

    @classmethod
    def like(cls, defense: DroppingDefense) -> Self:
        """The control of a defense after its run: rounds of the same sizes before the same epochs.

        Raises:
            InputError: it has had no round yet.
        """
        return cls(sizes=defense.sizes_so_far())

    def _is_round(self, epoch: int, recipe: Recipe | None) -> bool:
        if self.sizes:
            return any(epoch == number for number, _ in self.sizes)
        return on_schedule(epoch, self.interval, self.warm_up, self.last_epoch, recipe)

    def _size(self, epoch: int, included: Tensor, alive: Tensor) -> int:
        """How many examples to drop before `epoch`; never all of them."""
        wanted = dict(self.sizes).get(epoch, 0) if self.sizes else round(self.share * int(included.sum()))
        return max(0, min(wanted, int(alive.sum()) - 1))
