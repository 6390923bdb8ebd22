"""`Observation`: the wrong prediction that tracing starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.training import predict


@final
@dataclass(frozen=True, eq=False, init=False)
class Observation:
    """One input, or several with the same answer, that a model classifies wrongly.

    Arguments:
        images: UInt8[c h w] or UInt8[m c h w]; a float tensor in [0, 1] is rounded to 8 bits; an array or a
            picture with the channels last is transposed.
        predicted: the wrong label that the model gives to each of them; None for whatever the model answers.
        true_label: the correct label, where it is known. It is shown to people and never used to trace.
        indices: of the images in their data set, where they are known.
        answered: whether the model gives `predicted` to each of them; False to trace a label that it does
            not give, such as the second likeliest, or the former answer of a healed model.

    Raises:
        InputError: the image is not one, or the two labels are equal.

    >>> Observation(torch.zeros(1, 8, 8), predicted=5).images.shape
    torch.Size([1, 1, 8, 8])
    """

    images: Tensor
    predicted: int | None
    true_label: int | None
    indices: tuple[int, ...]
    answered: bool

    def __init__(
        self,
        images: Any,
        predicted: int | None = None,
        true_label: int | None = None,
        *,
        indices: Sequence[int] = (),
        answered: bool = True,
    ) -> None:
        labels = {"predicted": predicted, "true_label": true_label}
        for name, label in labels.items():
            object.__setattr__(self, name, None if label is None else int(label))
        if self.predicted is not None and self.predicted == self.true_label:
            raise InputError(f"Observation: the answer {self.predicted} is right; there is nothing to trace")
        object.__setattr__(self, "images", _as_uint8(images))
        object.__setattr__(self, "indices", tuple(int(index) for index in indices))
        object.__setattr__(self, "answered", bool(answered))

    def __len__(self) -> int:
        return len(self.images)

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


def check_observation(
    model: nn.Module, training_set: TrainingSet, observation: Observation | None
) -> Observation:
    """The observation with the model's own answer, if it is one of this model and this training set.

    Raises:
        InputError: there is none; an image or a label does not fit the set; the model gives another label
            than `predicted` or different labels to several images, unless `answered` is False; or the label
            is the true one.
    """
    if observation is None:
        raise InputError(
            "tracing starts from an Observation; give the input that the model classifies wrongly"
        )
    if not len(training_set):
        raise InputError(f"{training_set.name}: there are no training examples to trace to")
    if tuple(observation.images.shape[1:]) != training_set.image_shape:
        raise InputError(
            f"Observation: the image is of shape {tuple(observation.images.shape[1:])}, the training images "
            f"are of shape {training_set.image_shape}"
        )
    for name, label in (("predicted", observation.predicted), ("true", observation.true_label)):
        if label is not None and not 0 <= label < training_set.num_classes:
            raise InputError(
                f"Observation: {name} label {label} is outside 0..{training_set.num_classes - 1}"
            )
    logits = predict(model, observation.images)
    if logits.ndim != 2 or logits.shape[1] != training_set.num_classes:
        raise InputError(
            f"the model gives outputs of shape {tuple(logits.shape[1:])}; for {training_set.name} it must "
            f"give one logit for each of {training_set.num_classes} classes"
        )
    answers = logits.argmax(1)
    names = training_set.class_names
    expected = int(answers[0]) if observation.predicted is None else observation.predicted
    for place, answer in enumerate(answers.tolist()):
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
        observation.images,
        expected,
        observation.true_label,
        indices=observation.indices,
        answered=observation.answered,
    )


def _as_uint8(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        images = value.detach().cpu()
    else:
        array = np.asarray(value)
        if array.ndim == 2:
            array = array[..., None]
        if array.ndim == 3 and array.shape[-1] in (1, 3) and array.shape[0] not in (1, 3):
            array = array.transpose(2, 0, 1)
        if array.dtype.kind not in "uif":
            raise InputError(f"Observation: expected an image, found {type(value).__name__}")
        images = torch.from_numpy(np.array(array))
    if images.ndim == 2:
        images = images[None]
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or not len(images):
        raise InputError(
            f"Observation: expected an image [c, h, w] or images [m, c, h, w], found {tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return images.contiguous()
    if not images.is_floating_point():
        raise InputError(f"Observation: images must be uint8, or float in [0, 1]; found {images.dtype}")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError("Observation: float images must lie in [0, 1]; undo the normalisation first")
    return (images * 255).round().to(torch.uint8).contiguous()
