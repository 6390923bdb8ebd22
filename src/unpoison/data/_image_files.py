"""`ImageFiles`: a map-style dataset of image files in folders, tables or tar shards, decoded as it is read.

A row is an image and its label. Without a transform the image is UInt8[c h w], of 3 channels where any file
is coloured, exactly as a `TrainingSet` holds it. With one it is what the transform makes of the picture in
RGB, as torchvision and timm load it (an alpha channel is dropped).

`Files` is a training set of them with its test set: `held` decodes all of it into memory, `lazily` reads it
batch by batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from unpoison.data._dataset_examples import DatasetExamples
from unpoison.data._images import (
    AS_THEY_ARE,
    Encoded,
    Preparation,
    decode,
    decode_all,
    different_size,
    is_coloured,
    opened,
    pillow_picture,
    pixels_channels_first,
)
from unpoison.data._splits import Splits, with_equal_channels
from unpoison.data._training_set import TrainingSet
from unpoison.errors import InputError, one_line

Transform = Callable[[Any], Any]
"""From a picture of Pillow in RGB to what the network takes: a tensor or an array, the same at every call."""


@final
@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Labelled image files.

    Arguments:
        name: what to call the set in messages.
        root: what the names of files are relative to.
        encoded: where each image lies, n in all, at least one.
        ids: what people call them.
        targets: Int64[n], the labels.
        classes: the names of the classes.
        preparation: how pictures are brought to one size and turned.
        transform: what is made of each picture.
        places: what to call each image in messages; its path when None.
    """

    name: str
    root: Path
    encoded: Sequence[Encoded]
    ids: Sequence[str]
    targets: Tensor
    classes: tuple[str, ...]
    preparation: Preparation = AS_THEY_ARE
    transform: Transform | None = None
    places: Sequence[str] | None = None
    channels: int | None = None

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.read(self.where(index), self.encoded[index]), int(self.targets[index])

    def where(self, index: int) -> str:
        """What to call an image in messages."""
        return str(self.encoded[index]) if self.places is None else self.places[index]

    @property
    def samples(self) -> list[tuple[Path, int]]:
        """The file that each image lies in, and its label, as in torchvision's `ImageFolder`."""
        paths = [one if isinstance(one, Path) else one.path for one in self.encoded]
        return list(zip(paths, self.targets.tolist(), strict=True))

    def read(self, where: str, encoded: Encoded) -> Any:
        """An image file as the rows of this set are read, whether it is one of them or not.

        Raises:
            InputError: it does not decode, the transform fails, or it is of another size than the first.
        """
        if self.transform is not None:
            return transformed(where, opened(where, encoded, self.preparation), self.transform)
        array = decode(where, encoded, self.preparation)
        height, width = self._first
        if array.shape[:2] != (height, width):
            raise InputError(different_size(where, array.shape, self.where(0), self._first))
        image = torch.from_numpy(pixels_channels_first(array))
        return image.expand(3, -1, -1) if self.coloured else image

    @cached_property
    def coloured(self) -> bool:
        """Whether images have three channels: whether any is no grey one, by the heads of the files."""
        if self.channels is not None:
            return self.channels == 3
        return any(is_coloured(self.where(row), one) for row, one in enumerate(self.encoded))

    @cached_property
    def _first(self) -> tuple[int, int]:
        height, width = decode(self.where(0), self.encoded[0], self.preparation).shape[:2]
        return height, width

    def held_bytes(self) -> int:
        """How much memory all images take as 8-bit pixels. Cost: one image is decoded."""
        height, width = self._first
        return len(self) * height * width * (3 if self.coloured else 1)

    def held(self) -> TrainingSet:
        """All images in memory."""
        images = decode_all(
            [(self.where(row), one) for row, one in enumerate(self.encoded)], self.preparation
        )
        return TrainingSet(images, self.targets, self.classes, self.name, tuple(self.ids))

    def lazily(self, **options: Any) -> DatasetExamples:
        """The same set, decoded batch by batch; the options are those of `DatasetExamples`."""
        return DatasetExamples(
            self,
            inputs=0,
            labels=self.targets,
            ids=self.ids,
            class_names=self.classes,
            name=self.name,
            **options,
        )


@final
@dataclass(frozen=True)
class Files:
    """A training set of image files, the test set where there is one, and what was done in listing them."""

    train: ImageFiles
    test: ImageFiles | None = None
    notes: tuple[str, ...] = ()

    def held(self) -> Splits[TrainingSet]:
        """Both in memory."""
        train = self.train.held()
        if self.test is None:
            return Splits(train, notes=self.notes)
        return Splits(*with_equal_channels(train, self.test.held()), self.notes)

    def lazily(self, **options: Any) -> Splits[DatasetExamples]:
        """Both read batch by batch."""
        train, test = self.train, self.test
        if test is not None and train.transform is None:
            channels = 3 if train.coloured or test.coloured else 1
            train, test = (replace(one, channels=channels) for one in (train, test))
        read = None if test is None else test.lazily(**options)
        return Splits(train.lazily(**options), read, self.notes)

    def transformed(self, transform: Transform) -> Files:
        """The same files, read through a transform."""
        test = None if self.test is None else replace(self.test, transform=transform)
        return Files(replace(self.train, transform=transform), test, self.notes)

    def held_bytes(self) -> int:
        """How much memory both take as 8-bit pixels."""
        return sum(one.held_bytes() for one in (self.train, self.test) if one is not None)


@final
class Pictures:
    """Images in memory as a map-style dataset of what a transform makes of them.

    Arguments:
        held: the images.
        transform: of each picture, as for `ImageFiles`.
    """

    def __init__(self, held: TrainingSet, transform: Transform) -> None:
        self.held, self.transform = held, transform
        self.targets, self.classes = held.labels, held.class_names
        self._fingerprint = held.fingerprint

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.held[index]
        where = f"{self.held.name}: row {index}"
        return transformed(where, pillow_picture(image).convert("RGB"), self.transform), label

    def read(self, where: str, encoded: Encoded) -> Any:
        """An image file as the rows of this set are read."""
        return transformed(where, opened(where, encoded, AS_THEY_ARE), self.transform)


def pictures_of(splits: Splits[TrainingSet], transform: Transform, **options: Any) -> Splits[DatasetExamples]:
    """Images in memory through a transform; the options are those of `DatasetExamples`."""

    def read(held: TrainingSet) -> DatasetExamples:
        rows = Pictures(held, transform)
        return DatasetExamples(rows, inputs=0, labels=held.labels, ids=held.ids, name=held.name, **options)

    test = None if splits.test is None else read(splits.test)
    return Splits(read(splits.train), test, splits.notes)


def read_transformed(
    path: str | os.PathLike[str], transform: Transform, *, preparation: Preparation = AS_THEY_ARE
) -> Any:
    """What a transform makes of the picture in a file, in RGB as torchvision and timm load it.

    Arguments:
        path: the file.
        transform: of the picture.
        preparation: whether to turn it as its EXIF orientation says, and how to resize it, before that.

    Raises:
        InputError: the file does not decode, or the transform fails.
    """
    return transformed(str(path), opened(str(path), Path(path), preparation), transform)


def transformed(where: str, picture: Any, transform: Transform) -> Any:
    """What a transform makes of a picture.

    Raises:
        InputError: it fails.
    """
    try:
        return transform(picture)
    except Exception as error:
        raise InputError(
            f"{where}: the transform failed ({type(error).__name__}: {one_line(error)})"
        ) from error
