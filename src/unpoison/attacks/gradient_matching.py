"""Gradient matching (Witches' Brew): poisons whose training gradient is the adversary's gradient.

Geiping, Fowl, Huang, Czaja, Taylor, Moeller and Goldstein 2021, "Witches' Brew: Industrial Scale Data
Poisoning via Gradient Matching" (ICLR, arXiv 2009.02276), section 3 and algorithm 1.

Stages: compute on each surrogate the gradient `g_t` of the adversary's loss on the target images; pick the
poisons; from random perturbations within eps, minimise `1 - cos(g_t, g_p)` by signed Adam, each step on a
freshly augmented copy of the poisons; restart a few times and keep the best; round to 8 bits. A victim that
then descends the loss of the poisons descends the adversary's as well, without a wrong label in the set.

Cost: restarts x steps x surrogates x (a training step with a double backward pass on all poisons); see
`_alignment` for memory, which `micro_batch` bounds.

Departures: the restart that is kept is the one whose rounded poisons have the lowest loss without
augmentation, where the public code compares the noisy loss of the last step; neither looks at a victim.
Parameters that a surrogate does not train (`requires_grad` False) are left out of the match, which makes the
attack one on fine-tuning or on a linear head. Dropout is off (the public code leaves it on).

Limits: the surrogate must be trained as the victim will be. Poisons made for one architecture transfer less
often to another (45, 25 and 8 % in the poisoning benchmark), and hardly ever to victims that do not fit their
training set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import NonNegativeInt, PositiveFloat, PositiveInt
from unpoison._seeds import derive_seed, generator
from unpoison.attacks._alignment import Alignment, Gradient, gradient_of
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._methods import register
from unpoison.attacks._signed_descent import Augmentation, SignedDescent, view_of_step
from unpoison.errors import InputError
from unpoison.models import device_of, logits_of, preserved
from unpoison.registry import Presets
from unpoison.threats import PoisonSet, TargetedMisclassification


@final
@register(
    name="gradient-matching",
    title="Gradient matching (Witches' Brew)",
    summary="Changes correctly labelled images until training on them descends the adversary's loss.",
    paper="Geiping et al. 2021, ICLR, arXiv 2009.02276",
    cost="restarts x steps x (a training step and a double backward pass over the poisons)",
    presets=("published",),
    labels="clean",
    goals=("targeted-misclassification",),
    knowledge="the training set, and networks trained as the victim will be",
    surrogates=1,
    accepts_surrogates=True,
)
@dataclass(frozen=True, kw_only=True)
class GradientMatching(Attack):
    """The clean-label attack by gradient matching.

    Arguments:
        eps: the largest change of any pixel value in 1/255, in (0, 255].
        steps: of signed Adam in each restart, 1 or more.
        restarts: how many, 1 or more; the best one is kept.
        step_size: of Adam, above 0, in standard deviations of each channel's pixels, as published (the public
            code perturbs standardised images); divided by the number of surrogates; a tenth after 3/8, 5/8
            and 7/8 of the steps.
        poisons_from: "target" draws poisons among the examples of the goal's target class; "third-party" from
            one other class, drawn at random; "anywhere" from the whole set (in the paper: single class, third
            party and random subset).
        bases: draw poisons from these examples instead, in this order.
        augmentation: of every poison in every step. "translate", as published: a flip, and a shift by
            fractions of a pixel over black; "crop", what `Recipe` does to the victim's images: a flip and a
            reflected crop by whole pixels; "jpeg", the same followed by JPEG at a random quality, so that the
            poisons work on recompressed images, too; "none".
        shift: the largest shift in pixels, 0 or more.
        flip: mirror half of the images.
        target_loss: the loss whose gradient is `g_t`: "cross-entropy" towards the target class, or
            "carlini-wagner", the margin that is missing to it.
        micro_batch: poisons that go through a network at a time, 1 or more; 64 suit a CPU, a GPU takes more.
            The result does not depend on it but for rounding.
        held: of how many poisons the graphs are held in memory together, 0 or more; more poisons than that
            take two passes and a third more time.
        together: restarts that are crafted at once, 1 or more; None is one on a CPU and all of them on a GPU.
            The result does not depend on it but for rounding.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {"published": {}}

    eps: Annotated[float, "(0, 255]"] = 16.0
    steps: PositiveInt = 250
    restarts: PositiveInt = 8
    step_size: PositiveFloat = 0.1
    poisons_from: Literal["target", "third-party", "anywhere"] = "target"
    bases: tuple[int, ...] = ()
    augmentation: Augmentation = "translate"
    shift: NonNegativeInt = 4
    flip: bool = True
    target_loss: Literal["cross-entropy", "carlini-wagner"] = "cross-entropy"
    micro_batch: PositiveInt = 64
    held: NonNegativeInt = 512
    together: PositiveInt | None = None

    graphs: ClassVar[int] = 3  # gradients in the parameters are differentiated again

    def _images_at_once(self, count: int) -> int:
        return min(count, max(self.held, self.micro_batch))

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Poisons crafted against one surrogate or several (an ensemble), on the device where they lie.

        Raises:
            InputError: there is no surrogate, the budget is more than there are examples to draw from, or a
                surrogate already does what the adversary wants.
        """
        models, training_set = request.models, request.training_set
        indices = self._poisons(request)
        chosen = training_set.subset(indices)
        device = device_of(models[0], training_set.device)
        bases, labels = chosen.images.to(device), chosen.labels.to(device)
        with contextlib.ExitStack() as stack:
            for network in models:
                stack.enter_context(preserved(network))
            wanted = [self._wanted(network, request.targeted, device) for network in models]
            alignment = Alignment(models, wanted, micro_batch=self.micro_batch, held=self.held)
            best, history = None, []
            at_once = self.together or (1 if device.type == "cpu" else self.restarts)
            for first in range(0, self.restarts, at_once):
                numbers = range(first, min(first + at_once, self.restarts))
                for images, losses in self._descend(alignment, bases, labels, request, numbers):
                    final_loss = alignment.loss(images.float().div(255), labels)
                    history.append({"losses": losses, "final": final_loss})
                    if best is None or final_loss < best[0]:
                        best = (final_loss, images)
        assert best is not None
        return request.poison_set(indices=indices, images=best[1], labels=chosen.labels, history=history)

    def _descend(
        self,
        alignment: Alignment,
        bases: Tensor,
        labels: Tensor,
        request: CraftRequest,
        restarts: Sequence[int],
    ) -> list[tuple[Tensor, list[float]]]:
        """The rounded poisons UInt8[n c h w] of each of these restarts, and its loss at every step."""
        seeds = [derive_seed(request.seed, "restart", restart) for restart in restarts]
        descent = SignedDescent(
            bases,
            torch.stack([torch.randn(bases.shape, generator=generator(seed, "start")) for seed in seeds]),
            spread=request.training_set.channel_statistics[1],
            eps=self.eps,
            rate=self.step_size / len(alignment.networks),
            steps=self.steps,
        )
        losses = []
        for step in range(self.steps):
            views = [
                view_of_step(
                    self.augmentation,
                    shift=self.shift,
                    flip=self.flip,
                    seed=derive_seed(seed, "view", step),
                )
                for seed in seeds
            ]
            found, slope = alignment.differentiate_together(descent.images, labels, views)
            losses.append(found)
            descent.move(slope)
            done = self.steps * restarts[0] + (step + 1) * len(seeds)
            request.report(done, self.steps * self.restarts, loss=min(found))
        # Copies, so that the one that will be kept does not keep the others in memory.
        return [
            (images.clone(), list(history))
            for images, history in zip(descent.rounded(), zip(*losses, strict=True), strict=True)
        ]

    def _wanted(self, network: nn.Module, goal: TargetedMisclassification, device: torch.device) -> Gradient:
        """`g_t`, the gradient of the adversary's loss."""
        with torch.enable_grad():
            logits = logits_of(network, goal.images.to(device).float().div(255))
            if self.target_loss == "cross-entropy":
                return gradient_of(network, goal.loss(logits))
            return gradient_of(network, goal.margin(logits).clamp(min=0).mean())

    def _poisons(self, request: CraftRequest) -> Tensor:
        """Int64[k], ascending: the examples to perturb."""
        goal, training_set = request.targeted, request.training_set
        if self.bases:
            return request.draw_bases(self.bases)
        draws, label = request.generator("poisons"), goal.target
        if self.poisons_from == "anywhere":
            return request.draw(torch.arange(len(training_set)), "the training set", draws=draws)
        if self.poisons_from == "third-party":
            present = sorted(set(training_set.labels.tolist()))
            others = [one for one in present if one not in (goal.target, goal.true_label)]
            if not others:
                raise InputError(
                    f"gradient-matching: {training_set.name} has no third class to take poisons from"
                )
            label = others[int(torch.randint(len(others), (1,), generator=draws))]
        return request.draw(request.class_examples(label), request.class_in_words(label), draws=draws)
