"""Training further where it is not known how a network was trained: an optimiser and a learning rate for it.

Nothing is taken from a recipe that was made for other data. From the kept examples a tenth of each class is
held out (1,000 examples at most). SGD with momentum and AdamW are tried with a few learning rates each, from
the largest down: a copy of the network is trained for `STEPS` steps on the rest, at a rate that falls to zero
as a cosine, in its own modes and without augmentation. The first rate is taken after which the accuracy on
the held-out examples is lower by ten points at most, where training goes on for several times as many steps
and wins it back, and by two points on sets of which an epoch is shorter than a trial. So it is the largest
rate that leaves what the network knows, since forgetting depends most on the learning rate. Of the two
optimisers that one is taken whose loss on the held-out examples is then lower.

Cost: two to 14 trials of `STEPS` steps of `BATCH_SIZE` examples, each with a forward pass over the held-out
examples. Memory: one more copy of the network, and its optimiser's state.

Limit: the network was trained on the held-out examples, so that the accuracy on them shows what training
destroys, and not how well the network does on new data.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from typing import Any, Final, Literal, final

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs
from unpoison._seeds import generator
from unpoison._stable import cross_entropy
from unpoison.data import Examples
from unpoison.errors import TrainingDivergedError
from unpoison.training import (
    EpochRecord,
    Recipe,
    batch_bounds,
    epoch_order,
    predict_examples,
    recipe_optimizer,
)
from unpoison.unlearners._student import Student
from unpoison.unlearners._unlearner import BATCH_SIZE as FORWARD_SIZE
from unpoison.unlearners._unlearner import Request
from unpoison.unlearners._validation import held_out_indices

STEPS: Final = 60
"""Steps of a trial."""
BATCH_SIZE: Final = 64
EPOCHS: Final = 10
"""What the epochs of a method are a fraction of, in place of those of a recipe."""
TOLERANCES: Final = (0.1, 0.02)
"""How much accuracy on held-out examples a trial may cost: of large sets, and of small ones."""
MOST_HELD_OUT: Final = 1000
RATES: Final = {
    "sgd": (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003),
    "adamw": (0.01, 0.003, 0.001, 0.0003, 0.0001, 0.00003, 0.00001),
}


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """How to train further, where there is no recipe: what a method reads of one.

    Arguments:
        optimizer: SGD with Nesterov momentum 0.9 and weight decay 5e-4, or AdamW with weight decay 0.01.
        learning_rate: the greatest of the schedule.
        epochs: passes over the examples.
        batch_size: examples a step.
        schedule: "constant", or "cosine" to zero.
        label_smoothing: none.
    """

    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    epochs: int = EPOCHS
    batch_size: int = BATCH_SIZE
    schedule: Literal["constant", "cosine"] = "constant"
    label_smoothing: float = 0.0

    def learning_rate_at(self, progress: float) -> float:
        """The learning rate when `progress` epochs have passed."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * progress / self.epochs)) / 2

    def made(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.01)
        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )


Training = Recipe | Found


def shortened(
    training: Training, *, epochs: int, learning_rate: float, schedule: Literal["constant", "cosine"]
) -> Training:
    """The same training with other epochs, learning rate and schedule, without warm-up and milestones."""
    if isinstance(training, Found):
        return replace(training, epochs=epochs, learning_rate=learning_rate, schedule=schedule)
    return replace(
        training,
        epochs=epochs,
        learning_rate=learning_rate,
        schedule=schedule,
        milestones=(),
        warmup_epochs=0.0,
    )


def train_further(
    request: Request,
    network: nn.Module,
    examples: Examples,
    training: Training,
    *,
    labels: Tensor | None = None,
    first: int = 0,
    of: int | None = None,
) -> list[EpochRecord]:
    """Train the network, in place and in the modes that it is in, on any examples.

    Arguments:
        request: what is healed; its progress is told of each epoch.
        network: a copy that may be changed; in eval mode afterwards.
        examples: read batch by batch; only 8-bit images are augmented, and only by a recipe.
        training: how.
        labels: Int64[n], those to train on in place of the examples' own.
        first: the number of the first epoch.
        of: how many epochs there are in all; those of `training` when None.

    Raises:
        TrainingDivergedError: the loss or a parameter is no longer finite.
    """

    def loss(inputs: Inputs, logits: Tensor, wanted: Tensor, indices: Tensor) -> Tensor:
        return cross_entropy(logits, wanted, label_smoothing=training.label_smoothing)

    student, history = Student(request, partial(made_optimizer, training), network=network), []
    every = torch.ones(len(examples), dtype=torch.bool)
    like_the_trainer = isinstance(training, Recipe) and labels is None
    for number in range(training.epochs):
        record = student.epoch(
            examples,
            loss,
            number=first + number,
            batch_size=training.batch_size,
            labels=labels,
            rate=partial(rate_between, training, number, 1),
            # With a recipe the batches are those of our trainer.
            order=epoch_order(every, seed=request.seed, epoch=number) if like_the_trainer else None,
        )
        record.tell(request.progress, of or training.epochs)
        history.append(record)
    return history


@final
@dataclass(frozen=True, kw_only=True)
class Trial:
    """An optimiser and learning rate, and the held-out accuracy and loss after it; NaN if it diverged."""

    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    accuracy: float = math.nan
    loss: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def clean_training(
    request: Request, network: nn.Module, *, epochs: int, learning_rate: float | None
) -> tuple[Training, dict[str, Any] | None]:
    """How to train on a few clean examples: as the network was trained, for so many epochs, falling to zero.

    Arguments:
        request: what is healed; without a recipe, optimiser and learning rate are looked for on its clean
            examples.
        network: in the modes to train in.
        epochs: passes over the clean examples.
        learning_rate: the greatest; that of the recipe, or the one that is found, when None.

    Returns:
        How to train, and how that was found; None with a recipe.
    """
    training, told = (
        found_training(request, network, request.clean) if request.recipe is None else (request.recipe, None)
    )
    rate = training.learning_rate if learning_rate is None else learning_rate
    changed = shortened(training, epochs=epochs, learning_rate=rate, schedule="cosine")
    return replace(changed, batch_size=min(changed.batch_size, BATCH_SIZE)), told


def made_optimizer(training: Training, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a training."""
    return (
        training.made(parameters) if isinstance(training, Found) else recipe_optimizer(parameters, training)
    )


def found_training(
    request: Request, network: nn.Module, examples: Examples | None = None
) -> tuple[Found, dict[str, Any]]:
    """An optimiser and a learning rate for the network; see the module's docstring.

    Arguments:
        request: what is healed; the examples to forget are not read.
        network: in the modes to train in; what is frozen stays frozen. Not changed.
        examples: to look on; the kept examples when None.

    Returns:
        How to train, with a constant learning rate, and how that was found, as JSON values.
    """
    started = time.perf_counter()
    known = request.rest if examples is None else examples
    learn, out = held_out_indices(known, seed=request.seed, least=1)
    out = _some(out, MOST_HELD_OUT, request)
    learn = _some(learn if len(learn) else out, STEPS * BATCH_SIZE, request)
    validation, some = known.subset(out), known.subset(learn)
    tolerance = TOLERANCES[len(known) < STEPS * BATCH_SIZE]
    before, _ = _judged(network, validation)
    enough = before - tolerance
    trials: list[Trial] = []
    total = sum(map(len, RATES.values()))
    for optimizer in RATES:
        for rate in RATES[optimizer]:
            training = Found(optimizer=optimizer, learning_rate=rate)  # type: ignore[arg-type]
            trials.append(_tried(request, network, training, some, validation))
            if request.progress is not None:
                request.progress("learning rates", len(trials), total)
            if isfinite(trials[-1].loss) and trials[-1].accuracy >= enough:
                break
    finished = [one for one in trials if isfinite(one.loss)]
    if not finished:
        raise TrainingDivergedError(
            f"{request.method}: training diverges at every learning rate that was tried, down to "
            f"{min(one.learning_rate for one in trials):g}; give recipe=, by which the network was trained"
        )
    kept = [one for one in finished if one.accuracy >= enough]
    best = min(kept or finished, key=lambda one: one.loss if kept else -one.accuracy)
    chosen = Found(optimizer=best.optimizer, learning_rate=best.learning_rate)
    told = {
        "optimizer": chosen.optimizer,
        "learning_rate": chosen.learning_rate,
        "batch_size": chosen.batch_size,
        "of_epochs": chosen.epochs,
        "held_out": len(validation),
        "accuracy_before": before,
        "tolerance": tolerance,
        "steps": STEPS,
        "trials": [one.to_dict() for one in trials],
        "seconds": time.perf_counter() - started,
    }
    return chosen, told


def _some(indices: Tensor, most: int, request: Request) -> Tensor:
    draw = torch.randperm(len(indices), generator=generator(request.seed, "unlearners", "learning rates"))
    return indices[draw[:most].sort().values]


def _tried(
    request: Request, network: nn.Module, training: Found, some: Examples, validation: Examples
) -> Trial:
    """The held-out accuracy and loss of a copy of the network after `STEPS` steps."""

    def loss(inputs: Inputs, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    student = Student(request, training.made, steps=STEPS, network=copy.deepcopy(network))
    trial = Trial(optimizer=training.optimizer, learning_rate=training.learning_rate)
    number, done, a_pass = 0, 0, len(batch_bounds(len(some), training.batch_size))
    falling = replace(training, epochs=STEPS, schedule="cosine")  # a step in place of an epoch
    try:
        while student.steps_left:
            steps = min(a_pass, student.steps_left)
            student.epoch(
                some,
                loss,
                number=number,
                batch_size=training.batch_size,
                part="trial",
                rate=partial(rate_between, falling, done, steps),
            )
            number, done = number + 1, done + steps
    except TrainingDivergedError:
        return trial
    accuracy, value = _judged(student.network, validation)
    return replace(trial, accuracy=accuracy, loss=value) if isfinite(value) else trial


def rate_between(training: Training, done: int, units: int, passed: float) -> float:
    """The learning rate when a fraction of so many epochs has passed after those that are done."""
    return training.learning_rate_at(done + passed * units)


def _judged(network: nn.Module, validation: Examples) -> tuple[float, float]:
    logits = predict_examples(network, validation, batch_size=FORWARD_SIZE)
    right = int((logits.argmax(1) == validation.labels).sum())
    return right / len(validation), float(cross_entropy(logits, validation.labels))
