"""Any dataset as examples (`as_examples`), or as 8-bit images in memory (`from_dataset`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unpoison._memory import check_memory
from unpoison.data._classes import as_class_names, class_names_or_numbers
from unpoison.data._dataset_examples import DatasetExamples
from unpoison.data._examples import Examples, is_examples
from unpoison.data._fetch import Sampled, changes
from unpoison.data._grid import OffGridError, eight_bit, grid_tolerance
from unpoison.data._images import pillow_pixels
from unpoison.data._source import MapStyle, Part, Source, as_number, as_numbers, shown
from unpoison.data._training_set import TrainingSet
from unpoison.errors import InputError

HELD_BYTES: Final = 1 << 29
"""A dataset of 8-bit images that takes no more than 512 MiB is held in memory; a larger one is read anew."""


def as_examples(dataset: Examples | MapStyle, *, held_bytes: int = HELD_BYTES, **reading: Any) -> Examples:
    """Examples as they are, any other dataset as a `TrainingSet` or else as `DatasetExamples`.

    A dataset of 8-bit images (uint8, PIL, or floats that are multiples of 1/255) that takes at most
    `held_bytes` becomes a `TrainingSet`; anything else is read in batches, and gives the network what the
    dataset gives.

    Arguments:
        dataset: the examples, or anything with `len()` and `[index]`.
        held_bytes: how much memory a `TrainingSet` may take.
        **reading: options of `DatasetExamples`, such as `workers`.

    Raises:
        InputError: as `DatasetExamples`; or all inputs take more than the memory of this machine and no
            options say how to read them, in which case the dataset must be given as `DatasetExamples`, since
            a pass over it takes long.
    """
    if is_examples(dataset):
        return dataset
    sampled = Sampled(Source(dataset))
    total = sampled.bytes_of_a_row * len(sampled.source)
    if total > _memory() and not reading:
        raise InputError(
            f"{sampled.source.name}: its {len(sampled.source):,} inputs take {total / 1e9:,.0f} GB, more "
            f"than the memory here ({_memory() / 1e9:,.0f} GB); give "
            "data.DatasetExamples(dataset, workers=...), which reads it in batches, or a Subset"
        )
    if _pixels_of_a_row(sampled.source) * len(sampled.source) <= held_bytes:
        try:
            return _held(sampled.source, None, None)
        except OffGridError:
            pass  # a later row
    return DatasetExamples(sampled, **reading)


def as_training_set(examples: Examples | MapStyle) -> TrainingSet:
    """A training set as it is, any other dataset through `from_dataset`.

    Raises:
        InputError: as `from_dataset`.
    """
    if isinstance(examples, TrainingSet):
        return examples
    if isinstance(examples, DatasetExamples):
        return _from_examples(examples)
    if is_examples(examples):
        raise InputError(
            f"{examples.name}: this works on 8-bit images alone; give a TrainingSet, or use a method that "
            "needs none"
        )
    return from_dataset(examples)


def from_dataset(
    dataset: Any,
    *,
    inputs: Part | None = None,
    labels: Part | Sequence[Any] | Tensor | None = None,
    ids: Part | Sequence[str] | None = None,
    class_names: Sequence[Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
) -> TrainingSet:
    """Read a map-style dataset of images and labels into memory as 8-bit images.

    An image is a PIL image, or a tensor or array: uint8 of shape [c h w], [h w c] or [h w], or float of these
    shapes in [0, 1] (after `mean` and `std` are undone). Floats must be 8-bit levels divided by 255, as
    `ToTensor` gives them; others are refused, since the pixels read would not be those trained on. A label is
    a whole number or the name of a class.

    Every example is read once, up to 64 spread over the set twice: a dataset that then gives another image
    augments at random. Give it without random transforms; the trainer augments by itself.

    Arguments:
        dataset: anything with `len()` and `[index]`.
        inputs: which part of a row is the image; see `DatasetExamples`, like `labels` and `ids`.
        labels: which part is the label, or all labels.
        ids: which part names the example, or all names.
        class_names: the names of the classes; by default the dataset's `classes`, as in torchvision, else
            "0", "1", ... up to the largest label.
        mean: what the dataset's normalisation subtracts from each channel.
        std: what it then divides each channel by.
        name: what to call the set in messages; by default the name of the dataset's type.

    Raises:
        InputError: the dataset is not map-style, is empty, augments at random, an image is of another kind or
            size, off the 8-bit grid or NaN, a label is out of range, there are fewer than two classes, or the
            images do not fit into memory.
    """
    called = name or type(dataset).__name__
    normalisation = _normalisation(called, mean, std)
    source = Source(dataset, inputs=inputs, labels=labels, ids=ids, name=name)
    return _held(source, class_names, normalisation)


def _held(
    source: Source, class_names: Sequence[Any] | None, normalisation: _Normalisation | None
) -> TrainingSet:
    count, called = len(source), source.name
    twice = set(source.sampled)
    images: Tensor | None = None
    found: list[int | str] = []
    ids: list[str] = []
    given = source.labels()
    for index in range(count):
        where = f"{called}: row {index}"
        row = source.row(index)
        pixels = _pixels(where, source.input_of(where, row), normalisation)
        if given is None:
            found.append(as_number(where, source.label_of(where, row)))
        if source.id_part is not None:
            ids.append(str(source.id_of(where, row)))
        if index in twice and not np.array_equal(
            pixels, _pixels(where, source.input_of(where, source.row(index)), normalisation)
        ):
            raise InputError(changes(where))
        if images is None:
            _check_memory(called, count, pixels.nbytes)
            images = torch.empty((count, *pixels.shape), dtype=torch.uint8)
        if pixels.shape[1:] != images.shape[2:]:
            raise InputError(
                f"{where}: is {pixels.shape[2]}x{pixels.shape[1]} pixels, but row 0 is "
                f"{images.shape[3]}x{images.shape[2]}; bring all images to one size first"
            )
        if len(pixels) > images.shape[1]:  # a coloured image among grey ones makes all coloured
            images = images.expand(-1, 3, -1, -1).contiguous()
        images[index] = torch.from_numpy(pixels)
    assert images is not None
    known = source.class_names() if class_names is None else as_class_names(called, class_names)
    labels, known = as_numbers(called, found if given is None else given, known)
    names = class_names_or_numbers(called, known, {called: labels})
    return TrainingSet(images, labels, names, called, tuple(ids) or source.ids())


def _from_examples(examples: DatasetExamples) -> TrainingSet:
    """The same rows with the same labels, names and order."""
    try:
        held = _held(examples.source, examples.class_names, None)
    except OffGridError as error:
        raise InputError(f"{error} (this works on 8-bit images in memory, a TrainingSet)") from None
    rows = examples.rows
    return TrainingSet(held.images[rows], examples.labels, examples.class_names, held.name, examples.ids)


def _pixels_of_a_row(source: Source) -> float:
    """How many bytes an image takes in a `TrainingSet`; infinite where row 0 is no 8-bit image."""
    if source.collate_fn is not None:
        return float("inf")
    try:
        return float(_pixels("", source.input_of("", source.row(0)), None).nbytes)
    except InputError:
        return float("inf")


def _memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_memory(called: str, count: int, size: int) -> None:
    check_memory(
        called,
        {f"{count:,} images": count * size},
        advice="trace and scan read data.DatasetExamples(dataset) in batches, what changes or trains on "
        "8-bit images needs a Subset",
    )


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


def _pixels(
    where: str, image: Any, normalisation: _Normalisation | None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pixels UInt8[c h w] of one example."""
    if isinstance(image, Image.Image):
        return pillow_pixels(where, image)
    if isinstance(image, list):  # numbers, as a dataset of Hugging Face gives a column of arrays
        image = np.asarray(image)
    if isinstance(image, Tensor):
        if image.dtype == torch.bfloat16:
            raise OffGridError(f"{where}: bfloat16 does not tell 8-bit levels apart; give uint8 or float32")
        array, channels_first = image.detach().cpu().numpy(), True
    elif isinstance(image, np.ndarray):
        array, channels_first = image, False
    else:
        raise OffGridError(
            f"{where}: its image must be a PIL image, a tensor or an array, found {shown(image)}"
        )
    array = _channels_first(where, array, prefer_first=channels_first)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f":
        raise OffGridError(
            f"{where}: pixels must be uint8 or float, found {array.dtype}; convert them to uint8"
        )
    return _levels(where, array, normalisation)


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
    raise OffGridError(
        f"{where}: an image must have shape [c h w], [h w c] or [h w], c being 1 or 3, found {array.shape}"
    )
