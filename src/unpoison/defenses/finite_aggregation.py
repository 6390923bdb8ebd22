"""Finite Aggregation: as Deep Partition Aggregation, with smaller parts that several networks learn from.

Wang, Levine and Feizi 2022, "Improved Certified Defenses against Data Poisoning with (Deterministic) Finite
Aggregation" (ICML, arXiv 2202.02628). The set is split by a hash into `partitions` times `spread` parts, and
there are as many networks. Part i is given to the networks i + r, modulo their number, for `spread` fixed
offsets r, so that each network learns from as many examples as with `partitions` parts in DPA. A changed
example changes `spread` votes of `spread` times as many, but rarely all of them for the worse, so that the
certificates are larger than DPA's. With a spread of 1 it is DPA.

The presets are of the paper's settings for CIFAR-10 and MNIST.

Cost: `spread` trainings in all. Memory: `partitions` times `spread` networks.

Limits: as for DPA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, final

import torch

from unpoison._option_checks import PositiveInt
from unpoison._seeds import generator
from unpoison.data import TrainingSet
from unpoison.defenses._methods import register
from unpoison.registry import Presets
from unpoison.training import Defense, Partition


@final
@register(
    name="finite-aggregation",
    title="Finite Aggregation",
    summary="Has networks on overlapping unions of small parts vote, with larger certificates than DPA.",
    paper="Wang et al. 2022, arXiv 2202.02628",
    cost="as many trainings as the spread; partitions times spread networks in memory",
    presets=("default", "cifar10-50-16", "cifar10-250-8", "mnist-1200-16"),
    certifies=True,
)
@dataclass(frozen=True, kw_only=True)
class FiniteAggregation(Defense):
    """A vote of networks on overlapping unions of parts.

    Arguments:
        partitions: k: a network learns from one in so many examples, 2 or more.
        spread: d, how many networks learn from each part, 1 or more.
        workers: how many networks are trained at a time, in processes of one thread each; 1 or more.
    """

    PRESETS: ClassVar[Presets] = {
        "default": {},
        "cifar10-50-16": {"partitions": 50, "spread": 16},
        "cifar10-250-8": {"partitions": 250, "spread": 8},
        "mnist-1200-16": {"partitions": 1200, "spread": 16},
    }

    partitions: Annotated[int, "[2, inf)"] = 10
    spread: PositiveInt = 2
    workers: PositiveInt = field(default=1, repr=False)

    def partition(self, training_set: TrainingSet) -> Partition:
        """Each part for `spread` networks; the offsets depend on the options alone."""
        count = self.partitions * self.spread
        draw = generator(0, "finite aggregation", self.partitions, self.spread)
        offsets = torch.randperm(count, generator=draw)[: self.spread]
        uses = (torch.arange(count)[:, None] - offsets) % count
        return Partition.by_content(training_set, uses, workers=self.workers)
