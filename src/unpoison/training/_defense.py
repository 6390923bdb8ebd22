"""`Defense`: the face through which a training run is defended.

The hooks, in the order in which `train` calls them:

| hook | when | what published defenses do there |
|---|---|---|
| `begin` | once, before the first step | filter or recompress the training set; read the schedule |
| `keep` | before each epoch | drop examples (EPIC); learn something of each (Friendly Noise) |
| `batch` | each step, around augmentation | add noise, mix images and labels, make several copies |
| `gradients` | each step | take the worst copy (MaxUp), clip and add noise (DP-SGD) |
| `report` | once, at the end | tell what a reader of the results should know |

Every hook does by default what training without a defense does, to the last bit, so a defense overrides only
those that it needs.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.training._recipe import Recipe


class Defense(ABC):  # noqa: B024  (each hook has a default; a defense that overrides none is no defense)
    """Stands between the training set and the network.

    `repr` of a defense must show everything that decides what it does: checkpoints are told apart by it. A
    defense that remembers something between epochs gives it in `state` and takes it back in `restore`, and
    starts anew in `begin`, so that one object can defend several runs. All randomness comes from the `seed`
    of `begin` and from the generators that the hooks are given; these are made anew for every epoch, so a
    run that is resumed from a checkpoint sees the same draws.
    """

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """The training set to use in place of `training_set`; by default itself.

        Also called when a run goes on from a checkpoint, before `restore`, so it must give the same set for
        the same arguments.

        Arguments:
            training_set: the whole set, where the run will be.
            recipe: how the run trains: its epochs, its milestones, its batch size.
            seed: of the defense in this run.

        Returns:
            A set of the same examples, in the same order, with the same classes and image shape.
        """
        return training_set

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        """Bool[n]: the examples to train on in `epoch`; by default those alive.

        It is also the moment at which a defense may look at the network.

        Arguments:
            epoch: counted from 0.
            model: as trained so far, in eval mode; given back as it was.
            training_set: what `begin` returned, on the model's device.
            alive: Bool[n], the examples kept in the epoch before; at epoch 0 those that the run includes.
                Examples that the run does not include are never trained on, whatever is returned.
        """
        return alive

    def batch(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        *,
        epoch: int,
        augment: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The images and targets of one step; by default each image augmented, with its label.

        Arguments:
            images: UInt8[b c h w], not yet augmented.
            labels: Int64[b].
            indices: Int64[b], their places in the training set.
            epoch: counted from 0.
            augment: an augmented copy of UInt8 images, or of Float images in [0, 1], as the recipe says;
                Float[b c h w] in [0, 1]. Each call draws anew.
            generator: for the defense's own draws, on the device of the images.

        Returns:
            Float[m c h w] in about [0, 1], and their targets: classes Int64[m] or probabilities
            Float[m classes]. m may be more than b.
        """
        return augment(images), labels

    def gradients(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        *,
        logits_of: Callable[[Tensor], Tensor],
        loss_of: Callable[..., Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Leave in `.grad` of the parameters what the optimiser is to follow; by default the gradient of the
        mean loss.

        Weight decay and momentum come after it and belong to the optimiser.

        Arguments:
            model: in training mode, without gradients; its hooks must be given back as they were.
            images: what `batch` returned.
            targets: likewise.
            logits_of: `logits_of(images)` is the forward pass, in the recipe's precision.
            loss_of: `loss_of(logits, targets)` is the mean loss with the recipe's label smoothing;
                `reduction="none"` gives Float[m], the loss of each.
            generator: for the defense's own draws, on the device of the images.

        Returns:
            The loss that was followed (a scalar), and the logits Float[m classes].
        """
        logits = logits_of(images)
        loss = loss_of(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss, logits

    def state(self) -> dict[str, Tensor]:
        """What the defense remembers between epochs, for the checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027  (most defenses remember nothing)
        """Take back what `state` gave; the tensors lie on the CPU."""

    def report(self) -> dict[str, Any]:
        """What to tell of the run that has just ended, as plain JSON values; nothing by default."""
        return {}
