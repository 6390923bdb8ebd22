"""What an observation may be made from, and what not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unpoison.data import TrainingSet, from_dataset
from unpoison.detectors import Observation, check_observation
from unpoison.errors import InputError
from unpoison.training import predict

COLOUR = torch.arange(60, dtype=torch.uint8).view(3, 4, 5)
GREY = COLOUR[:1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(COLOUR, COLOUR[None], id="one image"),
        pytest.param(COLOUR[None].repeat(2, 1, 1, 1), COLOUR[None].repeat(2, 1, 1, 1), id="two images"),
        pytest.param(GREY[0], GREY[None], id="grey without channel"),
        pytest.param(COLOUR.float() / 255, COLOUR[None], id="float"),
        pytest.param(COLOUR.double() / 255, COLOUR[None], id="double"),
        pytest.param((COLOUR.float() / 255).requires_grad_(), COLOUR[None], id="with gradient"),
        pytest.param(COLOUR.numpy(), COLOUR[None], id="array, channels first"),
        pytest.param(COLOUR.permute(1, 2, 0).numpy(), COLOUR[None], id="array, channels last"),
        pytest.param(GREY[0].numpy(), GREY[None], id="grey array"),
        pytest.param(GREY.permute(1, 2, 0).numpy(), GREY[None], id="grey array, channel last"),
        pytest.param(COLOUR.permute(1, 2, 0).numpy() / 255, COLOUR[None], id="float array, channels last"),
        pytest.param(COLOUR[None].numpy(), COLOUR[None], id="array of images"),
        pytest.param(Image.fromarray(COLOUR.permute(1, 2, 0).numpy()), COLOUR[None], id="colour picture"),
        pytest.param(Image.fromarray(GREY[0].numpy()), GREY[None], id="grey picture"),
        pytest.param(torch.tensor([[[0.499 / 255, 0.501 / 255]]]), torch.tensor([[[[0, 1]]]]), id="rounding"),
    ],
)
def test_images_of_every_kind_become_eight_bit_channels_first(given: object, expected: torch.Tensor) -> None:
    observation = Observation(given, 2, 1)
    assert observation.images.dtype == torch.uint8
    assert torch.equal(observation.images, expected.to(torch.uint8))
    assert observation.images.is_contiguous()
    assert len(observation) == len(expected)
    assert (observation.predicted, observation.true_label) == (2, 1)


def test_labels_may_be_tensors_and_become_plain_numbers() -> None:
    observation = Observation(COLOUR, torch.tensor(2), np.int64(3))  # type: ignore[arg-type]
    assert (type(observation.predicted), type(observation.true_label)) == (int, int)
    assert Observation(COLOUR, 0).true_label is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param("cat.png", "expected an image, found str", id="text"),
        pytest.param(None, "expected an image, found NoneType", id="none"),
        pytest.param(np.array([[True]]), "expected an image, found ndarray", id="truth values"),
        pytest.param(3, r"found \(\)", id="number"),
        pytest.param(torch.zeros(0, 3, 4, 4), r"found \(0, 3, 4, 4\)", id="no image"),
        pytest.param(torch.full((3, 4, 4), torch.nan), "NaN", id="nan"),
        pytest.param({}, "empty mapping", id="empty mapping"),
    ],
)
def test_what_is_no_input_is_refused_in_one_line(given: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Observation(given, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(torch.zeros(4), r"found \(4,\)", id="a row"),
        pytest.param(torch.zeros(1, 1, 3, 4, 4), r"found \(1, 1, 3, 4, 4\)", id="five axes"),
        pytest.param(torch.zeros(3, 4, 4, dtype=torch.int64), "found torch.int64", id="integers"),
        pytest.param(np.zeros((3, 4, 4), dtype=np.int32), "found torch.int32", id="integer array"),
        pytest.param(torch.full((3, 4, 4), 1.01), "undo the normalisation", id="too bright"),
        pytest.param(torch.full((3, 4, 4), -0.01), "undo the normalisation", id="too dark"),
        pytest.param({"tokens": torch.zeros(4)}, "a mapping", id="mapping"),
    ],
)
def test_what_is_no_8_bit_image_is_refused_by_what_needs_one(given: object, message: str, scene: Any) -> None:
    observation = Observation(given, 1)
    with pytest.raises(InputError, match=message) as error:
        observation.images  # noqa: B018
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=message):
        check_observation(scene.model, scene.poisoned, observation)


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "CMYK", "RGBA", "1"])
def test_a_picture_is_read_as_a_dataset_of_pictures_is(mode: str) -> None:
    picture = Image.fromarray(COLOUR.permute(1, 2, 0).numpy() * 4).convert(mode)
    dataset = from_dataset([(picture, 0), (picture, 1)])
    assert torch.equal(Observation(picture).images, dataset.images[:1])


@pytest.mark.parametrize("label", [1.9, "cat", None, [1]])
def test_labels_are_whole_numbers(label: Any) -> None:
    if label is not None:
        with pytest.raises(InputError, match="whole number"):
            Observation(COLOUR, label)
        with pytest.raises(InputError, match="whole number"):
            Observation(COLOUR, 1, label)
    with pytest.raises(InputError, match="whole number"):
        Observation(COLOUR, 1, indices=(label,))


def test_an_answer_that_is_right_cannot_be_traced() -> None:
    with pytest.raises(InputError, match="the answer 3 is right; there is nothing to trace"):
        Observation(COLOUR, 3, 3)


def test_without_a_predicted_label_the_answer_is_the_models(scene: Any) -> None:
    image = scene.observation.images[0]
    asked = Observation(image, true_label=1, indices=(7,))
    assert asked.predicted is None
    with pytest.raises(InputError, match="the predicted label is not known"):
        asked.answer  # noqa: B018
    found = check_observation(scene.model, scene.poisoned, asked)
    assert (found.predicted, found.answer, found.true_label, found.indices) == (0, 0, 1, (7,))
    assert torch.equal(found.images, asked.images)
    with pytest.raises(InputError, match=r"the answer 0 \(a\) is right; there is nothing to trace"):
        check_observation(scene.model, scene.poisoned, Observation(image, true_label=0))


def test_a_label_that_is_not_the_answer_is_traced_when_asked_for(scene: Any) -> None:
    image = scene.clean.images[0]
    second = int(predict(scene.model, image[None])[0].argsort(descending=True)[1])
    with pytest.raises(InputError, match="trace the label that it gives"):
        check_observation(scene.model, scene.clean, Observation(image, second))
    checked = check_observation(scene.model, scene.clean, Observation(image, second, answered=False))
    assert (checked.answer, checked.answered) == (second, False)


def test_observations_that_do_not_fit_are_input_errors_of_one_line(scene: Any) -> None:
    image, model, examples = scene.observation.images[0], scene.model, scene.poisoned
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    right = examples.images[(predict(model, examples.images).argmax(1) == 2).nonzero()[0, 0]]
    cases: list[tuple[nn.Module, TrainingSet, Observation | None, str]] = [
        (model, examples, None, "give the input that the model classifies wrongly"),
        (model, examples.subset([]), scene.observation, "no training examples to trace to"),
        (model, examples, Observation(image[:, :7], 0), r"of shape \(1, 7, 8\)"),
        (model, examples, Observation(torch.cat([image, 255 - image, image]), 0), r"of shape \(3, 8, 8\)"),
        (model, examples, Observation(image, 4), r"predicted label 4 is outside 0\.\.3"),
        (model, examples, Observation(image, -1), "predicted label -1 is outside"),
        (model, examples, Observation(image, 0, 9), "true label 9 is outside"),
        (model, examples, Observation(image, 3), r"the model answers 0 \(a\) to image 0, not 3 \(d\)"),
        (model, examples, Observation(torch.stack([image, right]), 0), r"answers 2 \(c\) to image 1"),
        (model, examples, Observation(torch.stack([image, right])), r"answers 2 \(c\) to image 1, not 0"),
        (narrow, examples, Observation(image, 0), "the model gives 3 logits"),
    ]
    for net, training_set, observation, message in cases:
        with pytest.raises(InputError, match=message) as error:
            check_observation(net, training_set, observation)
        assert "\n" not in str(error.value)
