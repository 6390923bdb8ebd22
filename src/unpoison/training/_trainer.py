"""`train`: a recipe and a training set in, a trained model out.

The data lies on the device as uint8. A step gathers its batch by `index_select`, augments the bytes, converts
them once to float (channels last where the network has convolutions) and leaves standardisation to the model.
Within an epoch nothing is read back from the device: losses are collected there and checked when the epoch
ends.

Repeatable: on one machine and with one number of threads, equal arguments give equal weights bit for bit.
Every epoch derives its generators from (seed, epoch), so a run that is resumed from a checkpoint needs no
random state and ends in the same weights. The global random state is as before when `train` returns.

Cost: one forward and backward pass an example and epoch. Memory: the training set as bytes, the parameters
with gradient and momentum, and the activations of one batch.
"""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import replace
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison._checkpoints import TRAINING, Checkpoint, Checkpoints, digest_of
from unpoison._global_randomness import own_randomness, seed_global_generators
from unpoison._memory import explained, is_allocation_failure
from unpoison._progress import Progress
from unpoison._seeds import as_seed, derive_seed, generator
from unpoison.data import TrainingSet
from unpoison.errors import (
    InputError,
    InsufficientMemoryError,
    MismatchError,
    TrainingDivergedError,
    UnpoisonError,
)
from unpoison.models import (
    activations_of,
    check_network,
    fastest_layout,
    laid_out,
    logits_of,
    preserved,
    usual_mode,
)
from unpoison.training._batches import (
    augmented,
    batch_bounds,
    diverged_step,
    epoch_order,
    in_training_mode,
    initial_network,
    own_modes,
)
from unpoison.training._defense import Batch, Defense, Step
from unpoison.training._epoch_record import EpochRecord
from unpoison.training._estimate import check_training
from unpoison.training._recipe import Recipe
from unpoison.training._trained import Trained
from unpoison.training._voting import train_votes


def train(
    training_set: TrainingSet,
    recipe: Recipe,
    *,
    seed: int,
    defense: Defense | None = None,
    include: Tensor | None = None,
    start: nn.Module | None = None,
    device: torch.device | str | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a network.

    Arguments:
        training_set: moved to `device` as uint8 if it is not there.
        recipe: how.
        seed: of initialisation, order, augmentation and dropout.
        defense: stands between the training set and the network; None is an undefended run. It may read
            examples that are not included, but cannot include them.
        include: Bool[n], the examples the run may learn from; None is all. The others have no influence at
            all, not even on the normalisation.
        start: the network to train a copy of, which takes Float[b c h w] in [0, 1]; None builds the recipe's.
            Parameters that do not require a gradient are not trained, and batch norm in a module of such
            parameters alone keeps its statistics. Where it is in training mode, each of its modules keeps its
            mode, such as batch norm that is in eval mode.
        device: where to train; None is where the training set lies.
        checkpoints: a directory; the state is stored there after each epoch, and a run that finds a
            checkpoint of its own there is resumed from it.
        progress: called after each epoch, when its checkpoint is stored, with the stage "training".

    Returns:
        The model in eval mode on `device`, with its history.

    Raises:
        InputError: nothing to train on, a mask of the wrong shape, a network that does not fit, a damaged
            checkpoint.
        MismatchError: the checkpoints belong to another run.
        TrainingDivergedError: the loss is no longer finite; names step, epoch and learning rate.
        InsufficientMemoryError: it takes more memory than may be taken, or an allocation failed; names a
            batch size that would probably fit.
    """
    seed = as_seed(seed)
    target = training_set.device if device is None else torch.device(device)
    included = _included(training_set, include)
    fingerprint = training_set.fingerprint
    # The caller may have turned gradients off.
    with usual_mode(target), torch.enable_grad(), own_randomness(target, deterministic=True):
        prepared = training_set
        if defense is not None:
            prepared = _begun(defense, training_set, target, recipe, derive_seed(seed, "defense"))
            partition = defense.partition(prepared)
            if partition is not None:
                voted = train_votes(
                    train,
                    prepared,
                    recipe,
                    partition,
                    seed=seed,
                    included=included,
                    start=start,
                    device=target,
                    checkpoints=checkpoints,
                    progress=progress,
                )
                report = {"name": repr(defense), **defense.report()}
                return replace(voted, training_fingerprint=fingerprint, defense=report)
        store = None
        if checkpoints is not None:
            store = Checkpoints(
                checkpoints,
                {
                    "recipe": recipe.fingerprint,
                    "seed": seed,
                    "training set": fingerprint,
                    "choice of examples": None if include is None else digest_of({"included": included}),
                    "defense": repr(defense),
                    "starting model": None if start is None else digest_of(start.state_dict()),
                },
                kind=TRAINING,
            )
        network = _initial(prepared, recipe, seed, included, start)
        run = _Run(network, prepared.to(target), recipe, seed, defense, included.to(target))
        if store is not None and (checkpoint := store.latest()) is not None:
            run.restore(checkpoint)
        while run.epochs_done < recipe.epochs:
            record = run.epoch()
            if store is not None:
                store.write(run.checkpoint())
            record.tell(progress, recipe.epochs)
    run.model.zero_grad(set_to_none=True)
    return Trained(
        model=laid_out(run.model, torch.contiguous_format).eval(),
        recipe=recipe,
        seed=seed,
        class_names=training_set.class_names,
        image_shape=training_set.image_shape,
        training_fingerprint=fingerprint,
        history=tuple(run.history),
        seconds=sum(record.seconds for record in run.history),
        own_model=start is not None,
        defense=None if defense is None else {"name": repr(defense), **defense.report()},
        dropped=(run.included & ~run.alive).nonzero().squeeze(1).cpu(),
    )


@final
class _Undefended(Defense):
    """Training without a defense: every hook has its default."""


class _Run:
    """The state between epochs: parameters, momentum, examples that are alive, history."""

    def __init__(
        self,
        model: nn.Module,
        training_set: TrainingSet,
        recipe: Recipe,
        seed: int,
        defense: Defense | None,
        included: Tensor,
    ) -> None:
        self.training_set = training_set
        self.device = training_set.device
        self.recipe = recipe
        self.seed = seed
        self.defense = defense
        self.hooks = _Undefended() if defense is None else defense
        self.included = included
        self.alive = included
        self.history: list[EpochRecord] = []
        model = model.to(self.device)
        self.modes = own_modes(model)
        held = 0 if defense is None else training_set.images.nbytes
        with explained("train", "two images do not fit; take a narrower network"):
            activations = activations_of(model, training_set.images[:2].float() / 255)
        check_training(
            "train",
            model,
            activations,
            batch_size=min(recipe.batch_size, int(included.sum())),
            more={"the set of the defense": held},
        )
        self.model = laid_out(model, torch.channels_last)
        self.layout = fastest_layout(self.model, training_set.images)
        self.model = laid_out(self.model, self.layout)
        self.optimizer = recipe_optimizer(_trainable(self.model), recipe)

    @property
    def epochs_done(self) -> int:
        return len(self.history)

    def epoch(self) -> EpochRecord:
        """Train one epoch."""
        started = time.perf_counter()
        number = self.epochs_done
        if self.defense is not None:
            self.alive = self._kept(self.defense, number)
        order = epoch_order(self.alive, seed=self.seed, epoch=number)
        bounds = batch_bounds(len(order), self.recipe.batch_size)
        draws = generator(self.seed, "epoch", number, "augmentation", device=self.device)
        own_draws = generator(self.seed, "epoch", number, "defense", device=self.device)
        seed_global_generators(derive_seed(self.seed, "epoch", number, "network"), self.device)
        losses = torch.zeros(len(bounds), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        seen = 0
        in_training_mode(self.model, self.modes)
        try:
            for step, (start, stop) in enumerate(bounds):
                rate = self.recipe.learning_rate_at(number + (step + 0.5) / len(bounds))
                set_learning_rate(self.optimizer, rate)
                loss, hits, rows = self._step(order[start:stop], draws, own_draws)
                losses[step] = loss
                correct += hits
                seen += rows
                # Free on the CPU; on other devices it would synchronise in every step.
                if self.device.type == "cpu" and not math.isfinite(losses[step].item()):
                    break
        except (RuntimeError, ValueError) as error:
            explained = _explained(error, self.recipe.batch_size, len(order))
            if explained is None:
                raise
            raise explained from error
        diverged = diverged_step(losses, self.model)
        if diverged is not None:
            rate = self.recipe.learning_rate_at(number + (diverged + 0.5) / len(bounds))
            raise TrainingDivergedError(
                f"training diverged: the loss is not finite at step {diverged} of epoch {number}, "
                f"where the learning rate is {rate:g}; lower it ({self.recipe.learning_rate:g} at most) "
                "or warm up longer"
            )
        sizes = torch.tensor([stop - start for start, stop in bounds], dtype=torch.float64)
        record = EpochRecord(
            epoch=number,
            loss=float(losses.cpu().double() @ sizes / len(order)),
            accuracy=int(correct) / seen,
            learning_rate=rate,
            examples=len(order),
            seconds=time.perf_counter() - started,
        )
        self.history.append(record)
        return record

    def _step(
        self, chosen: Tensor, draws: torch.Generator, own_draws: torch.Generator
    ) -> tuple[Tensor, Tensor, int]:
        """One step: its loss, how many rows were classified correctly, and how many there were."""
        recipe = self.recipe

        def draw_augmented(images: Tensor) -> Tensor:
            drawn = augmented(images, recipe, draws)
            inputs = drawn.to(torch.float32, memory_format=self.layout)
            return inputs.div_(255) if drawn.dtype == torch.uint8 else inputs

        def forward(images: Tensor) -> Tensor:
            with torch.autocast(
                self.device.type,
                dtype=torch.bfloat16,
                enabled=recipe.precision == "bfloat16" and self.device.type == "cuda",
            ):
                logits = logits_of(self.model, images)
            if logits.ndim != 2 or logits.shape[1] < self.training_set.num_classes:
                raise InputError(
                    f"model: returns logits of shape {tuple(logits.shape)}; "
                    f"expected [{len(images)}, {self.training_set.num_classes}], one logit a class"
                )
            return logits

        def loss_of(logits: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
            return F.cross_entropy(
                logits.float(), targets, label_smoothing=recipe.label_smoothing, reduction=reduction
            )

        images, targets = self.hooks.batch(
            Batch(
                images=self.training_set.images.index_select(0, chosen),
                labels=self.training_set.labels.index_select(0, chosen),
                num_classes=self.training_set.num_classes,
                indices=chosen,
                epoch=self.epochs_done,
                augment=draw_augmented,
                generator=own_draws,
            )
        )
        self._check_batch(images, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss, logits = self.hooks.gradients(
            Step(
                model=self.model,
                images=images,
                targets=targets,
                logits_of=forward,
                loss_of=loss_of,
                generator=own_draws,
            )
        )
        if self.defense is not None:
            _lay_gradients_out(self.model)
        self.optimizer.step()
        wanted = targets if targets.ndim == 1 else targets.argmax(1)
        return loss.detach(), (logits.detach().argmax(1) == wanted).sum(), len(wanted)

    def _check_batch(self, images: Tensor, targets: Tensor) -> None:
        classes = self.training_set.num_classes
        labelled = targets.dtype == torch.int64 and targets.ndim == 1
        mixed = targets.is_floating_point() and targets.ndim == 2 and targets.shape[1] >= classes
        fits = images.is_floating_point() and images.shape[1:] == self.training_set.images.shape[1:]
        if not fits or not (labelled or mixed) or len(images) != len(targets) or not len(images):
            raise InputError(
                f"{self.hooks!r}: batch must return float images [m, c, h, w] and targets, int64 [m] or "
                f"float [m, {classes}]; found {images.dtype} of shape {tuple(images.shape)} and "
                f"{targets.dtype} of shape {tuple(targets.shape)}"
            )

    def _kept(self, defense: Defense, epoch: int) -> Tensor:
        with preserved(self.model):
            kept = defense.keep(epoch, self.model, self.training_set, self.alive.clone())
        if kept.dtype != torch.bool or kept.shape != self.included.shape:
            raise InputError(
                f"{defense!r}: keep must return a bool tensor of shape [{len(self.included)}], "
                f"found {kept.dtype} of shape {tuple(kept.shape)}"
            )
        kept = kept.to(self.device) & self.included
        if not bool(kept.any()):
            raise InputError(f"{defense!r}: keeps no example in epoch {epoch}; make it less strict")
        return kept

    def checkpoint(self) -> Checkpoint:
        """The state that the next epoch needs."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, parameter in enumerate(_trainable(self.model)):
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{index}"] = momentum
        tensors["alive"] = self.alive
        if self.defense is not None:
            tensors |= {f"defense.{name}": tensor for name, tensor in self.defense.state().items()}
        history = [record.to_dict() for record in self.history]
        return Checkpoint(done=self.epochs_done, tensors=tensors, notes=history)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`."""
        try:
            self.model.load_state_dict(checkpoint.group("model."))
        except RuntimeError:
            raise MismatchError(
                "checkpoint: its weights do not fit this model; remove it to start anew"
            ) from None
        momenta = checkpoint.group("momentum.")
        for index, parameter in enumerate(_trainable(self.model)):
            if str(index) in momenta:
                buffer = torch.empty_like(parameter, requires_grad=False)
                self.optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(momenta[str(index)])
        self.alive = checkpoint.tensors["alive"].to(self.device)
        if self.defense is not None:
            self.defense.restore(checkpoint.group("defense."))
        self.history = [EpochRecord(**record) for record in checkpoint.notes]


def _begun(
    defense: Defense, training_set: TrainingSet, device: torch.device, recipe: Recipe, seed: int
) -> TrainingSet:
    """The set that the defense trains on; `training_set` itself where `begin` returned it."""
    moved = training_set.to(device)
    prepared = defense.begin(moved, recipe, seed=seed)
    if prepared is moved:
        # Not the moved copy: channel statistics are to be computed as without a defense, bit for bit.
        return training_set
    expected, found = (
        (tuple(each.images.shape), each.class_names, tuple(each.labels.shape))
        for each in (training_set, prepared)
    )
    if expected != found:
        raise InputError(
            f"{defense!r}: begin must return the same examples in the same order, images of shape "
            f"{expected[0]}; found {found[0]}"
        )
    return prepared


def _included(training_set: TrainingSet, include: Tensor | None) -> Tensor:
    if include is None:
        mask = torch.ones(len(training_set), dtype=torch.bool)
    elif include.dtype != torch.bool or include.shape != (len(training_set),):
        raise InputError(
            f"include: expected a bool tensor of shape [{len(training_set)}], "
            f"found {include.dtype} of shape {tuple(include.shape)}"
        )
    else:
        mask = include.cpu()
    if not bool(mask.any()):
        what = "is empty" if not len(training_set) else "has no included example"
        raise InputError(f"{training_set.name}: {what}; there is nothing to train on")
    return mask


def _initial(
    training_set: TrainingSet, recipe: Recipe, seed: int, included: Tensor, start: nn.Module | None
) -> nn.Module:
    """The network before the first step: a copy of the caller's, or the recipe's freshly built."""
    if start is not None:
        check_network(start)
        network = copy.deepcopy(start)
        network.zero_grad(set_to_none=True)
        if not _trainable(network):
            raise InputError("start: every parameter is frozen (none requires a gradient); unfreeze some")
        return network
    chosen = included.nonzero().squeeze(1)
    subset = training_set if bool(included.all()) else training_set.subset(chosen.to(training_set.device))
    return initial_network(subset, recipe, seed=derive_seed(seed, "initialization"))


def _lay_gradients_out(model: nn.Module) -> None:
    """Give gradients the strides of their parameters.

    Autograd does so; the fused optimizer relies on it, and would pair up wrong numbers otherwise.
    """
    for parameter in _trainable(model):
        gradient = parameter.grad
        if gradient is not None and gradient.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(gradient)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def recipe_optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.SGD:
    """SGD with weights in one group, norms and biases in another, for `set_learning_rate`."""
    weights = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    factor = recipe.bias_learning_rate_factor
    decay = recipe.weight_decay if recipe.decay_norm_and_bias else 0.0
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": recipe.weight_decay, "factor": 1.0},
        {"params": others, "weight_decay": decay / factor if factor else 0.0, "factor": factor},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        # On the CPU torch 2.13's fused step leaves most numbers of half precision as they are, silently.
        fused=all(one.dtype in (torch.float32, torch.float64) for one in weights + others),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate times its own "factor", where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def _explained(error: Exception, batch_size: int, examples: int) -> UnpoisonError | None:
    """A clearer error than torch's own, if there is one."""
    text = str(error)
    if "more than 1 value per channel" in text:
        return InputError(
            "batch norm needs more than one example a batch, "
            f"found {examples} in all and batch_size {batch_size}"
        )
    if is_allocation_failure(error):
        smaller = max(1, min(batch_size, examples) // 2)
        return InsufficientMemoryError(
            f"out of memory in a training step of batch_size {batch_size}; "
            f"batch_size {smaller} would probably fit"
        )
    return None
