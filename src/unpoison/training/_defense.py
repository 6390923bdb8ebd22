"""`Defense`: the interface through which a training run is defended.

The hooks, in the order in which `train` calls them:

| hook | when | what published defenses do there |
|---|---|---|
| `begin` | once, before the first step | filter or recompress the training set; read the schedule |
| `partition` | once, before the first step | have networks learn from parts of it, and vote (DPA) |
| `keep` | before each epoch | drop examples (EPIC); fit noise to each example (Friendly Noise) |
| `batch` | each step, around augmentation | add noise, mix images and labels, make several copies |
| `gradients` | each step | learn from the worst copy (MaxUp), clip and add noise (DP-SGD) |
| `report` | once, at the end | numbers for the record of the run |

The default of every hook is what training without a defense does, bit for bit, so a defense overrides only
the hooks it needs.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import CheckedOptions
from unpoison.data import TrainingSet
from unpoison.training._recipe import Recipe
from unpoison.training._voting import Partition


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """The examples of one step.

    Arguments:
        images: UInt8[b c h w], not yet augmented.
        labels: Int64[b].
        num_classes: of the training set.
        indices: Int64[b], their indices in the training set.
        epoch: counted from 0.
        augment: from UInt8 images, or Float images in [0, 1], to an augmented copy, Float[b c h w] in [0, 1];
            each call draws anew.
        generator: for the defense's own draws, on the device of the images.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    indices: Tensor
    epoch: int
    augment: Callable[[Tensor], Tensor]
    generator: torch.Generator


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One step of the optimizer, before its gradients.

    Arguments:
        model: in training mode, without gradients; its hooks must be left as they were.
        images: Float[m c h w], as `Defense.batch` returned them.
        targets: Int64[m] or Float[m classes], likewise.
        logits_of: the forward pass, in the recipe's precision.
        loss_of: `loss_of(logits, targets)` is the mean loss with the recipe's label smoothing;
            `reduction="none"` gives Float[m].
        generator: for the defense's own draws, on the device of the images.
    """

    model: nn.Module
    images: Tensor
    targets: Tensor
    logits_of: Callable[[Tensor], Tensor]
    loss_of: Callable[..., Tensor]
    generator: torch.Generator


class Defense(CheckedOptions, ABC):
    """Stands between the training set and the network.

    `repr` of a defense must show every setting that changes its result: checkpoints are told apart by it. A
    defense with state between epochs returns it from `state` and accepts it in `restore`, and clears it in
    `begin`, so that one object can defend several runs. All randomness comes from the `seed` of `begin` and
    from the generators that the hooks are given; those are made anew for every epoch, so a run that is
    resumed from a checkpoint draws the same numbers.
    """

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """The training set to use in place of `training_set`; by default itself.

        Also called when a run is resumed from a checkpoint, before `restore`, so equal arguments must give
        equal sets.

        Arguments:
            training_set: the whole set, on the device of the run.
            recipe: how the run trains.
            seed: of the defense in this run.

        Returns:
            A set of the same examples, in the same order, with the same classes and image shape.
        """
        return training_set

    def partition(self, training_set: TrainingSet) -> Partition | None:
        """Which networks learn from which parts of the set; None for one network that learns from all of it.

        Each network of a partition is then trained without the other hooks.

        Arguments:
            training_set: what `begin` returned.
        """
        return None

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        """Bool[n]: the examples to train on in `epoch`; by default those alive.

        Here a defense may also evaluate the network.

        Arguments:
            epoch: counted from 0.
            model: as trained so far, in eval mode; must be left as it was.
            training_set: what `begin` returned, on the model's device.
            alive: Bool[n], the examples of the epoch before; at epoch 0 those that the run includes. Examples
                that the run does not include are never trained on, whatever is returned.
        """
        return alive

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images and targets of one step; by default each image augmented, with its label.

        Returns:
            Float[m c h w] in about [0, 1], and their targets: classes Int64[m] or probabilities
            Float[m classes]. m may be more than the size of the batch.
        """
        return batch.augment(batch.images), batch.labels

    def gradients(self, step: Step) -> tuple[Tensor, Tensor]:
        """Set `.grad` of the parameters for the optimizer; by default to the gradient of the mean loss.

        Weight decay and momentum are applied afterwards, by the optimizer.

        Returns:
            The loss (a scalar), and the logits Float[m classes].
        """
        logits = step.logits_of(step.images)
        loss = step.loss_of(logits, step.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss, logits

    def state(self) -> dict[str, Tensor]:
        """The state between epochs, for the checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Accept what `state` returned; the tensors lie on the CPU."""

    def report(self) -> dict[str, Any]:
        """Numbers about the run that has just ended, as plain JSON values; none by default."""
        return {}
