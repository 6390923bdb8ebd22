"""EPIC: every few epochs, drop the examples that are isolated in gradient space.

Yang, Liu and Mirzasoleiman, "Not All Poisons are Created Equal: Robust Training against Data Poisoning"
(ICML 2022, arXiv 2210.09671). Under a bounded perturbation only some poisons are effective; their gradients
move away from those of their class during training and become isolated. Stages of a round:

I    gradients  of the loss in the logits, `softmax(z) - onehot(y)`, for all examples, in eval mode and
                without augmentation.
II   medoids    in each class, by greedy facility location with the similarity `exp(-distance / classes)`.
III  drop       the medoids that are alone in their cluster, for the rest of the training.

Cost of a round at 50,000 examples of 10 classes: a forward pass and some seconds on two cores. Memory: the
matrix of one class, 4 n^2 bytes, 100 MB for 5,000 examples, bounded by `memory`.

The released code differs from the paper, and there are presets of both: `released-*` are its example commands
(warm-up 30 of 200 epochs for every subset size), `paper-*` the paper's text (10, 20, 30 for subset sizes 0.1,
0.2, 0.3). Both leave the bias of the classifier out of the logits and cluster all examples, including those
dropped before. Departures:

- Clusters of classes with different numbers of medoids are kept apart. The released code offsets cluster
  numbers wrongly there, and drops wrong examples unless all classes have equally many.
- A class in which every example would be a medoid (a tiny class, or a subset size near 1) is not clustered.
- Softmax and distances are computed in float64; the label's entry of a gradient is minus the sum of the
  others; ties go to the lower index.

Limits: isolated examples are dropped whether or not they are poisons, so rare and hard clean examples go
first, and small training sets lose accuracy; two poisons with similar gradients are not isolated and stay.
Compare `KNNOutlierFilter`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import NonNegativeInt, PositiveInt
from unpoison._seeds import generator
from unpoison.data import TrainingSet
from unpoison.defenses._dropping import DroppingDefense, Drops, on_schedule
from unpoison.defenses._facility_location import MEMORY, Kernel, Workspace, greedy_medoids
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
    """The length of the training that a preset's schedule is for."""
    return 200 if "-200-" in preset or preset == "released-tiny-imagenet" else 40


@final
@register(
    name="epic",
    title="EPIC",
    summary="Every few epochs drops the examples that are isolated in gradient space.",
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
        subset_size: medoids as a share of the examples, in (0, 1). With more medoids more clusters have one
            member, so a larger share drops more examples, at a higher cost.
        interval: epochs from round to round, 1 or more; rounds are at its multiples.
        warm_up: the first epoch that may have a round.
        last_epoch: the last epoch that may have a round; None is the recipe's last milestone, or three
            quarters of the epochs. Outside of `train` None is no limit.
        cluster_threshold: clusters of at most so many examples are dropped.
        kernel: of the clustering: "exponential" as published, or "distance", which equals it to first order
            and costs less.
        bias_left_out: compute logits without the bias of the classifier, as the released code does except for
            backdoors. Does not apply to `select`, which is given logits.
        cluster_everything: cluster all examples in every round, as the released code does; otherwise only
            those that are alive, with medoids in proportion. That drops several times as many over the
            rounds.
        cumulative: dropped examples stay dropped; otherwise each round decides anew.
        memory: bytes that the matrix of a class may take; larger classes take longer.

    Raises:
        InputError: a value is out of its range.

    >>> from unpoison import defenses
    >>> defense = defenses.get("epic", preset="released-40-0.1")
    >>> [epoch for epoch in range(40) if defense.is_round(epoch)]
    [10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34]
    """

    PRESETS: ClassVar[Presets] = _published_settings()

    subset_size: Annotated[float, "(0, 1)"] = 0.1
    interval: PositiveInt = 10
    warm_up: NonNegativeInt = 30
    last_epoch: NonNegativeInt | None = None
    cluster_threshold: NonNegativeInt = 1
    kernel: Kernel = "exponential"
    bias_left_out: bool = True
    cluster_everything: bool = True
    cumulative: bool = True
    memory: NonNegativeInt = field(default=MEMORY, repr=False)
    _drops: Drops = field(default_factory=Drops, init=False, repr=False, compare=False)

    @classmethod
    def for_recipe(cls, recipe: Recipe, *, preset: str = "released-40-0.1", **changes: Any) -> EPIC:
        """The preset's schedule, scaled to the epochs of `recipe`.

        The last round is at the recipe's last milestone, as in the released code; without milestones, where
        the scaled schedule ends.

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
        found = isolated(
            logits,
            labels,
            subset_size=self.subset_size,
            cluster_threshold=self.cluster_threshold,
            kernel=self.kernel,
            among=included if self.cluster_everything else alive,
            memory=self.memory,
            seed=self._round_seed(epoch),
        )
        return found | (included & ~alive) if self.cumulative else found


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
    """Bool[n]: the examples that EPIC would drop now, since their cluster of gradients is too small.

    Arguments:
        logits: Float[n classes], of all examples, in eval mode and without augmentation; on any device.
        labels: Int64[n], as trained on.
        subset_size: medoids as a share of the examples, in (0, 1).
        cluster_threshold: clusters of at most so many examples are isolated.
        kernel: "exponential" as published, or "distance".
        among: Bool[n], the examples to cluster; None is all. The others are not isolated.
        memory: bytes that the matrix of a class may take.
        seed: of the rounding of the numbers of medoids.

    Raises:
        InputError: the shapes do not fit, logits are not finite, or a value is out of its range.

    >>> logits = torch.tensor([[9.0, 0.0]] * 5 + [[0.0, 9.0]] + [[0.0, 8.0]] * 4)
    >>> isolated(logits, torch.tensor([0] * 6 + [1] * 4), subset_size=0.4).nonzero().flatten().tolist()
    [5]
    """
    if not 0 < subset_size < 1:
        raise InputError(f"isolated: subset_size must be a number in (0, 1), found {subset_size!r}")
    gradients = logit_gradients(logits, labels)
    if among is None:
        among = torch.ones_like(labels, dtype=torch.bool)
    elif among.dtype != torch.bool or among.shape != labels.shape:
        raise InputError(
            f"among: expected bool [{len(labels)}], found {among.dtype} of shape {tuple(among.shape)}"
        )
    counts = torch.bincount(labels[among], minlength=logits.shape[1]).tolist()
    found = torch.zeros_like(among)
    workspace = Workspace()
    for label, medoids in enumerate(quotas(counts, subset_size, seed=seed)):
        if 0 < medoids < counts[label]:
            members = ((labels == label) & among).nonzero().squeeze(1)
            clusters = greedy_medoids(
                gradients[members], medoids, kernel=kernel, memory=memory, workspace=workspace
            )
            found[members] = clusters.size_of_each <= cluster_threshold
    return found


def quotas(counts: list[int], subset_size: float, *, seed: int) -> list[int]:
    """The number of medoids of each class.

    Its share rounded up, minus one in randomly drawn classes until the sum is the share of the whole set,
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
