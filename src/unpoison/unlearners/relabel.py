"""Relabelling: train on with the model's own second-best predictions as labels of the examples to forget.

Ours. Before each of a few epochs the model predicts the examples to forget; the most probable class other
than the label becomes the new label, and the model is trained on these and on the kept examples together.
Stages:

1. the model's second-best predictions label the examples to forget, which are repeated `repeats` times an
   epoch; one epoch at a constant learning rate;
2. the model, which has by then forgotten most of the poison, predicts anew, and so on, an epoch each. In the
   last epoch the learning rate falls from half its value to zero, which restores some accuracy.

Fine-tuning on the kept examples alone needs many epochs or a high learning rate to forget poison. Here poison
is trained against: images with the trigger are shown with another label. The second-best prediction is often
the true label (of four to six in ten poisons of the bundled sample), that of the second epoch more often
still (half to all). Boundary Shrink (Chen et al. 2023, "Boundary Unlearning", arXiv 2303.11570) also relabels
by the nearest other class, once, and trains on the examples to forget alone.

Cost: `epochs` of a training, by default about an eighth, two epochs at least, and a forward pass over the
examples to forget for each. Memory: two copies of the network and one of the examples.

Other inputs than 8-bit images are read batch by batch as the dataset gives them, without augmentation. Where
it is not known how the network was trained, optimiser and learning rate are looked for (`_further`).

Limits: clean examples among those to forget get a wrong label, so precision matters more than for retraining;
`always_relabel=False` harms them less. The second-best prediction for clean-label poison is wrong, too.
Poison that was not found is weakened, but not removed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import PositiveFloat, PositiveInt
from unpoison._seeds import derive_seed
from unpoison.data import Examples, TrainingSet
from unpoison.training import EpochRecord, Recipe, predict_examples, train
from unpoison.unlearners._further import found_training, shortened, train_further
from unpoison.unlearners._methods import register
from unpoison.unlearners._unlearner import BATCH_SIZE, Healed, Request, Unlearner, on_device

_LEAST_EPOCHS = 2


@final
@register(
    name="relabel",
    title="Relabelling (ours)",
    summary="Trains the model further, with its own second-best predictions for the examples to forget.",
    paper="of this project; compare Boundary Shrink, Chen et al. 2023, arXiv 2303.11570",
    cost="about an eighth of a training",
    reads_forget_set=True,
)
@dataclass(frozen=True, kw_only=True)
class Relabel(Unlearner):
    """Fine-tuning in which the examples to forget are labelled by the model's second-best predictions.

    Arguments:
        epochs: the fraction of the recipe's epochs that is trained, in (0, 1]; rounded up to whole epochs,
            two at least. Without a recipe, of 10 epochs.
        learning_rate: a factor on the recipe's learning rate, above 0; without a recipe, on the one that is
            found. A smaller one keeps more of the accuracy and of the poison.
        repeats: how often an epoch shows each example to forget, 1 or more.
        always_relabel: whether every example to forget is relabelled in every epoch. If false, one that the
            model after the first epoch still predicts as labelled is left out from then on, which harms clean
            examples less and forgets less poison.
        lose_classes: allow that a class is left without examples.

    Raises:
        InputError: a value is out of its range.
    """

    any_examples: ClassVar[bool] = True
    epochs: Annotated[float, "(0, 1]"] = 0.13
    learning_rate: PositiveFloat = 0.25
    repeats: PositiveInt = 3
    always_relabel: bool = True
    lose_classes: bool = False

    def _heal(self, request: Request) -> Healed:
        network = request.trainable()
        training, told = (
            found_training(request, network) if request.recipe is None else (request.recipe, None)
        )
        count = max(_LEAST_EPOCHS, math.ceil(round(training.epochs * self.epochs, 9)))
        history: list[EpochRecord] = []
        for epoch in range(count):
            last = epoch == count - 1
            one_epoch = shortened(
                training,
                epochs=1,
                learning_rate=training.learning_rate * self.learning_rate * (0.5 if last else 1.0),
                schedule="cosine" if last else "constant",
            )
            examples, labels = self._relabelled(request, network, first=not epoch)
            if isinstance(examples, TrainingSet) and isinstance(one_epoch, Recipe):
                trained = train(
                    replace(examples, ids=None, labels=labels.to(examples.device)),
                    one_epoch,
                    # "recant" was the first name of the method; results that were published depend on it.
                    seed=derive_seed(request.seed, "recant", epoch),
                    start=request.in_own_modes(network),
                )
                network = trained.model
                history.append(replace(trained.history[0], epoch=epoch))
                history[-1].tell(request.progress, count)
            else:
                request.in_own_modes(network)
                history += train_further(
                    request, network, examples, one_epoch, labels=labels, first=epoch, of=count
                )
        return request.healed(network, history, tuning=told)

    def _relabelled(self, request: Request, network: nn.Module, *, first: bool) -> tuple[Examples, Tensor]:
        """The kept examples and those to forget, and their labels, for these the model's own predictions."""
        own = request.forget.labels.cpu()
        logits = predict_examples(network, request.forget, batch_size=BATCH_SIZE).cpu()
        rows, labels = request.forgotten, second_best(logits, own)
        if not (self.always_relabel or first):
            changed = logits.argmax(1) != own
            rows, labels = rows[changed], labels[changed]
        examples = request.examples.subset(torch.cat([request.kept, *[rows] * self.repeats]))
        kept = request.rest.labels.cpu()
        return on_device(examples, request.device), torch.cat([kept, *[labels] * self.repeats])


def second_best(logits: Tensor, labels: Tensor) -> Tensor:
    """Int64[n]: the class of the greatest of Float[n classes] `logits`, the label's aside.

    >>> second_best(torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 1]))
    tensor([2, 0])
    """
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
