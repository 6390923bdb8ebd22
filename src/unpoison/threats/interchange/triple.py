"""The triple of pickles: `poisons.pickle`, `base_indices.pickle` and `target.pickle`.

The format of the poisoning benchmark (Schwarzschild et al. 2021, arXiv 2006.12557): 8-bit images with labels,
their places in the training set, and the target. A target file that contains a torch tensor (the patch of a
backdoor, in some sets of the benchmark) is refused, because torch reads those by running a pickle of its own;
with `goal` given the file is not opened.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unpoison._artefacts import atomic_directory
from unpoison.data import TrainingSet, read_pickle, write_pickle
from unpoison.errors import InputError, one_line
from unpoison.threats._backdoor import Backdoor
from unpoison.threats._given_images import TargetedMisclassification
from unpoison.threats._goal import Goal
from unpoison.threats._poison_set import PoisonSet
from unpoison.threats._trigger import PatchTrigger
from unpoison.threats.interchange.common import fitting, imported

_BANDS = MappingProxyType({"L": 1, "RGB": 3})


@final
class _Picture:
    """A stand-in for `PIL.Image.Image` in a pickle, which takes 8-bit pixels of the right number alone."""

    __slots__ = ("pixels",)
    pixels: NDArray[np.uint8]

    def __new__(cls, *_: Any) -> _Picture:
        picture = super().__new__(cls)
        picture.pixels = np.zeros((0, 0, 0), np.uint8)
        return picture

    def __setstate__(self, state: Any) -> None:
        _info, mode, size, _palette, content = tuple(state)[:5]
        mode = mode.decode("latin-1") if isinstance(mode, bytes) else mode
        if mode not in _BANDS or not isinstance(content, bytes):
            raise ValueError(f"an image of mode {ascii(mode)[:20]}; only 8-bit grey and colour are read")
        width, height = (int(side) for side in size)
        if min(width, height) < 1 or len(content) != width * height * _BANDS[mode]:
            raise ValueError("an image with more or fewer pixels than its size says")
        rows = np.frombuffer(content, np.uint8).reshape(height, width, _BANDS[mode])
        self.pixels = np.ascontiguousarray(rows.transpose(2, 0, 1))


_PICTURES = MappingProxyType({("PIL.Image", "Image"): _Picture})


def read_triple(
    folder: str | os.PathLike[str],
    training_set: TrainingSet,
    *,
    goal: Goal | None = None,
    true_label: int | None = None,
    eps: float | None = None,
    attack: str = "imported",
) -> PoisonSet:
    """Read the poisoning benchmark's triple.

    If a base index occurs twice, as in two published set-ups, the later poison counts. A target with a patch
    becomes a `Backdoor` from its class to the poisons' label, any other a `TargetedMisclassification`.

    Arguments:
        folder: with `poisons.pickle`, `base_indices.pickle` and, unless `goal` is given, `target.pickle`.
        training_set: the clean set that the indices refer to.
        goal: what the adversary wants; None reads it from `target.pickle`.
        true_label: the class of the target image, which older files do not contain.
        eps: the greatest change that was allowed, in 1/255; more than half a step above it is an error.
        attack: what to call the attack.

    Raises:
        InputError: a file is missing, damaged or contains anything but images, arrays and containers; the
            numbers of poisons and indices differ; the poisons do not fit the training set or change more than
            `eps`; the target's label is neither in the file nor given.
    """
    place = Path(folder)
    poisons = _sequence(place / "poisons.pickle", read_pickle(place / "poisons.pickle", admit=_PICTURES))
    bases_file = place / "base_indices.pickle"
    indices = _whole_numbers(bases_file, read_pickle(bases_file))
    if len(indices) != len(poisons):
        raise InputError(f"{place}: {len(poisons)} poisons, but {len(indices)} base indices")
    images, labels = [], []
    for number, poison in enumerate(poisons):
        where = f"{place / 'poisons.pickle'}: poison {number}"
        if not isinstance(poison, tuple | list) or len(poison) != 2:
            raise InputError(f"{where}: must be a pair of image and label")
        images.append(_pixels(where, poison[0], training_set))
        labels.append(_label(where, poison[1]))
    if goal is None:
        goal = _goal_of_triple(place / "target.pickle", labels, training_set, true_label)
    # Of two poisons of one index the later one is in the poisoned set.
    last = {index: row for row, index in enumerate(indices)}
    rows = sorted(last.values())
    return imported(
        str(place),
        training_set,
        indices=[indices[row] for row in rows],
        images=torch.stack([images[row] for row in rows]),
        labels=[labels[row] for row in rows],
        goal=goal,
        attack=attack,
        format="triple",
        eps=eps,
    )


def write_triple(folder: str | os.PathLike[str], poison: PoisonSet, test_set: TrainingSet) -> None:
    """Write the poisoning benchmark's triple: pickles of PIL images, for tools that read nothing else.

    The poisons are in the order of their indices; grey images become RGB, which the format requires. A
    backdoor's target is the first test image of its source class, with the patch and the place [row, column]
    of its top left corner.

    Arguments:
        folder: replaced as a whole if it exists.
        poison: for one target image, or a backdoor with one source class and a patch without holes.
        test_set: where a backdoor's target image comes from.

    Raises:
        InputError: the format cannot express this goal, or images have neither 1 nor 3 channels.
    """
    target = _target_of(poison.goal, test_set)
    pictures = [
        (_picture(image), int(label))
        for image, label in zip(poison.images, poison.given_labels.tolist(), strict=True)
    ]
    with atomic_directory(folder) as staging:
        write_pickle(staging / "poisons.pickle", pictures)
        write_pickle(staging / "base_indices.pickle", poison.indices.numpy())
        write_pickle(staging / "target.pickle", target)


def _goal_of_triple(
    file: Path, labels: Sequence[int], training_set: TrainingSet, true_label: int | None
) -> Goal:
    if not file.exists():
        raise InputError(f"{file}: no such file; give goal= instead")
    content = read_pickle(file, admit=_PICTURES)
    wanted = sorted(set(labels))
    if len(wanted) != 1:
        raise InputError(f"{file.parent}: the poisons have the labels {wanted}, not one; give goal=")
    parts = tuple(content) if isinstance(content, tuple | list) else (content,)
    image = _pixels(str(file), parts[0] if parts else None, training_set)
    if len(parts) >= 2 and parts[1] is not None:
        true_label = _label(str(file), parts[1])
    if true_label is None:
        raise InputError(f"{file}: does not contain the class of the target image; give true_label=")
    if len(parts) < 4:
        return TargetedMisclassification(image[None], true_label, wanted[0])
    try:
        row, column = (int(number) for number in parts[3])
        patch = np.asarray(parts[2])
        if patch.dtype.kind == "f":
            patch = np.rint(patch * (255 if patch.max() <= 1 else 1))
        patch = patch.astype(np.uint8)
        if patch.ndim == 3 and patch.shape[0] not in (1, 3):
            patch = patch.transpose(2, 0, 1)
        values = torch.from_numpy(np.ascontiguousarray(patch))
        trigger = PatchTrigger(values, torch.ones(values.shape[1:], dtype=torch.bool), row, column, "patch")
    except (TypeError, ValueError, IndexError) as error:
        message = f"{file}: its patch cannot be read ({one_line(error)}); give goal= instead"
        raise InputError(message) from None
    return Backdoor(trigger, true_label, wanted[0])


def _target_of(goal: Goal, test_set: TrainingSet) -> tuple[Any, ...]:
    """The content of `target.pickle`."""
    if isinstance(goal, TargetedMisclassification):
        if len(goal.images) != 1:
            raise InputError(f"the triple holds one target image, this goal has {len(goal.images)}")
        return _picture(goal.images[0]), goal.true_label
    if not isinstance(goal, Backdoor) or not isinstance(goal.trigger, PatchTrigger) or goal.source is None:
        raise InputError(
            f"the triple holds a target image, or a backdoor with a patch and one source class, not this "
            f"{goal.kind!r}"
        )
    trigger = goal.trigger
    if bool((trigger.mask != 255).any()):
        raise InputError(f"the triple holds patches without holes, {trigger.name!r} has some")
    indices = goal.candidates(test_set)
    if not len(indices):
        raise InputError(f"{test_set.name}: no image of class {goal.source}")
    _, height, width = test_set.image_shape
    row = trigger.row if trigger.row >= 0 else height + trigger.row
    column = trigger.column if trigger.column >= 0 else width + trigger.column
    patch = (trigger.values.float() / 255).expand(3, -1, -1).numpy().copy()
    return _picture(test_set.images[indices[0]].cpu()), goal.source, patch, [row, column]


def _picture(image: Tensor) -> Image.Image:
    """An RGB picture of UInt8[c h w]."""
    if len(image) not in (1, 3):
        raise InputError(f"images of {len(image)} channels cannot be written as a triple; 1 and 3 can")
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _sequence(where: Path, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{where}: must hold a list with one entry or more, found {type(value).__name__}")
    return value


def _whole_numbers(where: Path, value: Any) -> list[int]:
    try:
        numbers = np.asarray(value)
        if numbers.dtype.kind not in "iu" or numbers.ndim != 1 or (len(numbers) and numbers.min() < 0):
            raise ValueError
    except (ValueError, TypeError):
        raise InputError(f"{where}: must be a list of whole numbers >= 0") from None
    return [int(number) for number in numbers]


def _label(where: str, value: Any) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < 0:
        raise InputError(f"{where}: label {ascii(value)[:30]} is not a class number")
    return int(value)


def _pixels(where: str, image: Any, training_set: TrainingSet) -> Tensor:
    """The pixels UInt8[c h w] of an entry, with the channels of the training set."""
    if not isinstance(image, _Picture) or not image.pixels.size:
        raise InputError(f"{where}: is not an image")
    return fitting(where, torch.from_numpy(image.pixels), training_set)
