"""What every preset of every registered detector must do."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from small_networks import trained
from unpoison import detectors
from unpoison.data import TrainingSet
from unpoison.detectors import Detector, Findings, Observation
from unpoison.errors import InputError
from unpoison.training import predict

# What makes a detector quick on tiny sets, by name or by name and preset; nothing for all others.
QUICK: Mapping[str, Mapping[str, Any]] = {
    "calibrated": {"false_alarm_level": 0.25},
    "delta-influence": {"draws": 6},
    "trak": {"threshold": 1.0},
    "spectral-signatures": {"expected_share": 0.1},
    "spectral-signatures comparison": {"thresholds": (1.0, 2.0)},
    "spectre": {"expected_share": 0.1},
    "deep-knn": {"expected_share": 0.05},
    "frequency": {"rounds": 1, "epochs": 1},
    "confusion-training": {"steps": 4, "concentrations": [0.5], "batch_size": 16},
    "asset": {"steps": 6, "inner_steps": 1, "batch_size": 16},
    "beatrix": {"orders": 2},
}
SEED = 3


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
    "equal images": TrainingSet(
        torch.full((24, 1, 6, 6), 90, dtype=torch.uint8), torch.arange(24) % 3, ("a", "b", "c"), "equal"
    ),
    "one example": make_set(counts=(14, 14, 14), channels=1).subset([20]),
}
# Those that make no use of the model but for its device.
WITHOUT_MODEL = ("frequency", "shortcut-probe")
# Sets with too few labelled examples to calibrate on.
REFUSED = {("calibrated default", "one example")}


MODELS = {name: trained(training_set) for name, training_set in SETS.items()}
CASES = [f"{name} {preset}" for name in detectors.names() for preset in detectors.describe(name).presets]
TRACING = [case for case in CASES if detectors.describe(case.split()[0]).needs_observation]
EACH = pytest.mark.parametrize("case", CASES)
EVERY = pytest.mark.parametrize(
    ("case", "which"), [(case, which) for case in CASES for which in SETS if (case, which) not in REFUSED]
)


def make(case: str, **options: Any) -> Detector:
    name, preset = case.split()
    return detectors.get(name, preset=preset, **{**QUICK.get(case, QUICK.get(name, {})), **options})


def observe(which: str) -> Observation:
    """A random image with the answer of the model."""
    shape = SETS[which].image_shape
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Observation(image, int(predict(MODELS[which], image[None]).argmax()))


def find(case: str, which: str, *, seed: int = SEED, **options: Any) -> Findings:
    return make(case, **options).find(MODELS[which], SETS[which], observe(which), seed=seed)


@EVERY
def test_findings_are_complete(case: str, which: str) -> None:
    training_set, found = SETS[which], find(case, which)
    count = len(training_set)
    assert found.scores.shape == (count,)
    assert found.scores.is_floating_point()
    assert bool(torch.isfinite(found.scores).all())
    assert torch.equal(found.labels, training_set.labels)
    assert found.class_names == training_set.class_names
    assert found.fingerprint == training_set.fingerprint
    assert (found.observation is not None) == (case in TRACING)
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
def test_saved_and_loaded_findings_are_equal(case: str, which: str, tmp_path: Path) -> None:
    found = find(case, which)
    found.save(tmp_path / "findings")
    loaded = Findings.load(tmp_path / "findings")
    assert torch.equal(loaded.scores, found.scores.double())
    assert torch.equal(loaded.flagged, found.flagged)
    assert torch.equal(loaded.labels, found.labels)
    for field in ("configuration", "threshold", "poison_found", "p_value", "summary", "draws", "fingerprint"):
        assert getattr(loaded, field) == getattr(found, field)
    assert loaded.evidence.keys() == found.evidence.keys()


@pytest.mark.parametrize(("case", "which"), sorted(REFUSED))
def test_sets_that_do_not_suffice_are_an_input_error_of_one_line(case: str, which: str) -> None:
    with pytest.raises(InputError) as error:
        find(case, which)
    assert "\n" not in str(error.value)


class Cast(nn.Module):
    """Casts the images to the precision of the network."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return images.to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@EACH
def test_networks_of_other_precisions(case: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(Cast(dtype), copy.deepcopy(MODELS["grey"]).to(dtype)).eval()
    image = observe("grey").images
    observation = Observation(image, int(predict(model, image).argmax()))
    found = make(case).find(model, SETS["grey"], observation, seed=SEED)
    assert bool(torch.isfinite(found.scores).all())
    if dtype == torch.float64 and case not in TRACING:
        torch.testing.assert_close(found.scores, find(case, "grey").scores, rtol=1e-2, atol=1e-2)


@EACH
def test_equal_seeds_give_equal_findings_and_arguments_are_unchanged(case: str) -> None:
    training_set, model = SETS["colour"], MODELS["colour"]
    images, labels = training_set.images.clone(), training_set.labels.clone()
    state, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    first, second = find(case, "colour"), find(case, "colour")
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.flagged, second.flagged)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(training_set.images, images)
    assert torch.equal(training_set.labels, labels)


# Those that draw labels, transformations, projections or initial weights; another tracer need not.
DRAWING = (
    "artifact-mixture",
    "calibrated",
    "delta-influence",
    "ek-fac",
    "trak",
    "frequency quick",
    "asset",
    "confusion",
)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(DRAWING)])
def test_the_seed_matters_to_methods_that_draw(case: str) -> None:
    assert not torch.equal(find(case, "colour", seed=4).scores, find(case, "colour").scores)


@EACH
def test_it_is_a_final_frozen_dataclass_without_a_seed(case: str) -> None:
    detector = make(case)
    kind = type(detector)
    assert not inspect.isabstract(kind)
    assert getattr(kind, "__final__", False)
    hash(detector)
    names = [field.name for field in dataclasses.fields(detector)]  # type: ignore[arg-type]
    assert "seed" not in names
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(detector, names[0], 1)


@EACH
def test_progress_counts_up_in_each_stage_and_an_error_it_raises_ends_the_search(case: str) -> None:
    reached: dict[str, int] = {}

    def note(stage: str, done: int, total: int, /, **metrics: float) -> None:
        assert reached.get(stage, 0) < done <= total or done <= reached[stage] == total
        reached[stage] = done

    make(case).find(MODELS["grey"], SETS["grey"], observe("grey"), progress=note)
    assert reached

    def stop(stage: str, done: int, total: int, /, **metrics: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(case).find(MODELS["grey"], SETS["grey"], observe("grey"), progress=stop)


@pytest.mark.parametrize("case", sorted(set(CASES) - set(TRACING)))
def test_scans_need_no_observation(case: str) -> None:
    found = make(case).find(MODELS["grey"], SETS["grey"], seed=SEED)
    assert torch.equal(found.scores, find(case, "grey").scores)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(WITHOUT_MODEL)])
def test_a_network_that_gives_nan_is_an_input_error_of_one_line(case: str) -> None:
    model = copy.deepcopy(MODELS["grey"])
    with torch.no_grad():
        model[0].bias[0] = torch.nan  # type: ignore[index, union-attr]
    observation = Observation(torch.zeros(1, 6, 6, dtype=torch.uint8), 0)
    with pytest.raises(InputError) as error:
        make(case).find(model, SETS["grey"], observation)
    assert "\n" not in str(error.value)


@EACH
def test_an_empty_set_is_an_input_error(case: str) -> None:
    with pytest.raises(InputError):
        make(case).find(MODELS["grey"], SETS["grey"].subset([]), observe("grey"))


# Absolute damping of 1e-8 amplifies rounding, and the last three train in batches of this size.
_OWN_BATCHES = ("delta-influence", "ek-fac", "frequency", "confusion-training", "asset")


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(_OWN_BATCHES)])
def test_the_batch_size_does_not_change_the_scores(case: str) -> None:
    expected = find(case, "colour").scores
    torch.testing.assert_close(find(case, "colour", batch_size=5).scores, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", TRACING)
def test_tracing_without_an_observation_is_an_input_error_of_one_line(case: str) -> None:
    with pytest.raises(InputError) as error:
        make(case).find(MODELS["grey"], SETS["grey"])
    assert "\n" not in str(error.value)


class State:
    """What a search must leave of a model: values, modes, flags, gradients and hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.values = copy.deepcopy(model.state_dict())
        self.modes = [module.training for module in model.modules()]
        self.flags = [parameter.requires_grad for parameter in model.parameters()]
        self.gradients = [parameter.grad for parameter in model.parameters()]
        self.contents = copy.deepcopy(self.gradients)
        self.hooks = [
            [list(getattr(module, name)) for name in vars(module) if name.endswith("_hooks")]
            for module in model.modules()
        ]

    def check(self, model: nn.Module) -> None:
        """That it is so still."""
        now = State(model)
        assert all(torch.equal(value, self.values[key]) for key, value in now.values.items())
        assert (now.modes, now.flags, now.hooks) == (self.modes, self.flags, self.hooks)
        for gradient, before, content in zip(now.gradients, self.gradients, self.contents, strict=True):
            assert gradient is before
            assert gradient is None or torch.equal(gradient, content)


@EACH
def test_a_model_in_training_is_left_as_it_was_also_after_an_error(case: str) -> None:
    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int, /, **metrics: float) -> None:
        raise Stop

    model = copy.deepcopy(MODELS["colour"]).train()
    model[1].eval()  # type: ignore[index, operator, union-attr]
    inputs, labels = SETS["colour"].batch(0, 6)
    functional.cross_entropy(model(inputs), labels).backward()
    next(model.parameters()).requires_grad_(False)
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    model[0].register_forward_pre_hook(lambda *_: None)  # type: ignore[index, operator, union-attr]
    before = State(model)
    make(case).find(model, SETS["colour"], observe("colour"), seed=SEED)
    before.check(model)
    with pytest.raises(Stop):
        make(case).find(model, SETS["colour"], observe("colour"), seed=SEED, progress=stop)
    before.check(model)
    if not case.startswith(WITHOUT_MODEL):
        with pytest.raises(InputError):
            make(case).find(model, make_set(counts=(9, 9, 9), channels=1), observe("colour"), seed=SEED)
        before.check(model)


@pytest.mark.parametrize("case", TRACING)
def test_an_answer_that_the_model_does_not_give_is_refused_in_one_line(case: str) -> None:
    seen = observe("grey")
    wrong = Observation(seen.images, (int(seen.predicted or 0) + 1) % 3)
    with pytest.raises(InputError) as error:
        make(case).find(MODELS["grey"], SETS["grey"], wrong)
    assert "\n" not in str(error.value)


class Poles(nn.Module):
    """Gives NaN where the first pixel of an image is white."""

    def forward(self, images: Tensor) -> Tensor:
        white = images[:, :1, :1, :1] == 1
        return torch.where(white, torch.nan, images)


@pytest.mark.parametrize("case", sorted(set(CASES) - set(TRACING)))
def test_a_feature_that_is_not_a_number_is_an_error_that_names_the_example(case: str) -> None:
    if case.startswith((*WITHOUT_MODEL, "gradient-clusters")):  # which read no features
        return
    images = SETS["grey"].images.clamp(max=250)
    images[17, 0, 0, 0] = 255
    training_set = dataclasses.replace(SETS["grey"], images=images)
    with pytest.raises(InputError, match=r"the features of example 17 .* are not finite"):
        make(case).find(nn.Sequential(Poles(), MODELS["grey"]).eval(), training_set)


@EACH
def test_names_of_classes_with_control_characters_stay_on_one_line(case: str) -> None:
    names = ("a\nb", "\u202ec", "<b>d")
    training_set = dataclasses.replace(SETS["grey"], class_names=names)
    found = make(case).find(MODELS["grey"], training_set, observe("grey"), seed=SEED)
    assert found.class_names == names
    assert found.summary.isprintable()
