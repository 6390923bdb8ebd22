"""`Observation`: the wrong prediction that tracing starts from."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from unpoison._inputs import count_of
from unpoison.data import Examples, Inputs, TrainingSet, read_image
from unpoison.detectors._answers import answers_of
from unpoison.errors import InputError


@final
@dataclass(frozen=True, eq=False, init=False)
class Observation:
    """One input, or several with the same answer, that a model classifies wrongly.

    Arguments:
        given: an image UInt8[c h w], several UInt8[m c h w], or a picture of Pillow; an array with the
            channels last is transposed. Where the training set is no `TrainingSet` of 8-bit images: an input
            (or m of them) as the dataset gives it, a tensor or a mapping of tensors.
        predicted: the wrong label that the model gives to each of them; None for whatever the model answers.
        true_label: the correct label, where it is known. It is shown to people and never used to trace.
        indices: of the inputs in their data set, where they are known.
        answered: whether the model gives `predicted` to each of them; False to trace a label that it does
            not give, such as the second likeliest, or the former answer of a healed model.
        count: m, where `given` are m inputs that are no images, along the first dimension; None for one.

    Raises:
        InputError: the input is none, a label is no whole number, or the two labels are equal.

    >>> Observation(torch.zeros(1, 8, 8), predicted=5).images.shape
    torch.Size([1, 1, 8, 8])
    """

    given: Inputs
    predicted: int | None
    true_label: int | None
    indices: tuple[int, ...]
    answered: bool
    count: int | None

    def __init__(
        self,
        given: Any,
        predicted: int | None = None,
        true_label: int | None = None,
        *,
        indices: Sequence[int] = (),
        answered: bool = True,
        count: int | None = None,
    ) -> None:
        labels = {"predicted": predicted, "true_label": true_label}
        for name, label in labels.items():
            object.__setattr__(self, name, None if label is None else _whole(name, label))
        if self.predicted is not None and self.predicted == self.true_label:
            raise InputError(f"Observation: the answer {self.predicted} is right; there is nothing to trace")
        object.__setattr__(self, "given", _as_given(given))
        object.__setattr__(self, "indices", tuple(_whole("indices", index) for index in indices))
        object.__setattr__(self, "answered", bool(answered))
        object.__setattr__(self, "count", count)

    def __len__(self) -> int:
        """How many inputs."""
        if self.count is not None:
            return self.count
        return len(self.given) if isinstance(self.given, Tensor) and self.given.ndim == 4 else 1

    @property
    def images(self) -> Tensor:
        """UInt8[m c h w]; floats in [0, 1] are rounded to 8 bits.

        Raises:
            InputError: the inputs are no images of 8 bits.
        """
        given = self.given
        if isinstance(given, Mapping) or given.ndim not in (2, 3, 4):
            found = "a mapping" if isinstance(given, Mapping) else str(tuple(given.shape))
            raise InputError(
                f"Observation: expected an image [c, h, w] or images [m, c, h, w], found {found}"
            )
        images = given if given.ndim == 4 else given.reshape(1, *(1,) * (3 - given.ndim), *given.shape)
        if images.dtype == torch.uint8:
            return images.contiguous()
        if not images.is_floating_point():
            raise InputError(f"Observation: images must be uint8, or float in [0, 1]; found {images.dtype}")
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise InputError("Observation: float images must lie in [0, 1]; undo the normalisation first")
        return (images * 255).round().to(torch.uint8).contiguous()

    @property
    def inputs(self) -> Inputs:
        """The inputs as a network takes them, pixels in [0, 1]; of a checked observation, m of them."""
        if isinstance(self.given, Tensor):
            return self.given.float() / 255 if self.given.dtype == torch.uint8 else self.given
        return {
            name: part.float() / 255 if part.dtype == torch.uint8 else part
            for name, part in self.given.items()
        }

    @property
    def pictures(self) -> Tensor | None:
        """UInt8[m c h w] to show to people, stretched where the values are not in [0, 1]; None for others."""
        try:
            return self.images
        except InputError:
            return shown_as_pictures(self.inputs)

    @property
    def answer(self) -> int:
        """The wrong label.

        Raises:
            InputError: it is not known yet; `check_observation` asks the model.
        """
        if self.predicted is None:
            raise InputError(
                "Observation: the predicted label is not known; give it or ask check_observation"
            )
        return self.predicted


def shown_as_pictures(inputs: Inputs) -> Tensor | None:
    """UInt8[m c h w] of Float[m c h w] with 1 or 3 channels, black the smallest and white the largest value.

    None for inputs that are no pictures.
    """
    if isinstance(inputs, Mapping) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        return None
    low, high = inputs.amin((1, 2, 3), keepdim=True), inputs.amax((1, 2, 3), keepdim=True)
    scaled = (inputs - low) / (high - low).clamp(min=1e-12)
    return (scaled * 255).round().to(torch.uint8).cpu()


def check_observation(
    model: nn.Module, training_set: Examples, observation: Observation | None
) -> Observation:
    """The observation with the model's own answer, its inputs as those of this training set.

    Raises:
        InputError: there is none; an input or a label does not fit the set; the model gives another label
            than `predicted` or different labels to several images, unless `answered` is False; or the label
            is the true one.
    """
    if observation is None:
        raise InputError(
            "tracing starts from an Observation; give the input that the model classifies wrongly"
        )
    if not len(training_set):
        raise InputError(f"{training_set.name}: there are no training examples to trace to")
    given = _fitting(observation, training_set)
    for name, label in (("predicted", observation.predicted), ("true", observation.true_label)):
        if label is not None and not 0 <= label < training_set.num_classes:
            raise InputError(
                f"Observation: {name} label {label} is outside 0..{training_set.num_classes - 1}"
            )
    count = count_of(given)
    observation = Observation(
        given,
        observation.predicted,
        observation.true_label,
        indices=observation.indices,
        answered=observation.answered,
        count=count,
    )
    logits = answers_of(model, observation.inputs)
    if logits.shape[1] < training_set.num_classes:
        raise InputError(
            f"the model gives {logits.shape[1]} logits; for {training_set.name} it must give one for each of "
            f"{training_set.num_classes} classes"
        )
    answers = logits.argmax(1)
    names = training_set.class_names
    expected = int(answers[0]) if observation.predicted is None else observation.predicted
    for place, answer in enumerate(answers.tolist()):
        if answer >= len(names):
            raise InputError(
                f"Observation: the model answers {answer} to image {place}, but the classes of "
                f"{training_set.name} are 0..{len(names) - 1}; nothing in it has that label"
            )
        if answer != expected and observation.answered:
            raise InputError(
                f"Observation: the model answers {answer} ({names[answer]}) to image {place}, not {expected} "
                f"({names[expected]}); trace the label that it gives"
            )
    if expected == observation.true_label:
        raise InputError(
            f"Observation: the answer {expected} ({names[expected]}) is right; there is nothing to trace"
        )
    return Observation(
        given,
        expected,
        observation.true_label,
        indices=observation.indices,
        answered=observation.answered,
        count=count,
    )


def joined_observations(parts: Sequence[Observation]) -> Inputs:
    """The inputs of several observations, one after another.

    Raises:
        InputError: they have different shapes.
    """
    try:
        if all(isinstance(one.given, Tensor) and one.given.dtype == torch.uint8 for one in parts):
            return torch.cat([one.images for one in parts])
        given = [one.given for one in parts]
        if len(given) == 1:
            return given[0]
        if all(isinstance(one, Tensor) for one in given):
            tensors = cast("list[Tensor]", given)
            return torch.cat(tensors) if tensors[0].ndim == 4 else torch.stack(tensors)
        named = cast("list[Mapping[str, Tensor]]", given)
        return {name: torch.stack([one[name] for one in named]) for name in named[0]}
    except (RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"expected observations with one shape of input ({error})") from None


def _whole(name: str, label: Any) -> int:
    try:
        plain: Any = label.item() if isinstance(label, Tensor | np.ndarray) else label
        return operator.index(plain)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"Observation: {name} must be a whole number, found {label!r:.60}") from None


def _as_given(value: Any) -> Inputs:
    if isinstance(value, Image.Image):
        return read_image(value, where="Observation")[None]
    if isinstance(value, Mapping):
        if not value:
            raise InputError("Observation: expected an input, found an empty mapping")
        return {str(name): _as_tensor(part) for name, part in value.items()}
    return _as_tensor(value)


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        found = value.detach().cpu()
    else:
        array = np.asarray(value)
        if array.ndim == 3 and array.shape[-1] in (1, 3) and array.shape[0] not in (1, 3):
            array = array.transpose(2, 0, 1)
        if array.dtype.kind not in "uif":
            raise InputError(f"Observation: expected an image, found {type(value).__name__}")
        found = torch.from_numpy(np.array(array))
    if found.dtype in (torch.float16, torch.bfloat16):
        found = found.float()
    if found.ndim == 0 or not found.numel():
        raise InputError(
            f"Observation: expected an image [c, h, w] or images [m, c, h, w], found {tuple(found.shape)}"
        )
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise InputError("Observation: a value is NaN or infinite")
    return found.contiguous()


def _fitting(observation: Observation, training_set: Examples) -> Inputs:
    """The inputs as the training set has them, m of them."""
    shape, given = training_set.input_shape, observation.given
    if isinstance(training_set, TrainingSet):
        images = observation.images
        if (
            images.shape[1] == 3
            and training_set.image_shape[0] == 1
            and bool((images == images[:, :1]).all())
        ):
            images = images[:, :1]  # a grey picture in colour
        if tuple(images.shape[1:]) != shape:
            raise InputError(
                f"Observation: the image is of shape {tuple(images.shape[1:])}, the training images are of "
                f"shape {shape}"
            )
        return images
    if isinstance(given, Mapping) != isinstance(shape, Mapping):
        kind = "mappings" if isinstance(shape, Mapping) else "tensors"
        raise InputError(f"Observation: the inputs of {training_set.name} are {kind}; give one like them")
    if isinstance(given, Mapping):
        assert isinstance(shape, Mapping)
        if set(given) != set(shape):
            raise InputError(f"Observation: its keys are {sorted(given)}, those of the set {sorted(shape)}")
        return {name: _like(part, shape[name], training_set.name) for name, part in given.items()}
    assert not isinstance(shape, Mapping)
    return _like(given, shape, training_set.name)


def _like(given: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """The tensor with a first dimension that counts inputs of this shape; other lengths are let through."""
    if tuple(given.shape) == tuple(shape):
        return given[None]
    if given.ndim == len(shape) + 1 and (tuple(given.shape[1:]) == tuple(shape) or given.ndim == 2):
        return given
    if given.dtype == torch.uint8 and given.ndim == 2 and tuple(shape) == (1, *given.shape):
        return given[None, None]
    if given.ndim == len(shape) == 1:  # sequences of different lengths
        return given[None]
    raise InputError(
        f"Observation: the input is of shape {tuple(given.shape)}, those of {name} are of shape "
        f"{tuple(shape)}; give it as the dataset gives it"
    )
