"""Deep Partition Aggregation: networks trained on disjoint parts vote, and each prediction has a certificate.

Levine and Feizi 2021, "Deep Partition Aggregation: Provable Defense against General Poisoning Attacks" (ICLR,
arXiv 2006.14768). A hash of its image puts each example into one of `partitions` parts; a network is trained
on each; the class with the most votes is predicted, the lower one of equals. An attacker who inserts or
removes one example, or changes its label, changes one vote, so that the winner stays for as many such changes
as half its lead. `unpoison.training.certify` gives that number for each prediction.

The presets are the paper's for CIFAR-10 and MNIST. More parts certify against more changes, at the cost of
accuracy, since each network learns from less.

Cost: one training in all, shared by `workers`. Memory: `partitions` networks, and a training for each worker.

Limits: a part needs enough examples for a network to learn anything; on small sets the clean accuracy falls
first. What is certified is the prediction, right or wrong, against changes of the training set alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, final

import torch

from unpoison._option_checks import PositiveInt
from unpoison.data import TrainingSet
from unpoison.defenses._methods import register
from unpoison.registry import Presets
from unpoison.training import Defense, Partition


@final
@register(
    name="dpa",
    title="Deep Partition Aggregation (DPA)",
    summary="Trains a network on each of many parts of the set; they vote, and each prediction is certified.",
    paper="Levine and Feizi 2021, arXiv 2006.14768",
    cost="one training in all; as many networks in memory as parts",
    presets=("default", "cifar10-50", "cifar10-250", "cifar10-1000", "mnist-1200"),
    certifies=True,
)
@dataclass(frozen=True, kw_only=True)
class DPA(Defense):
    """A vote of networks on disjoint parts.

    Arguments:
        partitions: how many parts, and networks, 2 or more.
        workers: how many networks are trained at a time, in processes of one thread each; 1 or more.

    >>> from unpoison import defenses
    >>> defenses.get("dpa", preset="cifar10-50").partitions
    50
    """

    PRESETS: ClassVar[Presets] = {
        "default": {},
        "cifar10-50": {"partitions": 50},
        "cifar10-250": {"partitions": 250},
        "cifar10-1000": {"partitions": 1000},
        "mnist-1200": {"partitions": 1200},
    }

    partitions: Annotated[int, "[2, inf)"] = 10
    workers: PositiveInt = field(default=1, repr=False)

    def partition(self, training_set: TrainingSet) -> Partition:
        """Each part for one network."""
        return Partition.by_content(
            training_set, torch.arange(self.partitions)[:, None], workers=self.workers
        )
