"""What every detector promises, asked of all of them: one table, no detector exempt."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from unpoison import detectors
from unpoison.data import TrainingSet
from unpoison.detectors import (
    TRAK,
    DeepKNN,
    DeltaInfluence,
    Detector,
    EKFACThreshold,
    Findings,
    Frequency,
    NullDistribution,
    Observation,
    SpectralSignatures,
    Spectre,
    StatisticalContamination,
)
from unpoison.errors import InputError
from unpoison.training import predict

# What a detector needs to be quick on tiny sets; everything else is its default.
QUICK: dict[str, Detector] = {
    **{
        f"delta-influence {name}": dataclasses.replace(
            detectors.get("delta-influence", preset=name, seed=3), draws=6
        )
        for name in DeltaInfluence.presets()
        if name != "calibrated"
    },
    "delta-influence calibrated": dataclasses.replace(
        detectors.get("delta-influence", preset="calibrated", seed=3),
        draws=6,
        rule=NullDistribution(false_alarm_level=0.25),
    ),
    "ek-fac": EKFACThreshold(seed=3),
    "ek-fac published": detectors.get("ek-fac", preset="published", seed=3),
    "trak": TRAK(seed=3, threshold=1.0),
    **{
        f"activation-clustering {name}": detectors.get("activation-clustering", preset=name)
        for name in ("original", "relative-size", "smaller-cluster", "comparison")
    },
    "spectral-signatures original": SpectralSignatures(expected_share=0.1),
    "spectral-signatures comparison": SpectralSignatures(thresholds=(1.0, 2.0)),
    "spectre": Spectre(expected_share=0.1),
    "statistical-contamination": StatisticalContamination(),
    "deep-knn": DeepKNN(expected_share=0.05),
    "frequency": Frequency(rounds=1, seed=3),
    "frequency comparison": dataclasses.replace(
        detectors.get("frequency", preset="comparison"), epochs=1, seed=3
    ),
}


def make_set(*, counts: tuple[int, ...], channels: int, side: int = 6) -> TrainingSet:
    randomness = torch.Generator().manual_seed(11)
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    patterns = torch.rand(len(counts), channels, side, side, generator=randomness)
    pixels = patterns[labels] + 0.2 * torch.randn(len(labels), channels, side, side, generator=randomness)
    images = (pixels.clamp(0, 1) * 255).round().byte()
    return TrainingSet(images, labels, tuple(f"class {label}" for label in range(len(counts))), "drawn")


SETS = {
    "colour": make_set(counts=(14, 14, 14), channels=3),
    "grey": make_set(counts=(14, 14, 14), channels=1),
    "two classes": make_set(counts=(20, 20), channels=1),
    "a class of one": make_set(counts=(20, 1, 20), channels=1),
    "an empty class": make_set(counts=(20, 20, 0), channels=3),
    "odd sizes": make_set(counts=(14, 14, 14), channels=1, side=7),
    "all alike": TrainingSet(
        torch.full((24, 1, 6, 6), 90, dtype=torch.uint8), torch.arange(24) % 3, ("a", "b", "c"), "alike"
    ),
}


class View(nn.Module):
    """Flattens as the oldest examples do, which bars layouts that `nn.Flatten` would take."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.view(len(maps), -1)


def trained(training_set: TrainingSet) -> nn.Module:
    channels, height, width = training_set.image_shape
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            View(),
            nn.Linear(4 * height * width, training_set.num_classes),
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs, labels = training_set.batch(0, len(training_set))
    for _ in range(15):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


MODELS = {name: trained(training_set) for name, training_set in SETS.items()}
NEED_OBSERVATION = [name for name in QUICK if name.startswith(("delta-influence", "ek-fac", "trak"))]
SEEDED = [name for name, detector in QUICK.items() if hasattr(detector, "seed")]
EACH = pytest.mark.parametrize("name", QUICK)
EVERY = pytest.mark.parametrize(
    ("name", "which"),
    [
        (name, which)
        for name in QUICK
        for which in SETS
        # A model of images that are all alike gets too few of them right to find innocent inputs among them.
        if (name, which) != ("delta-influence calibrated", "all alike")
    ],
)


def observe(which: str) -> Observation:
    """Any drawn image, asked about as the model answers it."""
    shape = SETS[which].image_shape
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Observation(image, int(predict(MODELS[which], image[None]).argmax()))


def find(name: str, which: str) -> Findings:
    return QUICK[name].find(MODELS[which], SETS[which], observe(which))


@EVERY
def test_findings_are_whole(name: str, which: str) -> None:
    training_set, found = SETS[which], find(name, which)
    count = len(training_set)
    assert found.scores.shape == (count,)
    assert found.scores.is_floating_point()
    assert bool(torch.isfinite(found.scores).all())
    assert torch.equal(found.labels, training_set.labels)
    assert found.class_names == training_set.class_names
    assert found.fingerprint == training_set.fingerprint
    if name.startswith(("delta-influence", "ek-fac", "trak")):
        assert "influence_before" in found.evidence
    else:
        assert found.observation is None
    for column in found.evidence.values():
        assert column.shape == (count,)
        assert bool(torch.isfinite(column).all())
    assert found.flagged.dtype == torch.int64
    assert len(set(found.flagged.tolist())) == len(found.flagged)
    assert bool((found.scores[found.flagged].diff() <= 0).all())
    assert found.poison_found == bool(len(found.flagged))
    assert bool((found.scores[found.flagged] > found.threshold.value).all())
    assert found.threshold.how
    assert found.p_value is None or 0 < found.p_value <= 1
    assert found.summary
    assert "\n" not in found.summary
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in found.seconds.values())
    assert found.peak_bytes > 0
    assert json.loads(json.dumps(dict(found.configuration), allow_nan=False)) == found.configuration
    if found.draw_images is not None:
        assert found.draw_images.shape == (len(found.draws), *training_set.image_shape)
        assert found.draw_images.dtype == torch.uint8
        assert found.observation is not None
        assert all(draw.label != found.observation.predicted for draw in found.draws)


@EVERY
def test_saved_and_loaded_is_the_same(name: str, which: str, tmp_path: Path) -> None:
    found = find(name, which)
    found.save(tmp_path / "findings")
    loaded = Findings.load(tmp_path / "findings")
    assert torch.equal(loaded.scores, found.scores.double())
    assert torch.equal(loaded.flagged, found.flagged)
    assert torch.equal(loaded.labels, found.labels)
    for field in ("configuration", "threshold", "poison_found", "p_value", "summary", "draws", "fingerprint"):
        assert getattr(loaded, field) == getattr(found, field)
    assert loaded.evidence.keys() == found.evidence.keys()


@EACH
def test_the_seed_decides_and_nothing_given_is_changed(name: str) -> None:
    training_set, model = SETS["colour"], MODELS["colour"]
    images, labels = training_set.images.clone(), training_set.labels.clone()
    state, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    first, second = find(name, "colour"), find(name, "colour")
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.flagged, second.flagged)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(training_set.images, images)
    assert torch.equal(training_set.labels, labels)
    if name in SEEDED:
        changed = dataclasses.replace(QUICK[name], seed=4)  # type: ignore[type-var]
        other = changed.find(model, training_set, observe("colour"))
        assert not torch.equal(other.scores, first.scores)


@EACH
def test_it_is_a_final_frozen_dataclass(name: str) -> None:
    kind = type(QUICK[name])
    assert not inspect.isabstract(kind)
    assert getattr(kind, "__final__", False)
    hash(QUICK[name])
    with pytest.raises(dataclasses.FrozenInstanceError):
        QUICK[name].batch_size = 1  # type: ignore[attr-defined]


@EACH
def test_presets_that_are_not_there(name: str) -> None:
    if not isinstance(QUICK[name], EKFACThreshold):
        with pytest.raises(InputError, match="no preset is called 'nosuch'"):
            type(QUICK[name]).preset("nosuch")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(set(QUICK) - set(NEED_OBSERVATION)))
def test_no_observation_is_no_hindrance(name: str) -> None:
    found = QUICK[name].find(MODELS["grey"], SETS["grey"])
    assert torch.equal(found.scores, find(name, "grey").scores)


@pytest.mark.parametrize("name", sorted(set(QUICK) - {"frequency", "frequency comparison"}))
def test_what_is_not_a_number_is_named(name: str) -> None:
    model = copy.deepcopy(MODELS["grey"])
    with torch.no_grad():
        model[0].bias[0] = torch.nan  # type: ignore[index, union-attr]
    observation = Observation(torch.zeros(1, 6, 6, dtype=torch.uint8), 0)
    with pytest.raises(InputError) as error:
        QUICK[name].find(model, SETS["grey"], observation)
    assert "\n" not in str(error.value)


@EACH
def test_a_set_without_examples_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        QUICK[name].find(MODELS["grey"], SETS["grey"].subset([]), observe("grey"))


# Published damping of the curvature magnifies rounding, and the frequency detector trains in these batches.
@pytest.mark.parametrize(
    "name", [name for name in QUICK if not name.startswith(("delta-influence", "ek-fac", "frequency"))]
)
def test_the_batch_size_decides_nothing(name: str) -> None:
    changed = dataclasses.replace(QUICK[name], batch_size=5)  # type: ignore[type-var]
    found = changed.find(MODELS["colour"], SETS["colour"], observe("colour"))
    torch.testing.assert_close(found.scores, find(name, "colour").scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NEED_OBSERVATION)
def test_without_an_observation_it_says_so_in_one_line(name: str) -> None:
    with pytest.raises(InputError) as error:
        QUICK[name].find(MODELS["grey"], SETS["grey"])
    assert "\n" not in str(error.value)


def test_the_table_is_complete() -> None:
    kinds = {
        kind
        for kind in (getattr(detectors, name) for name in detectors.__all__)
        if inspect.isclass(kind) and issubclass(kind, Detector) and kind is not Detector
    }
    assert {type(detector) for detector in QUICK.values()} == kinds
