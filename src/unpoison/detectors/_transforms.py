"""The seven image transformations of Delta-Influence, in plain torch.

Each takes one image Float[c h w] and a generator and returns an image of the same shape. Parameters are the
published ones (reference notebooks of arXiv 2411.13731); the operations are those of the torchvision
transforms that were used there:

flip                 mirrored left to right
colour jitter        brightness and contrast in [.9, 1.1], saturation in [.6, 1.4], hue in [-.1, .1] of a turn
affine               rotation in +-180 degrees, scale in [1, 2], horizontal shear in +-10 degrees, nearest
                     pixel
elastic              random displacements, smoothed with sigma 5, of strength 150
blur                 Gaussian, 5 pixels wide and 9 high, sigma in [8, 10]
invert               1 - x
colour switch        red and green exchanged

On grey images saturation and hue do nothing and the colour switch is the identity. The published code applies
them to z-scores instead of pixels; jitter clamps to [0, 1] in either case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Transform = Callable[[Tensor, torch.Generator], Tensor]


def flip(image: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror left to right."""
    return image.flip(-1)


def colour_jitter(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue a little, in a random order; clamps to [0, 1]."""
    brightness, contrast = _uniform(0.9, 1.1, generator), _uniform(0.9, 1.1, generator)
    saturation, hue = _uniform(0.6, 1.4, generator), _uniform(-0.1, 0.1, generator)
    steps = (
        lambda x: (x * brightness).clamp(0, 1),
        lambda x: _blend(x, _luminance(x).mean(), contrast),
        lambda x: _blend(x, _luminance(x), saturation) if len(x) == 3 else x,
        lambda x: _turn_hue(x, hue) if len(x) == 3 else x,
    )
    for step in torch.randperm(4, generator=generator).tolist():
        image = steps[step](image)
    return image


def affine(image: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by any angle, enlarge up to twice, shear up to 10 degrees; pixels from outside are 0."""
    angle = math.radians(_uniform(-180, 180, generator))
    scale = _uniform(1, 2, generator)
    shear = math.radians(_uniform(-10, 10, generator))
    forward = torch.tensor(
        [
            [math.cos(angle), -math.cos(angle) * math.tan(shear) - math.sin(angle)],
            [math.sin(angle), -math.sin(angle) * math.tan(shear) + math.cos(angle)],
        ],
        dtype=torch.float64,
    )
    height, width = image.shape[-2:]
    # affine_grid works in units of half an image; a rotation of a picture that is not square needs pixels.
    to_pixels = torch.diag(torch.tensor([width / 2, height / 2], dtype=torch.float64))
    inverse = to_pixels.inverse() @ (scale * forward).inverse() @ to_pixels
    theta = torch.cat((inverse, torch.zeros(2, 1, dtype=torch.float64)), 1).to(image)
    grid = F.affine_grid(theta[None], [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, mode="nearest", padding_mode="zeros", align_corners=False)[0]


def elastic(image: Tensor, generator: torch.Generator) -> Tensor:
    """Displace the pixels by a smooth random field; pixels from outside are 0."""
    height, width = image.shape[-2:]
    field = torch.rand(2, height, width, generator=generator) * 2 - 1
    field = _gaussian_blur(field, 41, 41, 5.0) * 150 / torch.tensor([width, height])[:, None, None]
    identity = F.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False)
    grid = identity + field.permute(1, 2, 0)[None]
    return F.grid_sample(image[None], grid.to(image), padding_mode="zeros", align_corners=False)[0]


def blur(image: Tensor, generator: torch.Generator) -> Tensor:
    """Blur with a Gaussian that is nearly a box of 5 x 9 pixels."""
    return _gaussian_blur(image, 5, 9, _uniform(8, 10, generator))


def invert(image: Tensor, generator: torch.Generator) -> Tensor:
    """The negative, 1 - x."""
    return 1 - image


def colour_switch(image: Tensor, generator: torch.Generator) -> Tensor:
    """Exchange the red and the green channel; the identity on grey images."""
    return image[[1, 0, *range(2, len(image))]] if len(image) >= 3 else image


TRANSFORMS: Mapping[str, Transform] = {
    "flip": flip,
    "colour jitter": colour_jitter,
    "affine": affine,
    "elastic": elastic,
    "blur": blur,
    "invert": invert,
    "colour switch": colour_switch,
}


def similar_copies(images: Tensor, randomness: torch.Generator) -> Tensor:
    """UInt8[6 m c h w]: copies of UInt8[m c h w] images that show the same: mirrored, and 5 colour jitters.

    The other transformations often leave nothing of the image by which its class could be recognised.
    """
    pixels = images.cpu().float() / 255
    changes = (flip, *(colour_jitter,) * 5)
    copies = [change(image, randomness) for image in pixels for change in changes]
    return (torch.stack(copies).clamp(0, 1) * 255).round().to(torch.uint8)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _luminance(image: Tensor) -> Tensor:
    if len(image) != 3:
        return image
    weights = torch.tensor([0.2989, 0.587, 0.114], device=image.device, dtype=image.dtype)
    return (weights[:, None, None] * image).sum(0, keepdim=True)


def _blend(image: Tensor, other: Tensor, ratio: float) -> Tensor:
    return (ratio * image + (1 - ratio) * other).clamp(0, 1)


def _turn_hue(image: Tensor, turn: float) -> Tensor:
    """Add `turn` (in turns) to the hue, by way of hue, saturation and value."""
    value, brightest = image.max(0)
    chroma = value - image.min(0).values
    red, green, blue = image
    safe = chroma.clamp(min=1e-12)
    hue = torch.where(
        brightest == 0,
        ((green - blue) / safe) % 6,
        torch.where(brightest == 1, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = torch.where(chroma > 0, hue / 6 + turn, turn) % 1
    # A channel n of (5, 3, 1) is value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + 6 hue) mod 6.
    offsets = torch.tensor([5.0, 3.0, 1.0], device=image.device, dtype=image.dtype)[:, None, None]
    k = (offsets + 6 * hue) % 6
    return (value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def _gaussian_blur(image: Tensor, width: int, height: int, sigma: float) -> Tensor:
    for size, dimension in ((width, -1), (height, -2)):
        # Reflection needs more pixels than it adds; a kernel wider than the picture is cut to it.
        reach = min(size // 2, image.shape[dimension] - 1)
        positions = torch.arange(-reach, reach + 1, device=image.device, dtype=image.dtype)
        kernel = torch.exp(-0.5 * (positions / sigma).square())
        kernel = (kernel / kernel.sum()).view((1, 1, 1, -1) if dimension == -1 else (1, 1, -1, 1))
        padding = (reach, reach, 0, 0) if dimension == -1 else (0, 0, reach, reach)
        image = F.conv2d(F.pad(image[:, None], padding, mode="reflect"), kernel)[:, 0]
    return image
