"""What an observation may be made from, and what not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from unpoison.detectors import Observation
from unpoison.errors import InputError

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
        pytest.param(torch.zeros(4), r"found \(4,\)", id="a row"),
        pytest.param(torch.zeros(0, 3, 4, 4), r"found \(0, 3, 4, 4\)", id="no image"),
        pytest.param(torch.zeros(1, 1, 3, 4, 4), r"found \(1, 1, 3, 4, 4\)", id="five axes"),
        pytest.param(torch.zeros(3, 4, 4, dtype=torch.int64), "found torch.int64", id="integers"),
        pytest.param(np.zeros((3, 4, 4), dtype=np.int32), "found torch.int32", id="integer array"),
        pytest.param(torch.full((3, 4, 4), 1.01), "undo the normalisation", id="too bright"),
        pytest.param(torch.full((3, 4, 4), -0.01), "undo the normalisation", id="too dark"),
        pytest.param(torch.full((3, 4, 4), torch.nan), "undo the normalisation", id="nan"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(given: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Observation(given, 1)
    assert "\n" not in str(error.value)


def test_a_label_cannot_be_wrong_and_true_at_once() -> None:
    with pytest.raises(InputError, match="label 3 is said to be both the wrong and the true one"):
        Observation(COLOUR, 3, 3)
