"""Sleeper Agent: a backdoor by gradient matching, whose trigger is in no training image.

Souri, Fowl, Chellappa, Goldblum and Goldstein 2022, "Sleeper Agent: Scalable Hidden Trigger Backdoors for
Neural Networks Trained from Scratch" (NeurIPS; arXiv 2106.08970), section 3 and algorithm 1.

Stages: choose as poisons the examples of the target class whose loss has the largest gradient on the
surrogates; compute the gradient of patched source images labelled as the target; move the poisons within eps
so that their gradient aligns with it, by signed Adam on freshly augmented copies; a few times on the way
retrain the surrogates from new parameters on the poisons of that moment, and continue against these; round to
8 bits.

Published (CIFAR-10): 1 % poisons, eps 16/255, 250 steps, four retrainings, one surrogate, an 8x8 coloured
patch at a random place in each image: `RandomPatchTrigger.coloured(8, seed=...)`. ResNet-18 then classifies
85 % of patched source images as the target, the mean over pairs of classes, some of which reach 99 %.

Departures: gradient norms are exact and computed for many examples at once (`vmap`); dropout is off; the
place of the patch follows from the image (see `RandomPatchTrigger`) and is not drawn anew.

Cost: that of gradient matching with one restart, and `retrainings` trainings of each surrogate, which are
most of it. Memory: as gradient matching, and for the choice of poisons one gradient for each of `norm_batch`
examples.

Limits: the surrogate must be trained as the victim will be; success varies strongly with the pair of classes,
so measure several pairs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import NonNegativeInt, PositiveFloat, PositiveInt
from unpoison._seeds import derive_seed
from unpoison._stable import cross_entropy
from unpoison.attacks._alignment import Alignment, Gradient, gradient_of, trained_parameters
from unpoison.attacks._attack import Attack, CraftRequest
from unpoison.attacks._methods import register
from unpoison.attacks._networks import fresh_copy, recipe_of
from unpoison.attacks._signed_descent import Augmentation, SignedDescent, view_of_step
from unpoison.data import TrainingSet
from unpoison.models import device_of, logits_in, logits_of, precision_of, preserved
from unpoison.registry import Presets
from unpoison.threats import PoisonSet
from unpoison.training import Recipe, train


@final
@register(
    name="sleeper-agent",
    title="Sleeper Agent",
    summary="Changes images of the target class so that training on them teaches a trigger they lack.",
    paper="Souri et al. 2022, NeurIPS, arXiv 2106.08970",
    cost="250 double backward passes over the poisons and 4 trainings of each surrogate",
    presets=("published",),
    labels="clean",
    goals=("backdoor",),
    knowledge="the training set and a network trained as the victim will be",
    surrogates=1,
    accepts_surrogates=True,
)
@dataclass(frozen=True, kw_only=True)
class SleeperAgent(Attack):
    """The clean-label backdoor with a hidden trigger, for victims trained from scratch.

    Arguments:
        eps: the largest change of any pixel value in 1/255, in [1, 255].
        steps: of signed Adam, 1 or more.
        retrainings: how often the surrogates are retrained, at even distances, 0 or more.
        recipe: of retraining, also as the name of a preset or as its fields. Its model is not used, because
            surrogates keep their architecture.
        choice: "gradient-norm" takes the examples with the largest gradients, "random" any.
        candidates: among how many examples of the target class the choice is made, at most; 1 or more.
        sources: how many patched images the gradient to match is the mean of, at most; 1 or more.
        step_size: of Adam, above 0, in standard deviations of each channel's pixels; divided by the number of
            surrogates; a tenth after 3/8, 5/8 and 7/8 of the steps.
        augmentation: of every poison in every step; as `GradientMatching`.
        shift: the largest shift in pixels, 0 or more.
        flip: mirror half of the images.
        micro_batch: images differentiated at a time, 1 or more.
        norm_batch: examples whose gradients are held at a time for the choice, 1 or more.

    Raises:
        InputError: a value is out of its range.
    """

    PRESETS: ClassVar[Presets] = {"published": {}}

    eps: Annotated[float, "[1, 255]"] = 16.0
    steps: PositiveInt = 250
    retrainings: NonNegativeInt = 4
    recipe: Recipe = Recipe.preset("resnet18-40")  # noqa: RUF009  (a frozen value)
    choice: Literal["gradient-norm", "random"] = "gradient-norm"
    candidates: PositiveInt = 5000
    sources: PositiveInt = 5000
    step_size: PositiveFloat = 0.1
    augmentation: Augmentation = "translate"
    shift: NonNegativeInt = 4
    flip: bool = True
    micro_batch: PositiveInt = 128
    norm_batch: PositiveInt = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", recipe_of(self.recipe))
        super().__post_init__()

    graphs: ClassVar[int] = 3  # gradients in the parameters are differentiated again

    def poison(self, request: CraftRequest) -> PoisonSet:
        """Poisons crafted against one surrogate or several, on the device where they lie.

        Raises:
            InputError: there is no surrogate, no example of the source class, the budget is more than the
                target class has, or a surrogate cannot be retrained.
            TrainingDivergedError: a retraining did.
        """
        request.draw_targets()  # raises where the budget does not fit
        models, training_set = request.models, request.training_set
        device = device_of(models[0], training_set.device)
        patched = self._patched(request).to(device)
        indices = self._choose(request)
        poisons = training_set.subset(indices).to(device)
        descent = SignedDescent(
            poisons.images,
            torch.randn(poisons.images.shape, generator=request.generator("start")),
            spread=training_set.channel_statistics[1],
            eps=self.eps,
            rate=self.step_size / len(models),
            steps=self.steps,
        )
        losses: list[float] = []
        # The surrogates are retrained before the first step of every stretch but the first.
        bounds = [round(self.steps * part / (self.retrainings + 1)) for part in range(self.retrainings + 2)]
        for stretch in range(self.retrainings + 1):
            if stretch:
                poisoned = training_set.with_examples(indices, descent.rounded(), poisons.labels)
                models = self._retrained(models, poisoned, request.derived_seed("retraining", stretch))
            with contextlib.ExitStack() as stack:
                for model in models:
                    stack.enter_context(preserved(model))
                wanted = [self._wanted(model, patched, request.backdoor.target) for model in models]
                alignment = Alignment(models, wanted, micro_batch=self.micro_batch)
                for step in range(bounds[stretch], bounds[stretch + 1]):
                    view = view_of_step(
                        self.augmentation,
                        shift=self.shift,
                        flip=self.flip,
                        seed=request.derived_seed("view", step),
                    )
                    loss, slope = alignment.differentiate(descent.images, poisons.labels, view)
                    losses.append(loss)
                    descent.move(slope)
                    request.report(step + 1, self.steps, loss=loss)
        return request.poison_set(
            indices=indices, images=descent.rounded(), labels=poisons.labels, losses=losses
        )

    def _patched(self, request: CraftRequest) -> Tensor:
        """UInt8[m c h w]: training images of the source class with the trigger."""
        pool = request.source_examples()
        order = torch.randperm(len(pool), generator=request.generator("sources"))[: self.sources]
        return request.backdoor.trigger.stamp(request.training_set.subset(pool[order]).images)

    def _choose(self, request: CraftRequest) -> Tensor:
        """Int64[k], ascending, on the CPU: the examples of the target class to perturb."""
        own, count = request.class_examples(request.backdoor.target), request.count
        order = torch.randperm(len(own), generator=request.generator("candidates"))
        if self.choice == "random":
            return own[order[:count]].sort().values
        pool = own[order[: max(count, self.candidates)]].sort().values
        examples = request.training_set.subset(pool)
        norms = torch.zeros(len(pool))
        for model in request.models:
            with preserved(model):
                norms += gradient_norms(model, examples, batch=self.norm_batch).cpu()
        return pool[norms.topk(count).indices].sort().values

    def _wanted(self, model: nn.Module, patched: Tensor, target: int) -> Gradient:
        """The gradient of the mean loss of the patched images under the target's label."""
        total: Gradient | None = None
        for part in torch.split(patched, self.micro_batch):
            with torch.enable_grad():
                logits = logits_of(model, part.float().div(255))
                labels = torch.full((len(part),), target, device=logits.device)
                loss = cross_entropy(logits, labels, reduction="sum") / len(patched)
                slope = gradient_of(model, loss)
            total = slope if total is None else tuple(a + b for a, b in zip(total, slope, strict=True))
        assert total is not None
        return total

    def _retrained(
        self, models: Sequence[nn.Module], poisoned: TrainingSet, seed: int
    ) -> tuple[nn.Module, ...]:
        """The same architectures, trained from new parameters on the poisoned set."""
        with torch.enable_grad():
            return tuple(
                train(
                    poisoned,
                    self.recipe,
                    seed=derive_seed(seed, number),
                    start=fresh_copy(model, poisoned, seed=derive_seed(seed, number, "parameters")),
                    device=device_of(model, poisoned.device),
                ).model
                for number, model in enumerate(models)
            )


def gradient_norms(model: nn.Module, examples: TrainingSet, *, batch: int = 16) -> Tensor:
    """Float[n]: the norm of the gradient of each example's loss in all trained parameters of the model.

    Arguments:
        model: in eval mode, so that examples do not affect each other.
        examples: on any device.
        batch: how many gradients are held at a time.
    """
    trained_parameters(model)  # raises where there are none
    trained = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    rest = {name: one.detach() for name, one in model.named_parameters() if not one.requires_grad}
    rest |= {name: one.detach() for name, one in model.named_buffers()}
    device = device_of(model, examples.device)

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, {**rest, **parameters}, (image[None],))
        return cross_entropy(logits_in(outputs), label[None])

    slopes = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")
    norms = []
    for start in range(0, len(examples), batch):
        images, labels = examples.batch(start, start + batch)
        found = slopes(trained, images.to(device, precision_of(model)), labels.to(device))
        squares = [slope.flatten(1).square().sum(1) for slope in found.values()]
        norms.append(torch.stack(squares).sum(0).sqrt())
    return torch.cat(norms)
