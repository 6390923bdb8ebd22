"""The inputs that `--suspect` names: image files, and examples of the test set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from unpoison import data
from unpoison._inputs import Inputs
from unpoison.cli._options import ImageOptions
from unpoison.data import DatasetExamples, Examples, Splits, TrainingSet
from unpoison.errors import InputError
from unpoison.threats import PoisonSet, TriggeredGoal


@final
@dataclass(frozen=True)
class Suspect:
    """An input that somebody doubts the answer to.

    Arguments:
        inputs: the one input, with a first dimension: UInt8[1 c h w] of a training set in memory, else as its
            dataset has it.
        true_label: what it is, where that is known.
        words: what to call it.
    """

    inputs: Inputs
    true_label: int | None
    words: str


def suspect_of(
    text: str,
    splits: Splits[Examples],
    poison: PoisonSet | None,
    images: ImageOptions,
    transform: Callable[[Any], Any] | None = None,
    *,
    option: str = "--suspect",
) -> Suspect:
    """The input that `--suspect` names.

    Arguments:
        text: as given.
        splits: the training set, and the test set where there is one.
        poison: what was put into the training set, where that is known.
        images: how image files are read into memory.
        transform: what makes inputs of image files, where the training set is a dataset of the user's own.
        option: its name in messages.

    Raises:
        InputError: there is no such image, or it does not fit the training set.
    """
    kind, colon, number = text.partition(":")
    if not colon or kind not in ("test", "triggered"):
        return Suspect(input_of_file(text, splits.train, images, transform, option), None, Path(text).name)
    if splits.test is None:
        raise InputError(f"{option} {text}: there is no test set; name one with --test-data")
    if not (number.isascii() and number.isdigit()) or int(number) >= len(splits.test):
        raise InputError(
            f"{option} {text}: expected {kind}:INDEX with an index 0..{len(splits.test) - 1} of the test set"
        )
    index = int(number)
    label = int(splits.test.labels[index])
    held = splits.test.images[index][None] if isinstance(splits.test, TrainingSet) else None
    if kind == "test":
        return Suspect(splits.test.at([index])[0] if held is None else held, label, f"test image {number}")
    if poison is None or not isinstance(poison.goal, TriggeredGoal) or held is None:
        raise InputError(
            f"{option} {text}: needs the trigger, so give --poison with the poison of a backdoor"
        )
    return Suspect(poison.goal.trigger.stamp(held), label, f"test image {number} with the trigger")


def input_of_file(
    text: str,
    examples: Examples,
    images: ImageOptions,
    transform: Callable[[Any], Any] | None,
    option: str = "--suspect",
) -> Inputs:
    """An image file as the one input that it is read as."""
    preparation = data.Preparation(images.size, images.orient)
    if isinstance(examples, TrainingSet):
        return _fitting(data.read_image(text, preparation=preparation), examples, text, option)[None]
    assert isinstance(examples, DatasetExamples)
    rows = examples.source.dataset
    if isinstance(rows, data.ImageFiles | data.Pictures):
        value = rows.read(text, Path(text))
    elif transform is not None:
        value = data.read_transformed(text, transform, preparation=preparation)
    elif examples.of_images and examples.value_range == (0.0, 1.0):
        value = data.read_image(text, preparation=preparation)
    else:
        raise InputError(
            f"{option} {text}: name by --transform package.module:function what makes an input of "
            f"{examples.name} of a picture, or give test:INDEX of a test set"
        )
    return examples.given(f"{option} {text}", value)


def _fitting(image: Tensor, training_set: TrainingSet, text: str, option: str) -> Tensor:
    channels, *size = training_set.image_shape
    if list(image.shape[1:]) != size:
        raise InputError(
            f"{option} {text}: is {image.shape[2]} pixels wide and {image.shape[1]} high, but the images of "
            f"{training_set.name} are {size[1]} wide and {size[0]} high; "
            f"resize it the way the model's inputs were"
        )
    if image.shape[0] == channels:
        return image
    if image.shape[0] == 1:
        return image.expand(channels, -1, -1).contiguous()
    if channels == 1 and bool((image == image[:1]).all()):
        return image[:1]
    raise InputError(
        f"{option} {text}: has {image.shape[0]} channels, the images of {training_set.name} have {channels}"
    )
