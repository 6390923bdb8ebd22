"""`Perturbation`: the set of allowed changes of an image, and how an attack optimises within it.

A perturbation only describes a set of changes; it holds no images. An attack optimises its `variables`: a
dictionary of tensors with one row for each image, which `initial` creates, `project` brings back into the set
and `apply` turns into images, differentiably. `rounded` gives the 8-bit images that a victim sees.

- `LInf(eps)`: every value changes by at most eps, in 1/255.
- `ColorGrid(eps, resolution, smoothness)`: every colour of an image moves to a nearby one, by a smooth map
  over colour space: the ReColorAdv of Laidlaw and Feizi 2019 (arXiv 1906.00001) as MetaPoison uses it (Huang
  et al. 2020, arXiv 2004.00225), a grid over YUV for each image, trilinear between its nodes.
- Their sum, `ColorGrid() + LInf(8)`: recolour, then add. Terms act from left to right.

`Perturbation.of` takes the same as plain values. Pixels are clipped to 0..255 wherever images are made. The
public code of MetaPoison neither clips nor rounds after its first step, so its victims train on images that
no file can hold.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison.errors import InputError
from unpoison.threats._tagged import Tagged, prefixed, under

# Rows give Y, U and V of red, green and blue in [0, 1] (ITU-R BT.601); the other matrix is the way back.
_TO_YUV = (
    (0.299, 0.587, 0.114),
    (-0.14714119, -0.28886916, 0.43601035),
    (0.61497538, -0.51496512, -0.10001026),
)
_TO_RGB = ((1.0, 0.0, 1.13988303), (1.0, -0.394642334, -0.58062185), (1.0, 2.03206185, 0.0))
# How far rounding of float32 may take a whole level from itself, in levels.
_TOLERANCE = 1e-3


class Perturbation(Tagged):
    """A set of allowed changes of images.

    Every method takes the images unchanged as [n c h w] in 0..255: uint8, or float where another change went
    before.
    """

    @abstractmethod
    def initial(self, images: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        """The first variables of an attack, inside the set, on the device of the images.

        Arguments:
            images: [n c h w] in 0..255.
            generator: on any device; a generator of the CPU gives the same variables on every device.

        Raises:
            InputError: images of this shape cannot be changed in this way.
        """

    @abstractmethod
    def project(self, variables: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """The nearest variables inside the set: new tensors, detached."""

    @abstractmethod
    def scales(self) -> dict[str, float]:
        """The largest magnitude of each variable, the unit of a signed step."""

    @abstractmethod
    def penalty(self, variables: Mapping[str, Tensor]) -> Tensor:
        """Float[n], 0 or more: the smoothness term of each image, to be added to an attack's loss."""

    @abstractmethod
    def bound(self) -> float:
        """The most by which any value of an image can change, in 1/255; rounding adds at most 1/2 to it."""

    @abstractmethod
    def changed(self, images: Tensor, variables: Mapping[str, Tensor]) -> Tensor:
        """Float[n c h w]: the changed images, clipped to 0..255; differentiable in the variables."""

    @abstractmethod
    def levels(self, images: Tensor, variables: Mapping[str, Tensor]) -> Tensor:
        """Float[n c h w]: the changed images as whole numbers in 0..255."""

    @classmethod
    def of(cls, value: Any) -> Perturbation:
        """The perturbation that plain values describe.

        Arguments:
            value: a number, the eps of `LInf`; a mapping such as {"kind": "color-grid", "eps": 0.04}; a list
                of such values, which act one after another; or a perturbation.

        Raises:
            InputError: a kind or a parameter is unknown, or out of range.

        >>> Perturbation.of([{"kind": "color-grid"}, 8]) == ColorGrid() + LInf(8)
        True
        """
        if isinstance(value, Perturbation):
            return value
        if isinstance(value, Mapping):
            return Perturbation.from_json(value, {})
        if isinstance(value, list | tuple):
            return SumOfPerturbations(tuple(map(Perturbation.of, value)))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return LInf(value)
        raise InputError(
            f"perturbation: expected a number, a mapping with a kind, or a list, found {value!r}"
        )

    @final
    def apply(self, images: Tensor, variables: Mapping[str, Tensor]) -> Tensor:
        """Float[n c h w] in [0, 1]: the changed images as networks take them; differentiable."""
        return self.changed(images, variables) / 255

    @final
    def rounded(self, images: Tensor, variables: Mapping[str, Tensor]) -> Tensor:
        """UInt8[n c h w]: the changed images as a file would hold them."""
        with torch.no_grad():
            return self.levels(images, variables).to(torch.uint8)

    @final
    def __add__(self, other: Perturbation) -> Perturbation:
        """This change, followed by the other."""
        return SumOfPerturbations((self, other))


@final
@dataclass(frozen=True)
class LInf(Perturbation, kind="l-inf"):
    """Every value of an image changes by at most `eps`, after rounding too.

    The variable `delta` Float[n c h w] is the change, in 1/255; it starts uniform within the set.

    Arguments:
        eps: in 1/255, more than 0 and at most 255. Once images are rounded, only its whole part matters.

    Raises:
        InputError: eps is out of range.

    >>> images = torch.full((1, 1, 1, 3), 5, dtype=torch.uint8)
    >>> LInf(8).rounded(images, {"delta": torch.tensor([[[[-8.0, 0.4, 8.0]]]])}).flatten().tolist()
    [0, 5, 13]
    """

    eps: float

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 255:
            raise InputError(f"LInf: eps {self.eps} is outside (0, 255]; it is in 1/255, so 8 means 8/255")
        object.__setattr__(self, "eps", float(self.eps))

    def initial(self, images: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        """`delta`, uniform in [-eps, eps], less where the image would leave 0..255."""
        drawn = torch.rand(images.shape, generator=generator, device=generator.device).to(images.device)
        return self.project({"delta": (2 * drawn - 1) * self.eps}, images)

    def project(self, variables: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """`delta` within [-eps, eps], with the image in 0..255."""
        delta = variables["delta"].detach()
        images = images.to(delta.dtype)
        return {"delta": delta.clamp(-self.eps, self.eps).clamp(-images, 255 - images)}

    def scales(self) -> dict[str, float]:
        """eps."""
        return {"delta": self.eps}

    def penalty(self, variables: Mapping[str, Tensor]) -> Tensor:
        """Zeros."""
        return variables["delta"].new_zeros(len(variables["delta"]))

    def bound(self) -> float:
        """eps."""
        return self.eps

    def changed(self, images: Tensor, variables: Mapping[str, Tensor]) -> Tensor:
        """The images plus `delta`, clipped."""
        return (images + variables["delta"]).clamp(0, 255)

    def levels(self, images: Tensor, variables: Mapping[str, Tensor]) -> Tensor:
        """The images plus `delta`, rounded to the nearest level that is not farther than eps."""
        images = images.to(variables["delta"].dtype)
        # An eps of 0.9999 must not become 1 by the tolerance.
        eps = min(self.eps, math.floor(self.eps) + 1 - 2 * _TOLERANCE) + _TOLERANCE
        lowest = (images - eps).ceil().clamp(min=0)
        highest = (images + eps).floor().clamp(max=255)
        return (images + variables["delta"]).round().clamp(lowest, highest)


@final
@dataclass(frozen=True)
class ColorGrid(Perturbation, kind="color-grid"):
    """Every colour of an image moves to a nearby one, the same for all its pixels of that colour.

    The variable `grid` Float[n r r r 3] holds the offset, in YUV, of each node of an r x r x r grid over Y in
    [0, 1] and U, V in [-0.5, 0.5]; between the nodes it is interpolated trilinearly, and beyond the grid
    (which only saturated reds and cyans are) the nearest point of its surface counts. It starts at zero.
    MetaPoison interpolates the moved nodes themselves, which is the same inside the grid, but saturated
    colours then jump to its surface even if all offsets are zero.

    Arguments:
        eps: the largest offset of a node in each of Y, U and V, as a part of the whole range, in (0, 1].
        resolution: nodes along each axis, at least 2.
        smoothness: coefficient of the penalty, 0 or more. The penalty of an image is the mean over axes and
            nodes of ((difference of neighbouring nodes) * resolution)^2.

    Raises:
        InputError: a number is out of range.
    """

    eps: float = 0.04
    resolution: int = 10
    smoothness: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 1:
            raise InputError(f"ColorGrid: eps {self.eps} is outside (0, 1]; it is a part of the whole range")
        if self.resolution < 2:
            raise InputError(f"ColorGrid: resolution {self.resolution} is below 2")
        if self.smoothness < 0:
            raise InputError(f"ColorGrid: smoothness {self.smoothness} is below 0")

    def initial(self, images: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        """`grid`: zeros."""
        if images.shape[1] != 3:
            raise InputError(
                f"ColorGrid: needs images of 3 channels, these have {images.shape[1]}; use LInf alone"
            )
        nodes = (self.resolution,) * 3
        return {"grid": torch.zeros(len(images), *nodes, 3, device=images.device)}

    def project(self, variables: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """`grid` within [-eps, eps], and every moved node within the range of the grid."""
        grid = variables["grid"].detach()
        steps = torch.linspace(0, 1, self.resolution, dtype=grid.dtype, device=grid.device)
        # Y of the nodes is in 0..1, U and V the same minus 1/2, so all have the same room.
        nodes = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), -1)
        return {"grid": grid.clamp(-self.eps, self.eps).clamp(-nodes, 1 - nodes)}

    def scales(self) -> dict[str, float]:
        """eps."""
        return {"grid": self.eps}

    def penalty(self, variables: Mapping[str, Tensor]) -> Tensor:
        """Float[n]: the squared differences of neighbouring nodes, times `smoothness`."""
        grid = variables["grid"]
        axes = [(grid.diff(dim=axis) * self.resolution).square().flatten(1).mean(1) for axis in (1, 2, 3)]
        return self.smoothness * torch.stack(axes).mean(0)

    def bound(self) -> float:
        """The largest change of red, green or blue that offsets of eps in Y, U and V can make."""
        return 255 * self.eps * max(sum(map(abs, row)) for row in _TO_RGB)

    def changed(self, images: Tensor, variables: Mapping[str, Tensor]) -> Tensor:
        """The recoloured images, clipped."""
        grid = variables["grid"]
        images = images.to(grid.dtype)
        n, _, height, width = images.shape
        to_yuv, to_rgb = images.new_tensor(_TO_YUV), images.new_tensor(_TO_RGB)
        yuv = torch.einsum("ij,njhw->nhwi", to_yuv, images / 255)
        # grid_sample takes -1 to 1 from the first node to the last, and the last axis of the grid first.
        places = (2 * yuv - images.new_tensor((1.0, 0.0, 0.0))).flip(-1).reshape(n, 1, height, width, 3)
        offsets = F.grid_sample(
            grid.permute(0, 4, 1, 2, 3), places, mode="bilinear", padding_mode="border", align_corners=True
        )
        change = torch.einsum("ij,njhw->nihw", to_rgb, offsets[:, :, 0])
        return (images + 255 * change).clamp(0, 255)

    def levels(self, images: Tensor, variables: Mapping[str, Tensor]) -> Tensor:
        """The recoloured images, rounded."""
        return self.changed(images, variables).round()


@final
@dataclass(frozen=True)
class SumOfPerturbations(Perturbation, kind="sum"):
    """One change after another: `first + second`.

    The variables of term i are called `i.name`. Each term is projected for the images that result from those
    before it.

    Arguments:
        terms: in the order in which they act; sums among them are flattened.

    Raises:
        InputError: there is no term.

    >>> (ColorGrid() + LInf(8)).terms
    (ColorGrid(eps=0.04, resolution=10, smoothness=1.0), LInf(eps=8.0))
    """

    terms: tuple[Perturbation, ...]

    def __post_init__(self) -> None:
        flat: list[Perturbation] = []
        for term in self.terms:
            flat.extend(term.terms if isinstance(term, SumOfPerturbations) else (term,))
        if not flat:
            raise InputError("SumOfPerturbations: needs at least one term")
        object.__setattr__(self, "terms", tuple(flat))

    def initial(self, images: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        """The first variables of each term."""
        variables: dict[str, Tensor] = {}
        for place, term in enumerate(self.terms):
            own = term.initial(images, generator=generator)
            images = term.changed(images, own)
            variables |= prefixed(str(place), own)
        return variables

    def project(self, variables: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Each term's variables inside its own set."""
        projected: dict[str, Tensor] = {}
        for place, term in enumerate(self.terms):
            own = term.project(under(str(place), variables), images)
            images = term.changed(images, own)
            projected |= prefixed(str(place), own)
        return projected

    def scales(self) -> dict[str, float]:
        """Those of the terms."""
        return {
            f"{place}.{name}": scale
            for place, term in enumerate(self.terms)
            for name, scale in term.scales().items()
        }

    def penalty(self, variables: Mapping[str, Tensor]) -> Tensor:
        """The sum of the terms' penalties."""
        parts = [term.penalty(under(str(place), variables)) for place, term in enumerate(self.terms)]
        return torch.stack(parts).sum(0)

    def bound(self) -> float:
        """The sum of the terms' bounds."""
        return sum(term.bound() for term in self.terms)

    def changed(self, images: Tensor, variables: Mapping[str, Tensor]) -> Tensor:
        """The images after all changes, clipped after each."""
        for place, term in enumerate(self.terms):
            images = term.changed(images, under(str(place), variables))
        return images

    def levels(self, images: Tensor, variables: Mapping[str, Tensor]) -> Tensor:
        """The images after all changes, rounded as the last term does."""
        last = len(self.terms) - 1
        for place, term in enumerate(self.terms[:last]):
            images = term.changed(images, under(str(place), variables))
        return self.terms[last].levels(images, under(str(last), variables))

    def configuration(self) -> dict[str, Any]:
        """The terms' own configurations."""
        return {"terms": [term.to_json() for term in self.terms]}

    def tensors(self) -> dict[str, Tensor]:
        """The terms' tensors, under their places."""
        return {
            name: tensor
            for place, term in enumerate(self.terms)
            for name, tensor in prefixed(str(place), term.tensors()).items()
        }

    @classmethod
    def restore(cls, configuration: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SumOfPerturbations:
        """The sum that was stored."""
        terms = (
            Perturbation.from_json(term, under(str(place), tensors))
            for place, term in enumerate(configuration["terms"])
        )
        return cls(tuple(terms))
