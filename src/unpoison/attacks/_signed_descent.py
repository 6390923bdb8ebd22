"""The optimiser of the attacks by gradient matching: signed Adam within eps, on augmented copies.

Geiping et al. 2021 (arXiv 2009.02276), algorithm 1; also used by Souri et al. 2022 (arXiv 2106.08970).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison._recompression import recompressed
from unpoison._seeds import generator
from unpoison.attacks._alignment import View
from unpoison.data import augment
from unpoison.threats import LInf

Augmentation = Literal["translate", "crop", "jpeg", "none"]
_DROPS = (3 / 8, 5 / 8, 7 / 8)
_QUALITIES = (50, 95)  # of JPEG, the lowest and the highest


@final
class SignedDescent:
    """A perturbation of each image that stays within eps and leaves valid pixels, and its optimiser.

    Arguments:
        bases: UInt8[k c h w], on the device where the work is done.
        start: Float[... k c h w], the first perturbation in units of eps; with an axis in front, of several
            restarts at once. Overwritten.
        spread: the standard deviation of each channel's pixels, in units of the whole range [0, 1].
        eps: the largest change of any pixel value, in 1/255.
        rate: the first step size, in standard deviations; a tenth after 3/8, 5/8 and 7/8 of the steps.
        steps: how many there will be.
    """

    def __init__(
        self,
        bases: Tensor,
        start: Tensor,
        *,
        spread: Sequence[float],
        eps: float,
        rate: float,
        steps: int,
    ) -> None:
        self.bases, self.eps, self.rate, self.steps = bases, eps, rate, steps
        self.moves = 0
        self._clean = bases.float().div_(255)
        # Adam's steps do not depend on the scale of the gradient, so the variable is in standard deviations.
        self._unit = torch.tensor(spread, device=bases.device).view(1, -1, 1, 1)
        delta = self._allowed(start.to(bases.device).mul_(eps / 255))
        self._scaled = (delta / self._unit).requires_grad_()
        self._optimizer = torch.optim.Adam([self._scaled], lr=rate)

    @property
    def images(self) -> Tensor:
        """Float[... k c h w] in [0, 1]: the present poisons."""
        return self._clean + self._scaled.detach() * self._unit

    def move(self, slope: Tensor) -> None:
        """Take one step against the sign of the slope Float[... k c h w], which is overwritten."""
        drops = sum(self.moves >= int(self.steps * part) for part in _DROPS)
        self._optimizer.param_groups[0]["lr"] = self.rate * 0.1**drops
        self._scaled.grad = slope.sign_()
        self._optimizer.step()
        with torch.no_grad():
            self._scaled.copy_(self._allowed(self._scaled * self._unit) / self._unit)
        self.moves += 1

    def rounded(self) -> Tensor:
        """UInt8[... k c h w]: the nearest 8-bit images that are still within eps."""
        return LInf(self.eps).rounded(self.bases, {"delta": self._scaled.detach() * self._unit * 255})

    def _allowed(self, delta: Tensor) -> Tensor:
        """The nearest perturbation within eps with valid pixels."""
        reach = self.eps / 255
        return torch.minimum(torch.maximum(delta.clamp(-reach, reach), -self._clean), 1 - self._clean)


def view_of_step(augmentation: Augmentation, *, shift: int, flip: bool, seed: int) -> View:
    """The augmentation of one step, a function of the piece of the poisons that it is given.

    Arguments:
        augmentation: "translate" shifts by fractions of a pixel over black; "crop" is what `Recipe` does to a
            victim's images, a reflected crop by whole pixels; "jpeg" recompresses the images after such a
            crop, at one quality from 50 to 95; "none" is the identity.
        shift: the largest shift in pixels.
        flip: mirror half of the images.
        seed: of the step.
    """

    def view(images: Tensor, start: int) -> Tensor:
        draws = generator(seed, start)
        if augmentation == "none":
            return images
        if augmentation == "translate":
            return translated(images, shift, flip, draws)
        cropped = augment(images, flip=flip, crop_padding=shift, generator=draws)
        return cropped if augmentation == "crop" else through_jpeg(cropped, draws)

    return view


def through_jpeg(images: Tensor, draws: torch.Generator) -> Tensor:
    """Float[n c h w] in [0, 1] recompressed at a random quality, with the gradient of the identity.

    Rounding has no gradient of use (Athalye, Carlini and Wagner, 2018, arXiv 1802.00420).
    """
    quality = int(torch.randint(_QUALITIES[0], _QUALITIES[1] + 1, (1,), generator=draws))
    pixels = images.detach().mul(255).round().clamp(0, 255).to(torch.uint8)
    return images + (recompressed(pixels, quality=quality).float() / 255 - images.detach())


def translated(images: Tensor, shift: int, flip: bool, draws: torch.Generator) -> Tensor:
    """Each image shifted by up to `shift` pixels each way over black, and mirrored with probability 1/2."""
    n, _, height, width = images.shape
    moves = (torch.rand(n, 2, generator=draws) * 2 - 1).to(images.device)
    mirrored = torch.randint(2, (n,), generator=draws).to(images.device) * int(flip)
    transform = torch.zeros(n, 2, 3, device=images.device, dtype=images.dtype)
    transform[:, 0, 0] = 1 - 2 * mirrored
    transform[:, 1, 1] = 1
    transform[:, 0, 2] = moves[:, 0] * 2 * shift / width
    transform[:, 1, 2] = moves[:, 1] * 2 * shift / height
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
