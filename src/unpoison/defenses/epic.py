"""EPIC: drop the examples that are alone in gradient space, every few epochs of training.

Yang, Liu and Mirzasoleiman, "Not All Poisons are Created Equal: Robust Training against Data Poisoning"
(ICML 2022, arXiv 2210.09671). Under a bounded perturbation only some poisons come to pull the network towards
the target; to do that they must leave their class in gradient space, and there they are alone. Stages of a
round:

I    gradients  of the loss by the logits, `softmax(z) - onehot(y)`, for all examples, in eval mode and
                without augmentation.
II   medoids    in each class a share of its examples, by greedy facility location with the similarity
                `exp(-distance / classes)`.
III  drop       the medoids that serve nobody but themselves, for the rest of the training.

Cost of a round at 50,000 examples of 10 classes: a forward pass and some seconds on two cores. Memory: the
matrix of one class, 4 n^2 bytes, 100 MB for 5,000 examples, bounded by `memory`.

The released code differs from the paper's description, and the presets follow either: `released-*` are its
example commands (warm-up 30 of 200 epochs for every subset size), `paper-*` the description (10, 20, 30 for
subset sizes 0.1, 0.2, 0.3). Both leave the bias of the classifier out of the logits and cluster all examples,
also those that are dropped already. Departures:

- Clusters of classes with different numbers of medoids are kept apart. The released code shifts their numbers
  and drops the wrong examples unless all classes have as many.
- A class whose every example would be a medoid (a tiny class, or a subset size near 1) is left whole: to be
  alone then says nothing.
- Softmax and distances are computed in float64, ties go to the lower index.

Limits: what is dropped are the lonely examples, poisons or not, so rare and hard clean examples go first, and
small training sets lose accuracy; two poisons that lie together are not alone and stay. `Isolation` is ours
against both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._seeds import generator
from unpoison.data import TrainingSet
from unpoison.defenses._dropping import DroppingDefense, Drops, check_schedule, on_schedule
from unpoison.defenses._facility_location import KERNELS, MEMORY, Kernel, Workspace, greedy_medoids
from unpoison.defenses._gradients import logit_gradients, training_logits
from unpoison.defenses._methods import register
from unpoison.errors import InputError, nearest
from unpoison.registry import Presets
from unpoison.training import Recipe


def _published_settings() -> dict[str, dict[str, Any]]:
    """The schedules of the paper and of the released commands, for each size of the subset."""
    presets: dict[str, dict[str, Any]] = {"default": {}}
    for size, paper_warm_up in ((0.1, 10), (0.2, 20), (0.3, 30)):
        long = {"subset_size": size, "interval": 10, "warm_up": 30, "last_epoch": 150}
        short = {"subset_size": size, "interval": 2, "warm_up": 10, "last_epoch": 35}
        presets[f"paper-200-{size}"] = {**long, "warm_up": paper_warm_up}
        presets[f"released-200-{size}"] = long
        presets[f"released-40-{size}"] = short
        # At eps 16 the commands leave the warm-up at its default.
        presets[f"released-40-eps16-{size}"] = {**short, "interval": 5, "warm_up": 1}
    presets["released-fine-tune"] = {"subset_size": 0.6, "interval": 1, "warm_up": 5, "last_epoch": 35}
    presets["released-tiny-imagenet"] = {"subset_size": 0.2, "interval": 10, "warm_up": 1, "last_epoch": 150}
    presets["released-transfer"] = {"subset_size": 0.2, "interval": 1, "warm_up": 1, "last_epoch": 9}
    return presets


def _published_epochs(preset: str) -> int:
    """For how many epochs of training the schedule of a preset is."""
    return 200 if "-200-" in preset or preset == "released-tiny-imagenet" else 40


@final
@register(
    name="epic",
    title="EPIC",
    summary="Every few epochs drops the examples that are alone in gradient space.",
    paper="Yang, Liu and Mirzasoleiman, ICML 2022, arXiv 2210.09671",
    cost="a round: one forward pass and, at 50,000 examples of 10 classes, seconds of clustering",
    presets=(
        "default",
        "paper-200-0.1",
        "released-200-0.1",
        "released-40-0.1",
        "released-40-eps16-0.1",
        "paper-200-0.2",
        "released-200-0.2",
        "released-40-0.2",
        "released-40-eps16-0.2",
        "paper-200-0.3",
        "released-200-0.3",
        "released-40-0.3",
        "released-40-eps16-0.3",
        "released-fine-tune",
        "released-tiny-imagenet",
        "released-transfer",
    ),
    drops_examples=True,
)
@dataclass(frozen=True, kw_only=True)
class EPIC(DroppingDefense):
    """Effective poison identification.

    Arguments:
        subset_size: medoids as a share of the examples, in (0, 1). More medoids leave more of them alone, so
            a larger share is a stronger and dearer defense.
        interval: epochs from round to round, 1 or more; rounds are at its multiples.
        warm_up: the first epoch that may have a round.
        last_epoch: the last epoch that may have a round; None is the recipe's last milestone, or three
            quarters of the epochs where it has none. Outside of `train` None is no end.
        cluster_threshold: clusters of at most so many examples are dropped.
        kernel: of the clustering: "exponential" as published; "distance" spares the exponential, to which it
            is equal to first order.
        bias_left_out: take the logits without the bias of the classifier, as the released code does unless it
            is told that the attack is a backdoor. A loop of your own gives the logits that it likes.
        cluster_everything: cluster all examples in every round, as the released code does; otherwise only
            those that are alive, with as many medoids as their number calls for. That erodes the set from
            round to round and drops several times as much.
        cumulative: what is dropped stays out; otherwise each round decides anew.
        memory: bytes that the matrix of a class may take; larger classes take longer.
        seed: of the rounding of the numbers of medoids.

    Raises:
        InputError: a value is out of its range.

    >>> from unpoison import defenses
    >>> defense = defenses.get("epic", preset="released-40-0.1")
    >>> [epoch for epoch in range(40) if defense.is_round(epoch)]
    [10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34]
    """

    PRESETS: ClassVar[Presets] = _published_settings()

    subset_size: float = 0.1
    interval: int = 10
    warm_up: int = 30
    last_epoch: int | None = None
    cluster_threshold: int = 1
    kernel: Kernel = "exponential"
    bias_left_out: bool = True
    cluster_everything: bool = True
    cumulative: bool = True
    memory: int = field(default=MEMORY, repr=False)
    seed: int = 0
    _drops: Drops = field(default_factory=Drops, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_subset_size(self.subset_size)
        if self.kernel not in KERNELS:
            raise InputError(f"epic: kernel must be one of {', '.join(KERNELS)}, found {self.kernel!r}")
        check_schedule("epic", self.interval, self.warm_up, self.last_epoch)
        for name, least in (("cluster_threshold", 0), ("memory", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"epic: {name} must be a whole number, {least} or more, found {value!r}")

    @classmethod
    def for_recipe(cls, recipe: Recipe, *, preset: str = "released-40-0.1", **changes: Any) -> EPIC:
        """The preset's schedule, stretched or shrunk to the epochs of `recipe`.

        Rounds end with the recipe's last milestone, as the released code has it; where it has none, where the
        preset's would.

        >>> defense = EPIC.for_recipe(Recipe(epochs=20, schedule="cosine"), preset="released-40-0.2")
        >>> defense.interval, defense.warm_up, defense.last_epoch
        (1, 5, 18)
        """
        if preset not in cls.PRESETS:
            raise InputError(f"epic: there is no preset {preset!r}; {nearest(preset, cls.PRESETS)}")
        published = cls(**cls.PRESETS[preset])
        scale = recipe.epochs / _published_epochs(preset)
        assert published.last_epoch is not None
        schedule: dict[str, Any] = {
            "interval": max(1, round(published.interval * scale)),
            "warm_up": max(1, round(published.warm_up * scale)),
            "last_epoch": recipe.milestones[-1] if recipe.milestones else round(published.last_epoch * scale),
        }
        return replace(published, **{**schedule, **changes})

    def _is_round(self, epoch: int, recipe: Recipe | None) -> bool:
        return on_schedule(epoch, self.interval, self.warm_up, self.last_epoch, recipe)

    def _look(self, model: nn.Module, training_set: TrainingSet) -> Tensor:
        return training_logits(model, training_set, without_bias=self.bias_left_out)

    def _out(
        self, epoch: int, logits: Tensor | None, labels: Tensor, included: Tensor, alive: Tensor
    ) -> Tensor:
        assert logits is not None
        lonely = isolated(
            logits,
            labels,
            subset_size=self.subset_size,
            cluster_threshold=self.cluster_threshold,
            kernel=self.kernel,
            among=included if self.cluster_everything else alive,
            memory=self.memory,
            seed=self._seed(self.seed, epoch),
        )
        return lonely | (included & ~alive) if self.cumulative else lonely


def isolated(
    logits: Tensor,
    labels: Tensor,
    *,
    subset_size: float = 0.1,
    cluster_threshold: int = 1,
    kernel: Kernel = "exponential",
    among: Tensor | None = None,
    memory: int = MEMORY,
    seed: int = 0,
) -> Tensor:
    """Bool[n]: the examples that EPIC would drop now, being alone in their cluster of gradients.

    Arguments:
        logits: Float[n classes], of all examples, in eval mode and without augmentation; on any device.
        labels: Int64[n], as trained on.
        subset_size: medoids as a share of the examples, in (0, 1).
        cluster_threshold: clusters of at most so many examples count as alone.
        kernel: "exponential" as published, or "distance".
        among: Bool[n], the examples to cluster; None is all. The others are not alone.
        memory: bytes that the matrix of a class may take.
        seed: of the rounding of the numbers of medoids.

    Raises:
        InputError: the shapes do not fit, logits are not finite, or a value is out of its range.

    >>> logits = torch.tensor([[9.0, 0.0]] * 5 + [[0.0, 9.0]] + [[0.0, 8.0]] * 4)
    >>> isolated(logits, torch.tensor([0] * 6 + [1] * 4), subset_size=0.4).nonzero().flatten().tolist()
    [5]
    """
    _check_subset_size(subset_size)
    gradients = logit_gradients(logits, labels)
    if among is None:
        among = torch.ones_like(labels, dtype=torch.bool)
    elif among.dtype != torch.bool or among.shape != labels.shape:
        raise InputError(
            f"among: expected bool [{len(labels)}], found {among.dtype} of shape {tuple(among.shape)}"
        )
    counts = torch.bincount(labels[among], minlength=logits.shape[1]).tolist()
    alone = torch.zeros_like(among)
    workspace = Workspace()
    for label, medoids in enumerate(quotas(counts, subset_size, seed=seed)):
        if 0 < medoids < counts[label]:
            members = ((labels == label) & among).nonzero().squeeze(1)
            clusters = greedy_medoids(
                gradients[members], medoids, kernel=kernel, memory=memory, workspace=workspace
            )
            alone[members] = clusters.size_of_each <= cluster_threshold
    return alone


def quotas(counts: list[int], subset_size: float, *, seed: int) -> list[int]:
    """How many medoids each class has.

    Its share rounded up, less one in classes drawn at random until the sum is the share of the whole set,
    rounded down.

    >>> quotas([5000, 5000], 0.1, seed=0), sum(quotas([10, 7, 1], 0.3, seed=0))
    ([500, 500], 5)
    """
    total = sum(counts)
    budget = int(subset_size * total)
    shares = [-(-count * budget // total) if total else 0 for count in counts]
    drawn = torch.randperm(len(counts), generator=generator(seed, "quotas")).tolist()
    for label in [label for label in drawn if shares[label]][: sum(shares) - budget]:
        shares[label] -= 1
    return shares


def _check_subset_size(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise InputError(f"epic: subset_size must be a number above 0 and below 1, found {value!r}")
