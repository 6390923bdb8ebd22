"""Triggers that a small network makes for every image: noise within eps, or a pattern behind a mask.

`GeneratedNoiseTrigger` is that of COMBAT (Huynh, Nguyen, Pham and Tran 2024, AAAI), `GeneratedPatternTrigger`
that of the input-aware attack (Nguyen and Tran 2020, arXiv 2010.08138).

Stamping computes in double precision and rounds at the end, so that the same image gets the same bytes alone
and in a batch; on other machines a value could differ only if it lay within 1e-12 of a rounding boundary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from unpoison.errors import InputError
from unpoison.threats._eight_bit import check_images
from unpoison.threats._generator import generated, generator_size
from unpoison.threats._trigger import Trigger

_BATCH = 256


@final
@dataclass(frozen=True, eq=False)
class GeneratedNoiseTrigger(Trigger, kind="generated-noise"):
    """Image + noise that a network makes of the image, within eps and without high frequencies.

    Arguments:
        weights: Float32[p], see `generator_weights`; as many outputs as channels.
        channels: of the images.
        width: of the network.
        eps: the greatest change in 1/255, in [1, 255].
        low_pass: the share of the frequencies each way, from the lowest, that the noise has; in (0, 1].
        name: what to call the trigger in messages and reports.

    Raises:
        InputError: the weights do not fit, or a number is out of range.
    """

    weights: Tensor = field(repr=False)
    channels: int
    width: int
    eps: float
    low_pass: float = 1.0
    name: str = "generated noise"

    def __post_init__(self) -> None:
        _check_weights(self, self.weights, generator_size(self.channels, self.channels, self.width))
        if not 1 <= self.eps <= 255 or not 0 < self.low_pass <= 1:
            raise InputError(
                f"GeneratedNoiseTrigger: eps must be in [1, 255] and low_pass in (0, 1], found {self.eps} "
                f"and {self.low_pass}"
            )
        object.__setattr__(self, "weights", self.weights.detach().cpu().clone())

    def stamp(self, images: Tensor) -> Tensor:
        """The images UInt8[b c h w] with noise of their own."""
        _check_channels(self.name, images, self.channels)
        weights = self.weights.to(images.device, torch.float64)
        parts = []
        for part in torch.split(images, _BATCH):
            noise = noise_of(part.double() / 255, weights, width=self.width, low_pass=self.low_pass)
            most = math.floor(self.eps)  # rounding must not exceed eps
            change = (noise * self.eps).round().clamp(-most, most).to(torch.int16)
            parts.append((part.to(torch.int16) + change).clamp_(0, 255).to(torch.uint8))
        return torch.cat(parts) if parts else images.clone()


@final
@dataclass(frozen=True, eq=False)
class GeneratedPatternTrigger(Trigger, kind="generated-pattern"):
    """A pattern and a mask, both made by networks of the image: image (1 - mask) + pattern mask.

    Arguments:
        weights: Float32[p], of the network that makes patterns; as many outputs as channels.
        mask_weights: Float32[q], of the network that makes masks; one output.
        channels: of the images.
        width: of the networks.
        name: what to call the trigger in messages and reports.

    Raises:
        InputError: the weights do not fit.
    """

    weights: Tensor = field(repr=False)
    mask_weights: Tensor = field(repr=False)
    channels: int
    width: int
    name: str = "generated pattern"

    def __post_init__(self) -> None:
        _check_weights(self, self.weights, generator_size(self.channels, self.channels, self.width))
        _check_weights(self, self.mask_weights, generator_size(self.channels, 1, self.width))
        for key in ("weights", "mask_weights"):
            object.__setattr__(self, key, getattr(self, key).detach().cpu().clone())

    def stamp(self, images: Tensor) -> Tensor:
        """The images UInt8[b c h w], each with its own pattern."""
        return self.stamp_of(images, images)

    def stamp_of(self, images: Tensor, others: Tensor) -> Tensor:
        """The images UInt8[b c h w], each with the pattern of another UInt8[b c h w]: the covers' stamp."""
        _check_channels(self.name, images, self.channels)
        weights, mask_weights = (
            one.to(images.device, torch.float64) for one in (self.weights, self.mask_weights)
        )
        parts = []
        for part, other in zip(torch.split(images, _BATCH), torch.split(others, _BATCH), strict=True):
            stamped = with_pattern(
                part.double() / 255, other.double() / 255, weights, mask_weights, width=self.width
            )
            parts.append((stamped * 255).round().clamp(0, 255).to(torch.uint8))
        return torch.cat(parts) if parts else images.clone()


def noise_of(images: Tensor, weights: Tensor, *, width: int, low_pass: float) -> Tensor:
    """Float[b c h w] in [-1, 1]: the noise of images Float[b c h w] in [0, 1]; differentiable."""
    noise = generated(images, weights, outputs=images.shape[1], width=width).tanh()
    if low_pass < 1:
        rows, columns = (_low_pass(side, low_pass, noise) for side in noise.shape[2:])
        noise = (rows @ noise @ columns).clamp(-1, 1)
    return noise


def pattern_of(images: Tensor, weights: Tensor, *, width: int) -> Tensor:
    """Float[b c h w] in [0, 1]: the patterns of images Float[b c h w] in [0, 1]; differentiable."""
    return (generated(images, weights, outputs=images.shape[1], width=width).tanh() + 1) / 2


def mask_of(images: Tensor, weights: Tensor, *, width: int) -> Tensor:
    """Float[b 1 h w] in [0, 1]: the masks of images Float[b c h w] in [0, 1]; differentiable."""
    return (generated(images, weights, outputs=1, width=width).tanh() + 1) / 2


def with_pattern(
    images: Tensor, others: Tensor, weights: Tensor, mask_weights: Tensor, *, width: int
) -> Tensor:
    """Float[b c h w]: images with the patterns and masks of others; differentiable."""
    mask = mask_of(others, mask_weights, width=width)
    return images * (1 - mask) + pattern_of(others, weights, width=width) * mask


def _low_pass(side: int, share: float, like: Tensor) -> Tensor:
    """Float[side side]: the projection on the lowest frequencies of the cosine transform."""
    places = torch.arange(side, device=like.device, dtype=torch.float64)
    basis = torch.cos(math.pi / side * places[:, None] * (places[None] + 0.5)) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)
    kept = basis[: max(1, round(share * side))]
    return (kept.t() @ kept).to(like.dtype)


def _check_weights(trigger: Trigger, weights: Tensor, size: int) -> None:
    if weights.dtype != torch.float32 or weights.shape != (size,) or not bool(weights.isfinite().all()):
        raise InputError(
            f"{type(trigger).__name__}: weights must be {size} finite numbers of float32, "
            f"found {weights.dtype} of shape {tuple(weights.shape)}"
        )


def _check_channels(name: str, images: Tensor, channels: int) -> None:
    found, _, _ = check_images(name, images)
    if found != channels:
        raise InputError(f"{name}: is made for images of {channels} channels, found {found}")
