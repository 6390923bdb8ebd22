"""Algorithm 1 of MetaPoison (Huang et al. 2020, arXiv 2004.00225).

    paper                                                          here
    stagger the M networks: train network m to epoch floor(m T/M)  `stagger` (surrogates.py)
    insert the poisons X_p into the training set                   `Poisons`
    for each of C craft steps:                                     `craft_poisons`
        for each of the M networks:                                `_craft_epoch`
            copy its parameters, take K unrolled SGD steps with    `LookAheads.run`, which calls
            the poisons in the first, store the adversarial loss   `look_ahead` (look_ahead.py)
            train it one epoch; past epoch T, reinitialise it      `SurrogateStack` (surrogates.py)
        average the adversarial losses over the networks           `Poisons.update`
        gradient in X_p, step of Adam, projection                  `Poisons.update`, `OuterOptimizer`
    return X_p                                                     `Poisons.poison_set`, as 8-bit images

Every poison has one gradient for each network and craft step, at the parameters that the network has when its
batch comes up. The gradient in the pixels is accumulated over all look-aheads, and then taken back to the
variables of the perturbation in one pass.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor

from unpoison._checkpoints import Checkpoint, Checkpoints
from unpoison._global_randomness import own_randomness
from unpoison.attacks._attack import CraftRequest
from unpoison.attacks.metapoison.checkpoints import checkpoints_of
from unpoison.attacks.metapoison.look_ahead import look_ahead
from unpoison.attacks.metapoison.surrogates import (
    Epoch,
    SurrogateConfiguration,
    SurrogateStack,
    stacks_of,
    stagger,
)
from unpoison.errors import TrainingDivergedError
from unpoison.threats import PoisonSet, find_class

if TYPE_CHECKING:
    from unpoison.attacks.metapoison.attack import MetaPoison


def craft_poisons(options: MetaPoison, requests: Sequence[CraftRequest]) -> list[PoisonSet]:
    """Craft the poisons of several goals on one ensemble; the requests differ in their goals alone."""
    request = requests[0]
    configuration = SurrogateConfiguration(
        training_set=request.training_set,
        templates=request.surrogates,
        recipe=options.recipe,
        lifetime=options.lifetime,
        pretrained=options.start == "pretrained",
        seed=request.seed,
    )
    poisons = [Poisons(options, each) for each in requests]
    store = checkpoints_of(requests)
    stacks, done = _begin(options, configuration, poisons, store, request)
    for step in range(done, options.steps):
        active = [each for each in poisons if not each.converged]
        if not active:
            break
        with _seeded(request, f"step {step}"), torch.enable_grad():
            for each in active:
                each.begin_step()
            for stack in stacks:
                _craft_epoch(options, stack, active)
            for each in active:
                each.update(step)
        if store is not None:
            store.write(_checkpoint(step + 1, stacks, poisons))
        latest = [each.history[-1] for each in poisons]
        request.report(
            step + 1,
            options.steps,
            loss=fmean(_mean_loss(entry) for entry in latest),
            achieved=fmean(entry["achieved"] for entry in latest),
        )
    return [each.poison_set() for each in poisons]


def _craft_epoch(options: MetaPoison, stack: SurrogateStack, poisons: Sequence[Poisons]) -> None:
    """One epoch of a stack: look ahead at every batch with poisons, then take the ordinary training step."""
    epoch = Epoch(stack)
    looks = [LookAheads(each, stack, epoch) for each in poisons]
    for batch in range(len(epoch)):
        for look in looks:
            look.run(batch)
        poisoned = looks[0].poisons_in(batch) if options.trajectory == "poisoned" else None
        stack.train_step(epoch, batch, poisoned)
    for look in looks:
        look.finish()
    stack.count_epoch()
    stack.restart_expired()


@final
class Poisons:
    """The poisons of one goal while they are crafted.

    Arguments:
        options: of the attack.
        request: the goal, the training set, the budget and the seed.
    """

    def __init__(self, options: MetaPoison, request: CraftRequest) -> None:
        self.options, self.request, self.goal = options, request, request.goal
        training_set, device = request.training_set, request.training_set.device
        self.indices = _chosen(options, request)
        clean = training_set.subset(self.indices)
        self.labels, self.images = clean.labels, clean.images
        targets = self.goal.victims(training_set)[0].to(device)
        self.targets = targets.float() / 255
        if options.watermark:
            over = targets[torch.arange(len(self.images), device=device) % len(targets)].float()
            self.images = self.images.float().lerp(over, options.watermark).round().to(torch.uint8)
        # For each training example its place among the poisons, or -1.
        self.place_of = torch.full((len(training_set),), -1)
        self.place_of[self.indices] = torch.arange(len(self.indices))
        start = request.generator("start")
        self.variables = options.perturbation.initial(self.images, generator=start)
        self.optimizer = OuterOptimizer(options.optimizer, options.perturbation.scales())
        # For each craft step, before it moved the poisons: the adversarial loss of each surrogate and the
        # share of look-aheads after which the targets were predicted as wanted, both over the step's
        # look-aheads.
        self.history: list[dict[str, Any]] = []
        self.begin_step()

    def begin_step(self) -> None:
        """Begin a craft step: the pixels that the surrogates see, and an empty gradient."""
        with torch.no_grad():
            self.pixels = self.options.perturbation.apply(self.images, self.variables)
        self.gradient = torch.zeros_like(self.pixels)
        self.losses: list[Tensor] = []
        self.achieved: list[Tensor] = []

    def update(self, step: int) -> None:
        """Average over the ensemble, take a step of the outer optimiser, project."""
        losses = torch.cat(self.losses).tolist()
        if not all(map(math.isfinite, losses)):
            worst = next(number for number, loss in enumerate(losses) if not math.isfinite(loss))
            raise TrainingDivergedError(
                f"metapoison: the adversarial loss of surrogate {worst} is not finite at step {step}; lower "
                f"the recipe's learning rate ({self.options.recipe.learning_rate:g}) or warm up longer"
            )
        perturbation, rate = self.options.perturbation, self.options.rate_at(step)
        leaves = {name: value.detach().requires_grad_() for name, value in self.variables.items()}
        pixels = perturbation.apply(self.images, leaves)
        # The gradient in the variables is linear in that in the pixels, so one pass suffices.
        total = (pixels * (self.gradient / self.options.surrogates)).sum() + perturbation.penalty(
            leaves
        ).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()))
        moved = self.optimizer.step(self.variables, dict(zip(leaves, gradients, strict=True)), rate)
        self.variables = perturbation.project(moved, self.images)
        achieved = float(torch.cat(self.achieved).mean())
        self.history.append({"step": step, "losses": losses, "achieved": achieved, "rate": rate})

    @property
    def converged(self) -> bool:
        """Whether the mean loss of the last `patience` steps is not below that of as many before."""
        span = self.options.patience
        if not span or len(self.history) < 2 * span:
            return False
        losses = list(map(_mean_loss, self.history))
        return sum(losses[-span:]) >= sum(losses[-2 * span : -span])

    def poison_set(self) -> PoisonSet:
        """The poisons as 8-bit images."""
        return self.request.poison_set(
            indices=self.indices,
            images=self.options.perturbation.rounded(self.images, self.variables),
            labels=self.labels,
            history=self.history,
        )

    def state(self, place: int) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps."""
        variables = {f"poison.{place}.variable.{name}": value for name, value in self.variables.items()}
        moments = {
            f"poison.{place}.optimizer.{name}": value for name, value in self.optimizer.tensors.items()
        }
        return variables | moments

    def restore(self, place: int, checkpoint: Checkpoint) -> None:
        """Take over the state and the history that a checkpoint keeps."""
        device = self.images.device
        variables = checkpoint.group(f"poison.{place}.variable.")
        moments = checkpoint.group(f"poison.{place}.optimizer.")
        self.variables = {name: value.to(device) for name, value in variables.items()}
        self.optimizer.tensors = {name: value.to(device) for name, value in moments.items()}
        self.history = list(checkpoint.notes["history"][place])
        self.optimizer.steps = len(self.history)


@final
class LookAheads:
    """The look-aheads of one stack in one epoch, for the poisons of one goal."""

    def __init__(self, poisons: Poisons, stack: SurrogateStack, epoch: Epoch) -> None:
        self.poisons, self.stack, self.epoch = poisons, stack, epoch
        self.options = poisons.options
        self.draws = epoch.draws("augmentation of looks ahead")
        self.losses: list[Tensor] = []
        self.achieved: list[Tensor] = []
        self.gathered = self._gathered() if self.options.poisons_per_batch else {}

    def run(self, batch: int) -> None:
        """Look ahead from `batch`, if it has poisons, and add their gradients to those of the craft step."""
        poisons, epoch, unroll = self.poisons, self.epoch, self.options.unroll
        placed = self.gathered.get(batch, []) if self.options.poisons_per_batch else self._random(batch)
        for rows, places, members in placed:
            ids = members.to(poisons.pixels.device)
            pixels = poisons.pixels[ids].requires_grad_()
            following = [epoch.rows[(batch + ahead) % len(epoch)] for ahead in range(1, unroll + 1)]
            found = look_ahead(
                self.stack.network,
                self.stack.parameters,
                self.stack.buffers,
                self.stack.momenta,
                [
                    epoch.examples(rows, (places, pixels), self.draws),
                    *(epoch.examples(clean, None, self.draws) for clean in following),
                ],
                poisons.targets,
                lambda logits: self.options.loss(self.poisons.goal, logits),
                epoch.sgd(batch),
                loss_steps=self.options.loss_steps,
                target_in_batch=self.options.target_in_batch,
            )
            (gradient,) = torch.autograd.grad(found.loss.sum(), pixels)
            poisons.gradient.index_add_(0, ids, gradient)
            self.losses.append(found.loss.detach())
            self.achieved.append(poisons.goal.achieved(found.logits.argmax(-1)).float())

    def finish(self) -> None:
        """Pass the losses of the epoch to the poisons."""
        count = len(self.stack.numbers)
        self.poisons.losses.append(torch.stack(self.losses).view(-1, count).mean(0))
        self.poisons.achieved.append(torch.stack(self.achieved).flatten())

    def poisons_in(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """Places in `batch` and the pixels of the poisons there, to train on; None without poisons."""
        for _, places, members in self._random(batch):
            return places, self.poisons.pixels[members.to(self.poisons.pixels.device)]
        return None

    def _random(self, batch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The random batch itself, with poisons in place of their clean originals; empty without poisons.

        An entry is the rows Int64[M b] of the training set, the places Int64[q] of poisons among the
        flattened rows, and which poisons Int64[q] they are.
        """
        rows = self.epoch.rows[batch]
        members = self.poisons.place_of[rows].flatten()
        places = (members >= 0).nonzero().squeeze(1)
        return [(rows, places, members[places])] if len(places) else []

    def _gathered(self) -> dict[int, list[tuple[Tensor, Tensor, Tensor]]]:
        """For evenly spaced batches, entries as above: some poisons, and examples of the batch."""
        epoch, poisons = self.epoch, self.poisons
        orders = [
            torch.randperm(len(poisons.indices), generator=draws) for draws in epoch.draws("order of poisons")
        ]
        size = min(self.options.poisons_per_batch, epoch.rows[0].shape[1])
        chunks = torch.split(torch.stack(orders), size, 1)
        gathered: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for number, members in enumerate(chunks):
            batch = number * len(epoch) // len(chunks)
            rows = epoch.rows[batch]
            # Clean originals of poisons are the first to be replaced.
            order = (poisons.place_of[rows] >= 0).int().sort(dim=1, stable=True).indices
            room = max(rows.shape[1] - members.shape[1], 0)
            rows = torch.cat([poisons.indices[members], rows.gather(1, order[:, :room])], 1)
            starts = torch.arange(len(rows)).unsqueeze(1) * rows.shape[1]
            places = (starts + torch.arange(members.shape[1])).flatten()
            gathered.setdefault(batch, []).append((rows, places, members.flatten()))
        return gathered


@final
class OuterOptimizer:
    """Adam (Kingma and Ba 2015), as in the public code, or the sign of its first moment.

    With a rate of 200 and changes of at most 8, Adam moves nearly every value to its bound at once, and
    within the bound only when the rate has dropped to 2.

    Arguments:
        kind: "adam" takes rates in the units of the variables; "signed" as parts of each variable's scale.
        scales: the largest magnitude of each variable.
    """

    def __init__(self, kind: Literal["adam", "signed"], scales: Mapping[str, float]) -> None:
        self.kind, self.scales, self.steps = kind, dict(scales), 0
        # mean.NAME and square.NAME, once the first step has been taken.
        self.tensors: dict[str, Tensor] = {}

    def step(
        self, variables: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rate: float
    ) -> dict[str, Tensor]:
        """The variables after one step, not yet projected."""
        self.steps += 1
        moved = {}
        for name, value in variables.items():
            gradient = gradients[name]
            mean = self.tensors.get(f"mean.{name}", torch.zeros_like(value)).lerp(gradient, 0.1)
            self.tensors[f"mean.{name}"] = mean
            if self.kind == "signed":
                moved[name] = value - rate * self.scales[name] * mean.sign()
                continue
            square = self.tensors.get(f"square.{name}", torch.zeros_like(value))
            square = square.lerp(gradient.square(), 0.001)
            self.tensors[f"square.{name}"] = square
            unbiased = (square / (1 - 0.999**self.steps)).sqrt() + 1e-8
            moved[name] = value - rate * mean / (1 - 0.9**self.steps) / unbiased
        return moved


def _mean_loss(entry: Mapping[str, Any]) -> float:
    return fmean(entry["losses"])


def _chosen(options: MetaPoison, request: CraftRequest) -> Tensor:
    """Int64[n], ascending: the examples that are poisoned."""
    names = request.training_set.class_names
    given = [find_class(one, names, option="metapoison: poison_classes") for one in options.poison_classes]
    # The last class that the goal names is the target, or the true class for self-concealment.
    classes = given or [request.goal.classes[-1]]
    members = [request.class_examples(label).tolist() for label in dict.fromkeys(classes)]
    in_turn = [index for row in itertools.zip_longest(*members) for index in row if index is not None]
    pool = torch.tensor(in_turn, dtype=torch.int64)
    words = ", ".join(request.class_in_words(label) for label in classes)
    return request.draw(pool, words, shuffle=options.selection == "random")


def _begin(
    options: MetaPoison,
    configuration: SurrogateConfiguration,
    poisons: Sequence[Poisons],
    store: Checkpoints | None,
    request: CraftRequest,
) -> tuple[list[SurrogateStack], int]:
    """The staggered ensemble and the craft steps that are done, from the checkpoint if there is one."""
    checkpoint = None if store is None else store.latest()
    with _seeded(request, "pretraining"), torch.enable_grad():
        stacks = stacks_of(configuration, options.surrogates, vmap_size=options.vmap_size)
        if checkpoint is None:
            report = functools.partial(request.report, stage="pretraining")
            stagger(stacks, pretraining=options.pretraining, report=report)
            if store is not None:
                store.write(_checkpoint(0, stacks, poisons))
            return stacks, 0
        for stack in stacks:
            stack.restore(checkpoint)
        for place, each in enumerate(poisons):
            each.restore(place, checkpoint)
        return stacks, checkpoint.done


def _seeded(request: CraftRequest, part: str) -> AbstractContextManager[None]:
    """Seed the global generators, which dropout uses, for a part of the craft, and restore them after it."""
    return own_randomness(request.training_set.device, seed=request.derived_seed(part))


def _checkpoint(done: int, stacks: Sequence[SurrogateStack], poisons: Sequence[Poisons]) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    notes: dict[str, Any] = {"history": [each.history for each in poisons]}
    for stack in stacks:
        own, own_notes = stack.checkpoint()
        tensors |= own
        notes |= own_notes
    for place, each in enumerate(poisons):
        tensors |= each.state(place)
    return Checkpoint(done=done, tensors=tensors, notes=notes)
