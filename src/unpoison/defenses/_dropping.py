"""What the defenses share that drop examples while the network is trained: their rounds and their reports."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from unpoison._seeds import derive_seed
from unpoison._statistics import Proportion
from unpoison.data import TrainingSet
from unpoison.defenses._gradients import training_logits
from unpoison.errors import InputError
from unpoison.training import Defense, Recipe


@final
@dataclass(frozen=True)
class DropJudgement:
    """How good a drop was, now that the truth is known.

    Arguments:
        precision: the share of poisons among the dropped.
        recall: the share of the dropped among the poisons.
        clean: the share of the dropped among the clean examples.
    """

    precision: Proportion
    recall: Proportion
    clean: Proportion


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class DropReport:
    """What one round dropped.

    Arguments:
        epoch: before which the round took place.
        seconds: what it took, the forward pass included.
        included: Bool[n], the examples of the run; on the CPU, as the next two.
        dropped: Bool[n], those of them that are out from this epoch on.
        dropped_now: Bool[n], those of `dropped` that were trained on until now.
    """

    epoch: int
    seconds: float
    included: Tensor
    dropped: Tensor
    dropped_now: Tensor

    @property
    def alive(self) -> int:
        """How many examples are trained on from this epoch on."""
        return int((self.included & ~self.dropped).sum())

    @property
    def newly(self) -> int:
        """How many this round took out."""
        return int(self.dropped_now.sum())

    @property
    def in_all(self) -> int:
        """How many are out from this epoch on."""
        return int(self.dropped.sum())

    def judge(self, poison: Tensor, *, this_round: bool = False) -> DropJudgement:
        """Precision and recall of all that is out, or of this round alone.

        Arguments:
            poison: Bool[n], the truth; or Int64[k], the places of the poisons in the training set.
            this_round: count only what this round took out.

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
        hits, blows = int((out & truth).sum()), int((out & clean).sum())
        return DropJudgement(
            precision=Proportion(hits, hits + blows),
            recall=Proportion(hits, int(truth.sum())),
            clean=Proportion(blows, int(clean.sum())),
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
    """What a dropping defense remembers of the run that it defends."""

    def __init__(self) -> None:
        self.begin(0, None)

    def begin(self, seed: int, recipe: Recipe | None) -> None:
        """Forget everything; a new run begins, with this recipe where it is known."""
        self.seed, self.recipe = seed, recipe
        self.included: Tensor | None = None
        self.dropped: list[Tensor] = []
        self.epochs: list[int] = []
        self.seconds: list[float] = []

    def start(self, included: Tensor) -> None:
        """Before the first epoch: those examples are trained on."""
        self.included = included.cpu().clone()
        self.dropped, self.epochs, self.seconds = [], [], []

    @property
    def alive(self) -> Tensor:
        """Bool[n], on the CPU."""
        assert self.included is not None
        return self.included & ~self.dropped[-1] if self.dropped else self.included

    def record(self, epoch: int, dropped: Tensor, seconds: float) -> None:
        """A round has taken place."""
        self.dropped.append(dropped)
        self.epochs.append(epoch)
        self.seconds.append(seconds)

    def reports(self) -> tuple[DropReport, ...]:
        """One a round."""
        if self.included is None:
            return ()
        before, reports = torch.zeros_like(self.included), []
        for epoch, seconds, dropped in zip(self.epochs, self.seconds, self.dropped, strict=True):
            reports.append(
                DropReport(
                    epoch=epoch,
                    seconds=seconds,
                    included=self.included,
                    dropped=dropped,
                    dropped_now=dropped & ~before,
                )
            )
            before = dropped
        return tuple(reports)

    def state(self) -> dict[str, Tensor]:
        """As tensors, for the checkpoint."""
        if self.included is None:
            return {}
        empty = torch.empty(0, len(self.included), dtype=torch.bool)
        return {
            "included": self.included,
            "dropped": torch.stack(self.dropped) if self.dropped else empty,
            "epochs": torch.tensor(self.epochs, dtype=torch.int64),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        if "included" not in state:
            return
        self.included = state["included"].cpu()
        self.dropped = list(state["dropped"].cpu().unbind())
        self.epochs = [int(epoch) for epoch in state["epochs"]]
        self.seconds = [float(seconds) for seconds in state["seconds"]]


class DroppingDefense(Defense):
    """A defense that drops examples in rounds, between epochs.

    In `train` it works by itself. In a loop of your own, ask it before each epoch:

        if defense.is_round(epoch):
            keep = defense.select(epoch, logits, labels)

    with the logits of all examples, in order. It remembers the rounds; `reports` tells what they did.
    """

    _drops: Drops

    def is_round(self, epoch: int) -> bool:
        """Whether it looks at the examples before `epoch`, counted from 0."""
        return self._is_round(epoch, self._drops.recipe)

    @abstractmethod
    def _is_round(self, epoch: int, recipe: Recipe | None) -> bool:
        """The same, given the recipe of the run; None outside of `train`."""

    @abstractmethod
    def _out(
        self, epoch: int, logits: Tensor | None, labels: Tensor, included: Tensor, alive: Tensor
    ) -> Tensor:
        """Bool[n]: the examples that are out from `epoch` on; all on the device of the labels."""

    def _look(self, model: nn.Module, training_set: TrainingSet) -> Tensor | None:
        """The logits that `_out` is given."""
        return training_logits(model, training_set)

    @property
    def reports(self) -> tuple[DropReport, ...]:
        """One a round of the run that it defends, or has defended last."""
        return self._drops.reports()

    def sizes_so_far(self) -> tuple[tuple[int, int], ...]:
        """Of each round its epoch and how many it took out, for the controls.

        Raises:
            InputError: there was no round yet.
        """
        sizes = tuple((report.epoch, report.newly) for report in self.reports)
        if not sizes:
            raise InputError(f"{self!r}: has had no round yet; train with it first")
        return sizes

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """Forget the run before, and read the schedule off the recipe."""
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
        """Bool[n]: the examples to train on from `epoch` on, by a round that takes place now.

        Arguments:
            epoch: counted from 0; at 0 the memory of earlier rounds is cleared.
            logits: Float[n classes] of all examples, those dropped before included, in the same order every
                time; in eval mode and without augmentation.
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

    def _seed(self, seed: int, epoch: int) -> int:
        return derive_seed(seed, "round", epoch, self._drops.seed)

    def state(self) -> dict[str, Tensor]:
        """The rounds so far."""
        return self._drops.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self._drops.restore(state)

    def report(self) -> dict[str, Any]:
        """The sizes and the seconds of all rounds."""
        return {"rounds": [report.to_dict() for report in self.reports]}


def check_schedule(name: str, interval: int, warm_up: int, last_epoch: int | None) -> None:
    """That a schedule of rounds makes sense.

    Raises:
        InputError: it does not.
    """
    for field, value, least in (
        ("interval", interval, 1),
        ("warm_up", warm_up, 0),
        ("last_epoch", last_epoch, 0),
    ):
        if field == "last_epoch" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name}: {field} must be a whole number, {least} or more, found {value!r}")


def on_schedule(epoch: int, interval: int, warm_up: int, last: int | None, recipe: Recipe | None) -> bool:
    """Whether `epoch` is a multiple of `interval` between warm-up and end.

    Where no end is given it is the recipe's last milestone, or three quarters of its epochs.
    """
    if last is None and recipe is not None:
        last = recipe.milestones[-1] if recipe.milestones else round(0.75 * recipe.epochs)
    return epoch >= warm_up and epoch % interval == 0 and (last is None or epoch <= last)


def check_sizes(name: str, sizes: object, share: float) -> tuple[tuple[int, int], ...]:
    """The sizes of a control's rounds as a tuple, and that its share is one.

    Raises:
        InputError: they are not pairs of whole numbers with ascending epochs, or the share is no share.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise InputError(f"{name}: share must be a number in 0..1, found {share!r}")
    problem = f"{name}: sizes must be pairs (epoch, how many) with ascending epochs, found {sizes!r}"
    if not isinstance(sizes, (tuple, list)):
        raise InputError(problem)
    pairs: list[tuple[int, int]] = []
    for pair in sizes:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(problem)
        epoch, count = pair
        if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in pair):
            raise InputError(problem)
        if pairs and epoch <= pairs[-1][0]:
            raise InputError(problem)
        pairs.append((epoch, count))
    return tuple(pairs)


def size_of_round(
    epoch: int, sizes: tuple[tuple[int, int], ...], share: float, included: int, alive: int
) -> int:
    """How many examples a control drops before `epoch`; never all of them."""
    wanted = dict(sizes).get(epoch, 0) if sizes else round(share * included)
    return max(0, min(wanted, alive - 1))
