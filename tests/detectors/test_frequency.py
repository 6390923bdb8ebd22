"""The frequency detector: the transform, the synthetic triggers, training, saving, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from scipy.fft import dctn
from torch import nn

from unpoison.data import TrainingSet
from unpoison.detectors import Frequency, FrequencyClassifier, average_precision
from unpoison.detectors.frequency import spectrum, synthetic_triggers
from unpoison.errors import InputError

QUICK = Frequency(examples=64, rounds=1, batch_size=32)


def smooth(count: int, shape: tuple[int, int, int], seed: int = 0) -> TrainingSet:
    """Images without high frequencies, as photographs are."""
    randomness = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, shape[0], 3, 3, generator=randomness)
    images = nn.functional.interpolate(coarse, shape[1:], mode="bicubic").clamp(0, 1)
    labels = torch.arange(count) % 2
    return TrainingSet((images * 255).byte(), labels, ("a", "b"), "smooth")


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 28, 28), (1, 3, 32, 20), (1, 1, 7, 5)])
def test_the_transform_is_scipys(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = dctn(images.numpy(), type=2, norm="ortho", axes=(2, 3))
    torch.testing.assert_close(spectrum(images), torch.from_numpy(expected))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 9, 13), (1, 4, 5)])
def test_every_image_gets_a_trigger(shape: tuple[int, int, int]) -> None:
    images = smooth(200, shape).batch(0, 200)[0]
    made = synthetic_triggers(images, images, torch.Generator().manual_seed(0))
    again = synthetic_triggers(images, images, torch.Generator().manual_seed(0))
    assert torch.equal(made, again)
    assert made.shape == images.shape
    assert float(made.min()) >= 0
    assert float(made.max()) <= 1
    # A shadow whose line passes outside darkens nothing, and an image may be blended with itself.
    assert float((made != images).flatten(1).any(1).float().mean()) > 0.9


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 11, 6)])
def test_images_of_any_size(shape: tuple[int, int, int]) -> None:
    classifier = QUICK.fit_classifier(smooth(40, shape))
    probabilities = classifier.probabilities(smooth(10, shape, seed=1), batch_size=4)
    assert probabilities.shape == (10,)
    assert bool(((probabilities >= 0) & (probabilities <= 1)).all())


def test_a_corner_of_noise_is_distinguished_from_smooth_images() -> None:
    clean = smooth(400, (1, 12, 12))
    images = clean.images.clone()
    images[:40, :, -3:, -3:] = torch.tensor([0, 255, 0, 255, 0, 255, 0, 255, 0]).byte().view(3, 3)
    poisoned = TrainingSet(images, clean.labels, clean.class_names)
    found = Frequency(rounds=4, batch_size=16).find(
        nn.Linear(1, 1), poisoned, reference=smooth(200, (1, 12, 12), seed=5)
    )
    assert average_precision(found.scores, torch.arange(400) < 40) > 0.8


def test_a_saved_classifier_is_used_again(tmp_path: Path) -> None:
    training_set = smooth(40, (1, 10, 10))
    classifier = QUICK.fit_classifier(training_set)
    classifier.save(tmp_path / "classifier")
    model = nn.Linear(1, 1)
    fresh = QUICK.find(model, training_set)
    named = dataclasses.replace(QUICK, classifier=str(tmp_path / "classifier"))
    assert torch.equal(named.find(model, training_set).scores, fresh.scores)
    with pytest.raises(InputError, match=r"for images of shape \(1, 10, 10\), found \(1, 12, 12\)"):
        named.find(model, smooth(4, (1, 12, 12)))


def test_the_classifier_is_trained_on_the_reference() -> None:
    training_set, clean = smooth(40, (1, 10, 10)), smooth(40, (1, 10, 10), seed=9)
    found = QUICK.find(nn.Linear(1, 1), training_set, reference=clean)
    assert torch.equal(found.scores, QUICK.fit_classifier(clean).probabilities(training_set))


def test_damaged_classifiers_are_named(tmp_path: Path) -> None:
    place = tmp_path / "classifier"
    QUICK.fit_classifier(smooth(8, (1, 8, 8))).save(place)
    record = json.loads((place / "frequency.json").read_text())
    (place / "frequency.json").write_text(json.dumps({**record, "image_shape": [3, 8, 8]}))
    with pytest.raises(InputError, match="damaged frequency classifier"):
        FrequencyClassifier.load(place)
    (place / "frequency.json").write_text(json.dumps({**record, "format": 7}))
    with pytest.raises(InputError, match="format 7"):
        FrequencyClassifier.load(place)
    (place / "frequency.json").write_text(json.dumps(record))
    (place / "frequency.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="damaged frequency classifier"):
        FrequencyClassifier.load(place)


@pytest.mark.parametrize("options", [{"examples": 0}, {"rounds": 0}, {"epochs": 0}, {"batch_size": 0}])
def test_impossible_settings(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="frequency"):
        Frequency(**options)  # type: ignore[arg-type]
