"""`TrainingSet`: images and labels in memory, 8 bits a channel, with a fingerprint of their content.

Examples are named by their index in a `TrainingSet`, and everything that is stored about one carries its
fingerprint, so that poison or findings of one set are never applied to another by mistake. Images are uint8,
as they would be saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from unpoison._artefacts import canonical_json, digest
from unpoison.data._classes import as_class_names
from unpoison.data._examples import Indices, ids_at
from unpoison.errors import InputError


@final
@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Labelled images: UInt8[n c h w], Int64[n] and the names of the classes.

    Sets are never changed in place: `subset`, `without` and `with_examples` give new ones. These take the
    indices of examples, or a mask Bool[n].

    Arguments:
        images: UInt8[n c h w]; grey images have one channel. May be memory-mapped.
        labels: Int64[n], each in 0..len(class_names)-1, on the device of the images.
        class_names: one name a class, at least two; stored as text.
        name: what to call the set in messages and reports.
        ids: n names of files or keys of rows, by which people know the examples; not part of the fingerprint.

    Raises:
        InputError: shapes, types or devices do not match, a label is out of range, or there are fewer than
            two classes.

    >>> images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    >>> training_set = TrainingSet(images, torch.tensor([0, 1, 0, 1]), ("a", "b"))
    >>> len(training_set.without([0])), training_set.image_shape
    (3, (1, 8, 8))
    >>> training_set.subset(torch.tensor([True, False, False, True])).labels
    tensor([0, 1])
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str = "training set"
    ids: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise InputError(
                f"{self.name}: images must be uint8 of shape [n, channels, height, width], "
                f"found {self.images.dtype} of shape {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise InputError(
                f"{self.name}: labels must be int64 of shape [{len(self.images)}], "
                f"found {self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )
        if self.labels.device != self.images.device:
            raise InputError(
                f"{self.name}: images lie on {self.images.device}, labels on {self.labels.device}; move one"
            )
        object.__setattr__(self, "class_names", as_class_names(self.name, self.class_names))
        if len(self.class_names) < 2:
            raise InputError(f"{self.name}: needs at least two classes, found {len(self.class_names)}")
        if self.ids is not None and len(self.ids) != len(self.labels):
            raise InputError(f"{self.name}: {len(self.ids)} ids for {len(self.labels)} examples")
        outside = ((self.labels < 0) | (self.labels >= len(self.class_names))).nonzero()
        if len(outside):
            row = int(outside[0])
            raise InputError(
                f"{self.name}: row {row}: label {int(self.labels[row])} is outside "
                f"0..{len(self.class_names) - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image UInt8[c h w] and the label of one example."""
        return self.images[index], int(self.labels[index])

    @property
    def num_classes(self) -> int:
        """How many classes there are, including classes without examples."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def input_shape(self) -> tuple[int, ...]:
        """As `image_shape`."""
        return self.image_shape

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self.images.device

    @cached_property
    def fingerprint(self) -> str:
        """A digest of images, labels and class names; equal on every device and for every `name`."""
        # In pieces, so that a memory map is never read into memory as a whole.
        pieces = (self.images[start : start + 4096].cpu().numpy() for start in range(0, len(self), 4096))
        return digest(
            canonical_json([list(self.images.shape), list(self.class_names)]),
            *(digest(np.ascontiguousarray(piece).tobytes()) for piece in pieces),
            self.labels.cpu().numpy().tobytes(),
        )

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Examples `start` to `stop` as Float32[b c h w] in [0, 1] and Int64[b]."""
        return self.images[start:stop].float().div_(255), self.labels[start:stop]

    def at(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """The examples at `indices`, as `batch` gives them."""
        rows = self.indices(indices)
        return self.images[rows].float().div_(255), self.labels[rows]

    def in_batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of at most `size` examples, of those at Int64[k] `order` or of all."""
        if order is None:
            return (self.batch(start, start + size) for start in range(0, len(self), size))
        return (self.at(rows) for rows in torch.split(order, size))

    def class_counts(self) -> Tensor:
        """Int64[classes]: how many examples each class has."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    @cached_property
    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, in units of the whole range [0, 1]."""
        channels = self.image_shape[0]
        total, squares = torch.zeros(2, channels, dtype=torch.float64)
        for start in range(0, len(self), 4096):
            pixels = self.images[start : start + 4096].to("cpu", torch.float64) / 255
            total += pixels.sum((0, 2, 3))
            squares += pixels.square().sum((0, 2, 3))
        count = max(self.images.numel() // channels, 1)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        return tuple(mean.tolist()), tuple(std.clamp(min=1e-3).tolist())

    def to(self, device: torch.device | str) -> TrainingSet:
        """The same set on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, indices: Indices) -> TrainingSet:
        """The examples at `indices`, in that order."""
        chosen = self.indices(indices)
        ids = ids_at(self.ids, chosen)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen], ids=ids)

    def without(self, indices: Indices) -> TrainingSet:
        """All examples except those at `indices`, in order."""
        keep = torch.ones(len(self), dtype=torch.bool, device=self.device)
        keep[self.indices(indices)] = False
        return self.subset(keep)

    def with_examples(self, indices: Indices, images: Tensor, labels: Tensor) -> TrainingSet:
        """The set with the examples at `indices` replaced: UInt8[k c h w] `images`, Int64[k] `labels`."""
        chosen = self.indices(indices)
        if images.shape != (len(chosen), *self.image_shape):
            raise InputError(
                f"{self.name}: replacing {len(chosen)} examples needs images of shape "
                f"{(len(chosen), *self.image_shape)}, found {tuple(images.shape)}"
            )
        new_images, new_labels = self.images.clone(), self.labels.clone()
        new_images[chosen] = images.to(self.device)
        new_labels[chosen] = labels.to(self.device)
        return replace(self, images=new_images, labels=new_labels)

    def followed_by(self, other: TrainingSet) -> TrainingSet:
        """The examples of this set, and after them those of another with the same classes and image shape.

        They have ids where both sets have.
        """
        ids = None if self.ids is None or other.ids is None else (*self.ids, *other.ids)
        return replace(
            self,
            images=torch.cat([self.images, other.images]),
            labels=torch.cat([self.labels, other.labels]),
            ids=ids,
        )

    def indices(self, chosen: Indices) -> Tensor:
        """Int64[k], on the device of the images: the indices of the chosen examples.

        Arguments:
            chosen: indices in any order, or a mask Bool[n].

        Raises:
            InputError: an index is out of range, or these are neither whole numbers nor such a mask.
        """
        given = torch.as_tensor(chosen, device=self.device)
        if given.dtype == torch.bool:
            if given.shape != (len(self),):
                raise InputError(
                    f"{self.name}: a mask must be bool [{len(self)}], found {tuple(given.shape)}"
                )
            return given.nonzero().reshape(-1)
        if given.numel() and (given.is_floating_point() or given.is_complex()):
            raise InputError(f"{self.name}: indices must be whole numbers, found {given.dtype}")
        found = given.to(torch.int64).reshape(-1)
        outside = (found < 0) | (found >= len(self))
        if bool(outside.any()):
            raise InputError(f"{self.name}: index {int(found[outside][0])} is outside 0..{len(self) - 1}")
        return found
