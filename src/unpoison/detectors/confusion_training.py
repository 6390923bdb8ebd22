"""Confusion training: a network that is taught wrong labels of clean examples still fits the poison.

Qi, Xie, Wang, Wu, Mahloujifar and Mittal, "Towards a Proactive ML Approach for Detecting Backdoor Poison
Samples" (USENIX Security 2023, arXiv 2205.13616). Stages:

1. start: a network that was trained on the suspicious set;
2. confusion: steps of a batch of the suspicious set with its labels beside a batch of clean examples with
   random wrong labels, with the loss (l + (lambda - 1) l') / lambda, lambda = 20. What relates inputs to
   labels in clean examples is destroyed by the second; the trigger does not occur in it and stays related to
   its label;
3. concentration: the examples that the confused network fits best are the suspicious set of the next round:
   1/2, 1/5, 1/25, 1/50 and 1/100 of the whole in turn, so that poison becomes the majority of it;
4. decision: after the last round an example is flagged that the confused network gives its own label.

The score is the log-probability of the own label minus that of the likeliest other one; what is above 0 is
flagged. Presets: `original` takes 6,000 steps a round; `quick`, ours and the default, 200, at a higher
learning rate, and the first two concentrations. The constants of `original` are the paper's as we remember
them; in two versions of the authors' code they differ by version and round (2,000 or 6,000 steps,
lambda from 10 to 60, momentum .5 to .7, learning rate .001 to .01).

Departures: that code weights classes by their share; here they are weighted alike. The paper trains the
starting network itself, and anew on what is concentrated; the given model has been trained on the suspicious
set, so every round starts from a copy of it. Labels are drawn among the wrong ones, so that a confused
network avoids the own label of a clean example; the paper, which cannot exclude agreement by chance, clusters
what agrees once more. Without a `reference` the clean examples are drawn from the set itself, so that a small
part of the poison is confused, too.

Limits: a confused network may give all clean examples the label of one class; that class is then flagged as
a whole, below the poison.

Cost: 2 `batch_size` examples of forward and backward passes a step, and a pass over the set before the first
round and after each. Memory: a copy of the model with gradients and momentum, and the activations of a step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from unpoison._global_randomness import own_randomness
from unpoison._inputs import joined, placed
from unpoison._option_checks import PositiveFloat, PositiveInt, check_options
from unpoison._seeds import derive_seed, generator
from unpoison.data import Batch, Examples
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._search import Search, Searcher
from unpoison.detectors._trainable import finite_answers, random_order, trainable_copy
from unpoison.errors import InputError
from unpoison.influence import Parts
from unpoison.models import logits_of
from unpoison.registry import Presets
from unpoison.training import in_training_mode, training_bytes


@final
@register(
    name="confusion-training",
    title="Confusion training",
    summary="Flags examples that a network fits although it is taught wrong labels of clean ones.",
    paper="Qi et al. 2023, arXiv 2205.13616",
    cost="training a copy of the model, in rounds",
    presets=("quick", "original"),
    can_find_nothing=True,
    uses_reference=True,
)
@dataclass(frozen=True, kw_only=True)
class ConfusionTraining(Searcher):
    """Flag the examples whose labels a network keeps that is taught wrong labels.

    Arguments:
        steps: of confusion a round.
        confusion: lambda, the weight of the examples with wrong labels is 1 - 1 / lambda.
        concentrations: the shares of the set that the rounds after the first are trained on.
        learning_rate: of stochastic gradient descent.
        momentum: of it.
        batch_size: suspicious examples a step, and as many clean ones; also of a scoring pass.
    """

    PRESETS: ClassVar[Presets] = {
        "quick": {},
        "original": {
            "steps": 6000,
            "concentrations": (1 / 2, 1 / 5, 1 / 25, 1 / 50, 1 / 100),
            "learning_rate": 0.001,
        },
    }

    steps: PositiveInt = 200
    confusion: Annotated[float, "[1, inf)"] = 20.0
    concentrations: tuple[Annotated[float, "(0, 1]"], ...] = (1 / 2, 1 / 5)
    learning_rate: PositiveFloat = 0.01
    momentum: Annotated[float, "[0, 1)"] = 0.7
    batch_size: PositiveInt = 64

    def __post_init__(self) -> None:
        check_options(self.method.name, self)
        if not all(0 < share <= 1 for share in self.concentrations):
            raise InputError(f"{self.method.name}: concentrations must lie in (0, 1], {self.concentrations}")

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        copied = sum(one.nbytes for one in (*measured.model.parameters(), *measured.model.buffers()))
        step = training_bytes(measured.model, measured.activations, batch_size=2 * self.batch_size)
        return {"copy of the model": copied, **step}

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        training_set, clean = search.training_set, search.clean
        finite_answers(search.model, training_set, self.batch_size)
        if search.reference is None:
            # No more than a third, so that most of the poison is not among it.
            order = random_order(search.seed, self.method.name, "clean", count=len(training_set))
            clean = training_set.subset(order[: max(1, len(training_set) // 3)])
        rows = torch.arange(len(training_set))
        scores, rounds = torch.zeros(len(training_set), dtype=torch.float64), len(self.concentrations) + 1
        rounds_fitted, losses = torch.zeros_like(scores), torch.zeros_like(scores)
        for number, share in enumerate((1.0, *self.concentrations)):
            if number:
                count = max(2, math.ceil(share * len(training_set)))
                rows = losses.argsort(stable=True)[:count].sort().values
            network = self._confused(search, training_set.subset(rows), clean, number, rounds)
            logits = finite_answers(network, training_set, self.batch_size)
            logits = logits.double().log_softmax(1)
            own = training_set.labels.cpu()[:, None]
            losses = -logits.gather(1, own)[:, 0]
            scores = -losses - logits.scatter(1, own, -torch.inf).amax(1)
            rounds_fitted += scores > 0
            search.lap(f"round {number + 1}")
        return search.findings(
            scores=scores.clamp(-1e6, 1e6),
            threshold=0.0,
            how="a network that was taught wrong labels of clean examples still gives the own label",
            words="are fitted by a network that is taught wrong labels",
            evidence={"rounds_fitted": rounds_fitted},
        )

    def _confused(
        self, search: Search, suspicious: Examples, clean: Examples, number: int, rounds: int
    ) -> nn.Module:
        """A copy of the model, confused."""
        network = trainable_copy(search.model)
        optimizer = torch.optim.SGD(
            [one for one in network.parameters() if one.requires_grad],
            lr=self.learning_rate,
            momentum=self.momentum,
        )
        names = (self.method.name, number)
        draw = generator(search.seed, *names, "labels")
        weight = (self.confusion - 1) / self.confusion
        in_training_mode(network)
        batches = zip(
            self._batches(suspicious, search.seed, *names, "suspicious"),
            self._batches(clean, search.seed, *names, "clean"),
            strict=True,
        )
        seed = derive_seed(search.seed, *names, "network")
        with own_randomness(search.device, seed=seed, deterministic=True), torch.enable_grad():
            for step, ((inputs, labels), (others, right)) in enumerate(batches, 1):
                wrong = wrong_labels(right.cpu(), search.training_set.num_classes, draw).to(search.device)
                there = placed(joined([inputs, others]), search.device)
                logits = logits_of(network, there).float()
                cut = len(labels)
                loss = functional.cross_entropy(logits[:cut], labels.to(search.device)) * (1 - weight)
                loss = loss + weight * functional.cross_entropy(logits[cut:], wrong)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                if search.progress is not None:
                    search.progress("confusion", number * self.steps + step, rounds * self.steps)
        return network.eval()

    def _batches(self, examples: Examples, seed: int, *names: str | int) -> Iterator[Batch]:
        """As many batches as there are steps, of equal size, pass after pass."""
        size = min(self.batch_size, len(examples))
        passes = math.ceil(self.steps * size / len(examples))
        orders = [random_order(seed, *names, number, count=len(examples)) for number in range(passes)]
        order = torch.cat(orders)[: self.steps * size]
        return itertools.islice(examples.in_batches(size, order), self.steps)


def wrong_labels(labels: Tensor, classes: int, draw: torch.Generator) -> Tensor:
    """Int64[b]: a label for each of Int64[b] that is another one; each of the others is as likely.

    >>> wrong_labels(torch.tensor([0, 1]), 2, torch.Generator())
    tensor([1, 0])
    """
    return (labels + torch.randint(1, max(classes, 2), labels.shape, generator=draw)) % max(classes, 2)
