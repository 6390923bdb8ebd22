"""Recanting: the model takes back what it was told of the examples to forget, and trains on.

Ours. Before each of a few epochs the model is asked what the examples to forget would be if not what they are
labelled as; they are given those answers as labels, and the model is trained on them and on the kept examples
together. Stages:

1. the victim's second-best answers label the examples to forget, which are shown `repeats` times an epoch;
   one epoch at a constant learning rate;
2. the model, which by now has lost most of the poison, answers anew; and so on, an epoch each. In the last
   one the learning rate falls from its half to zero, which gives back some of the accuracy.

Fine-tuning lets the poison fade because nothing repeats it, which takes epochs or a high learning rate. Here
it is contradicted: an image with the trigger is shown and is not what the adversary says. The second-best
answer is often the true label (of four to six in ten poisons of the bundled sample), the second asking's more
often still (half to all), so the examples to forget also teach something. Boundary Shrink (Chen et al. 2023,
"Boundary Unlearning", arXiv 2303.11570) also relabels by the nearest other class, once, and trains on the
examples to forget alone.

Cost: `epochs` of a training, by default about an eighth, two epochs at least, and a forward pass over the
examples to forget for each. Memory: two copies of the network and one of the examples.

Limits: an innocent example among those to forget is taught wrongly, so precision matters more than for
retraining; `insist=False` is gentler. Of clean-label poison the second-best answer is wrong too. Where only a
part of the poison was found, contradicting it helps against the rest, but does not undo it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from unpoison._seeds import derive_seed
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.training import EpochRecord, Recipe, Trained, predict, train
from unpoison.unlearners._methods import register
from unpoison.unlearners._unlearner import (
    Unlearner,
    forgotten,
    healed_of,
    network_of,
    recipe_for,
    retained,
)

_LEAST_EPOCHS = 2


@final
@register(
    name="recant",
    title="Recanting (ours)",
    summary="Trains the victim on, with its own second-best answers for the examples to forget.",
    paper="of this project; compare Boundary Shrink, Chen et al. 2023, arXiv 2303.11570",
    cost="about an eighth of a training",
    reads_forget_set=True,
)
@dataclass(frozen=True, kw_only=True)
class Recant(Unlearner):
    """Fine-tuning in which the examples to forget are labelled by the model's own second-best answers.

    Arguments:
        epochs: of the recipe's epochs, the part that is trained, in (0, 1]; rounded up to whole epochs, two
            at least.
        learning_rate: what the recipe's learning rate is multiplied by, above 0. A smaller one keeps more of
            the accuracy and of the poison.
        repeats: how often an epoch shows each example to forget, 1 or more.
        insist: whether an example to forget may never keep its label. When false, one that the model after
            the first epoch still answers as labelled is left out from then on, which spares innocent
            examples and lets more of the poison live.
        lose_classes: allow that a class is left without examples.

    Raises:
        InputError: a value is out of its range.
    """

    epochs: float = 0.13
    learning_rate: float = 0.25
    repeats: int = 3
    insist: bool = True
    lose_classes: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.epochs <= 1:
            raise InputError(f"recant: epochs {self.epochs} is outside (0, 1]; it is a part of the recipe's")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"recant: learning_rate {self.learning_rate} is not above 0; it is a factor")
        if isinstance(self.repeats, bool) or not isinstance(self.repeats, int) or self.repeats < 1:
            raise InputError(f"recant: repeats must be a whole number of 1 or more, found {self.repeats!r}")

    def epochs_in(self, recipe: Recipe) -> int:
        """The part of the recipe's, two at least.

        >>> Recant().epochs_in(Recipe.preset("sample")), Recant().epochs_in(Recipe.preset("resnet18-40"))
        (2, 6)
        """
        return max(_LEAST_EPOCHS, math.ceil(round(recipe.epochs * self.epochs, 9)))

    def heal(
        self,
        model: Trained | nn.Module,
        training_set: TrainingSet,
        forget: Tensor | Sequence[int],
        *,
        recipe: Recipe | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        on_epoch: Callable[[EpochRecord], None] | None = None,
    ) -> Trained:
        """The victim, trained on; its history counts the relabelled examples too, each time they are shown.

        Raises:
            InputError: as `Unlearner.heal`.
            TrainingDivergedError: a loss is no longer finite.
        """
        started = time.perf_counter()
        rest = retained(training_set, forget, lose_classes=self.lose_classes, method="recant")
        target = training_set.device if device is None else torch.device(device)
        how = recipe_for(model, recipe)
        kept, poison = rest.to(target), forgotten(training_set, forget).to(target)
        network = copy.deepcopy(network_of(model)).to(target).requires_grad_(True)
        history: list[EpochRecord] = []

        def tell(record: EpochRecord) -> None:
            history.append(replace(record, epoch=len(history)))
            if on_epoch is not None:
                on_epoch(history[-1])

        count = self.epochs_in(how)
        for epoch in range(count):
            last = epoch == count - 1
            lesson = replace(
                how,
                epochs=1,
                learning_rate=how.learning_rate * self.learning_rate * (0.5 if last else 1.0),
                schedule="cosine" if last else "constant",
                milestones=(),
                warmup_epochs=0.0,
            )
            relabelled = self._relabelled(network, kept, poison, first=not epoch)
            own_seed = derive_seed(seed, "recant", epoch)
            network = train(relabelled, lesson, seed=own_seed, model=network, on_epoch=tell).model
        return healed_of(model, network, rest, recipe=how, seed=seed, history=history, started=started)

    def _relabelled(
        self, network: nn.Module, kept: TrainingSet, poison: TrainingSet, *, first: bool
    ) -> TrainingSet:
        """The kept examples, and those to forget with the model's own answers for labels."""
        logits = predict(network, poison.images, batch_size=128)
        images, answers = poison.images, second_best(logits, poison.labels)
        if not (self.insist or first):
            taken_back = logits.argmax(1) != poison.labels
            images, answers = images[taken_back], answers[taken_back]
        return replace(
            kept,
            images=torch.cat([kept.images, *[images] * self.repeats]),
            labels=torch.cat([kept.labels, *[answers] * self.repeats]),
        )


def second_best(logits: Tensor, labels: Tensor) -> Tensor:
    """Int64[n]: the greatest of Float[n classes] `logits` but the one at `labels`.

    >>> second_best(torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 1]))
    tensor([2, 0])
    """
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
