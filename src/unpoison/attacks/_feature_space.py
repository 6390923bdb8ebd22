"""What the attacks in feature space share: their images and networks, features, and descent within eps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from unpoison._global_randomness import own_randomness
from unpoison._seeds import derive_seed
from unpoison.attacks._attack import CraftRequest
from unpoison.models import FeatureTap, device_of, forward, last_linear
from unpoison.threats import LInf, PoisonSet

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureProblem:
    """Bases, targets and networks of one craft, on the device of the first network.

    Arguments:
        request: for a targeted misclassification.
        indices: Int64[k], the bases, ascending.
        models: the surrogates.
        clean: Float[k c h w] in [0, 1], the bases' images.
        targets: Float[m c h w] in [0, 1].
        eps: the largest change of any pixel value, in 1/255.
    """

    request: CraftRequest
    indices: Tensor
    models: tuple[nn.Module, ...]
    clean: Tensor
    targets: Tensor
    eps: float

    @classmethod
    def of(cls, request: CraftRequest, bases: Sequence[int], *, eps: float) -> FeatureProblem:
        """The problem of a request.

        Raises:
            InputError: there is no surrogate, or the budget is more than there are bases.
        """
        indices, models = request.draw_bases(bases), request.models
        device = device_of(models[0], request.training_set.device)
        return cls(
            request=request,
            indices=indices,
            models=models,
            clean=request.training_set.subset(indices).images.to(device).float() / 255,
            targets=request.targeted.images.to(device).float() / 255,
            eps=eps,
        )

    def descend(self, loss_of: Callable[[Tensor], Tensor], *, steps: int, step_size: float) -> Tensor:
        """Float[k c h w] in [0, 1]: the bases after steps of Adam on a loss of all images, within eps.

        Steps are in standard deviations of each channel's pixels, as on standardised images.
        """
        deviations = torch.tensor(self.request.training_set.channel_statistics[1], device=self.clean.device)
        spread = deviations.view(1, -1, 1, 1)
        scaled = (self.clean / spread).requires_grad_()
        optimizer = torch.optim.Adam([scaled], lr=step_size)
        for step in range(steps):
            loss = loss_of(scaled * spread)
            (scaled.grad,) = torch.autograd.grad(loss, scaled)
            optimizer.step()
            with torch.no_grad():
                scaled.copy_(within(scaled * spread, self.clean, self.eps) / spread)
            self.request.report(step + 1, steps, loss=loss.detach())
        return scaled.detach() * spread

    def poison_set(self, poisons: Tensor) -> PoisonSet:
        """The poison set of Float[k c h w] images in [0, 1], rounded within eps."""
        clean = self.request.training_set.subset(self.indices)
        delta = ((poisons - self.clean) * 255).to(clean.images.device)
        images = LInf(self.eps).rounded(clean.images, {"delta": delta})
        return self.request.poison_set(indices=self.indices, images=images, labels=clean.labels)


@final
class FeatureReader:
    """The features of several networks for a batch of images, differentiable.

    Arguments:
        attack: its name, for messages.
        models: the networks; they have to be in eval mode.
        layers: modules whose outputs are the features, each apart; empty for the input of the last linear
            layer.
        draws: with more than one, dropout is on and features are the mean over so many draws.
        seed: of dropout.
    """

    def __init__(
        self,
        attack: str,
        models: Sequence[nn.Module],
        layers: Sequence[str],
        *,
        draws: int = 1,
        seed: int = 0,
    ) -> None:
        self.models = tuple(models)
        self.draws = draws
        self.seed = seed
        self._calls = 0
        self._side: Literal["output", "input"] = "output" if layers else "input"
        no_layer = f"{attack}: the surrogate has no linear layer; name the layer to read in the options"
        self._layers = [tuple(layers) or (last_linear(model, otherwise=no_layer),) for model in models]
        for model, paths in zip(self.models, self._layers, strict=True):
            for path in paths:
                FeatureTap(model, path)  # raises where the model has no such module

    def __call__(self, images: Tensor) -> list[Tensor]:
        """For each network and layer the features Float[b d] of Float[b c h w] images in [0, 1]."""
        self._calls += 1
        found: list[Tensor] = []
        for number, model in enumerate(self.models):
            with self._dropout(model, derive_seed(self.seed, self._calls, number), images.device):
                sums = self._read(model, self._layers[number], images)
                for _ in range(self.draws - 1):
                    values = self._read(model, self._layers[number], images)
                    sums = [one + two for one, two in zip(sums, values, strict=True)]
            found += [one / self.draws for one in sums]
        return found

    def _read(self, model: nn.Module, paths: Sequence[str], images: Tensor) -> list[Tensor]:
        with ExitStack() as stack:
            taps = [stack.enter_context(FeatureTap(model, path, side=self._side)) for path in paths]
            forward(model, images.to(device_of(model, images.device)))
            return [tap.value.flatten(1).to(images) for tap in taps]

    @contextmanager
    def _dropout(self, model: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
        """With several draws: dropout on and seeded, with the global generators left as they were."""
        if self.draws == 1:
            yield
            return
        modules = [module for module in model.modules() if isinstance(module, _DROPOUT)]
        with own_randomness(device_of(model, device), seed=seed):
            try:
                for module in modules:
                    module.train()
                yield
            finally:
                for module in modules:
                    module.eval()


def within(images: Tensor, clean: Tensor, eps: float) -> Tensor:
    """Float images in [0, 1], none further than eps (in 1/255) from the clean ones."""
    reach = eps / 255
    return torch.maximum(torch.minimum(images, clean + reach), clean - reach).clamp(0, 1)
