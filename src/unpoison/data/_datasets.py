"""Any map-style dataset of pairs as a training set: `from_dataset` and `as_training_set`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unpoison.data._classes import as_labels, class_names_or_numbers
from unpoison.data._grid import eight_bit, grid_tolerance
from unpoison.data._images import pillow_pixels
from unpoison.data._training_set import TrainingSet
from unpoison.errors import InputError

_ASKED_TWICE = 8


@runtime_checkable
class MapStyle(Protocol):
    """A map-style dataset, as PyTorch calls it: examples with a count and an index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def as_training_set(examples: TrainingSet | MapStyle) -> TrainingSet:
    """A training set as it is, any other map-style dataset through `from_dataset`."""
    return examples if isinstance(examples, TrainingSet) else from_dataset(examples)


def from_dataset(
    dataset: MapStyle,
    *,
    class_names: Sequence[Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
) -> TrainingSet:
    """Read a map-style dataset of (image, label) pairs into memory as 8-bit images.

    An image is a PIL image, or a tensor or array: uint8 of shape [c h w], [h w c] or [h w], or float of these
    shapes in [0, 1] (after `mean` and `std` are undone). Floats must be 8-bit levels divided by 255, as
    `ToTensor` gives them; others are refused, since the pixels read would not be those trained on. A label is
    a whole number.

    Every example is read once, the first 8 twice: a dataset that then gives another image augments at random.
    Give it without random transforms; the trainer augments by itself.

    Arguments:
        dataset: anything with `len()` and `[index]`.
        class_names: the names of the classes; by default the dataset's `classes`, as in torchvision, else
            "0", "1", ... up to the largest label.
        mean: what the dataset's normalisation subtracts from each channel.
        std: what it then divides each channel by.
        name: what to call the set in messages; by default the name of the dataset's type.

    Raises:
        InputError: the dataset is not map-style, is empty, augments at random, an image is of another kind or
            size, off the 8-bit grid or NaN, a label is out of range, or there are fewer than two classes.
    """
    called = name or type(dataset).__name__
    normalisation = _normalisation(called, mean, std)
    try:
        count = len(dataset) if isinstance(dataset, MapStyle) else None
    except TypeError:
        count = None
    if count is None:
        raise InputError(f"{called}: is not a map-style dataset; give one with len() and [index]")
    if count == 0:
        raise InputError(f"{called}: holds no examples")
    images: Tensor | None = None
    labels = []
    for index in range(count):
        where = f"{called}: row {index}"
        pixels, label = _example(where, dataset[index], normalisation)
        if index < _ASKED_TWICE and not np.array_equal(
            pixels, _example(where, dataset[index], normalisation)[0]
        ):
            raise InputError(
                f"{where}: the image changes when it is read again; give the dataset without random "
                f"transforms"
            )
        if images is None:
            images = torch.empty((count, *pixels.shape), dtype=torch.uint8)
        if pixels.shape[1:] != images.shape[2:]:
            raise InputError(
                f"{where}: is {pixels.shape[2]}x{pixels.shape[1]} pixels, but row 0 is "
                f"{images.shape[3]}x{images.shape[2]}; bring all images to one size first"
            )
        if len(pixels) > images.shape[1]:  # a coloured image among grey ones makes all coloured
            images = images.expand(-1, 3, -1, -1).contiguous()
        images[index] = torch.from_numpy(pixels)
        labels.append(label)
    assert images is not None
    known = class_names if class_names is not None else getattr(dataset, "classes", None)
    checked = as_labels(called, np.array(labels))
    return TrainingSet(images, checked, class_names_or_numbers(called, known, {called: checked}), called)


_Normalisation = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _normalisation(
    called: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> _Normalisation | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None or len(mean) != len(std) or len(mean) not in (1, 3) or min(std) <= 0:
        raise InputError(
            f"{called}: mean and std must come together, one positive std and one mean a channel (1 or 3)"
        )
    return np.array(mean, np.float64)[:, None, None], np.array(std, np.float64)[:, None, None]


def _example(
    where: str, pair: Any, normalisation: _Normalisation | None
) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], int]:
    """The pixels UInt8[c h w] and the label of one example."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InputError(f"{where}: must be a pair (image, label), found {type(pair).__name__}")
    image, label = pair
    try:
        plain: Any = label.item() if isinstance(label, Tensor | np.ndarray) else label
        number = operator.index(plain)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{where}: its label must be a whole number, found {_shown(label)}") from None
    if not 0 <= number < 2**31:
        raise InputError(f"{where}: label {number} is out of range; classes are numbered from 0")
    if isinstance(image, Image.Image):
        return pillow_pixels(where, image), number
    if isinstance(image, Tensor):
        if image.dtype == torch.bfloat16:
            raise InputError(f"{where}: bfloat16 does not tell 8-bit levels apart; give uint8 or float32")
        array, channels_first = image.detach().cpu().numpy(), True
    elif isinstance(image, np.ndarray):
        array, channels_first = image, False
    else:
        raise InputError(
            f"{where}: its image must be a PIL image, a tensor or an array, found {_shown(image)}"
        )
    array = _channels_first(where, array, prefer_first=channels_first)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array), number
    if array.dtype.kind != "f":
        raise InputError(
            f"{where}: pixels must be uint8 or float, found {array.dtype}; convert them to uint8"
        )
    return _levels(where, array, normalisation), number


def _levels(
    where: str, array: np.ndarray[Any, Any], normalisation: _Normalisation | None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    values, tolerance = array.astype(np.float64), grid_tolerance(array.dtype)
    if normalisation is not None:
        mean, std = normalisation
        if len(mean) not in (1, len(values)):
            raise InputError(f"{where}: has {len(values)} channels, but mean and std are for {len(mean)}")
        values = values * std + mean
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = eight_bit(
        lambda _: where,
        values[None],
        tolerance=tolerance,
        if_outside="if the dataset normalises its images, give its mean and std",
        if_between="give the mean and std of the normalisation, and no transforms that resample",
    )[0]
    return pixels


def _channels_first(where: str, array: np.ndarray[Any, Any], *, prefer_first: bool) -> np.ndarray[Any, Any]:
    """[c h w] from [h w], [c h w] or [h w c]; `prefer_first` decides where both of the last two could be."""
    if array.ndim == 2:
        return array[None]
    if array.ndim == 3 and array.size:
        first, last = array.shape[0] in (1, 3), array.shape[2] in (1, 3)
        if first and (prefer_first or not last):
            return array
        if last:
            return array.transpose(2, 0, 1)
    raise InputError(
        f"{where}: an image must have shape [c h w], [h w c] or [h w], c being 1 or 3, found {array.shape}"
    )


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:60]
