"""What every preset of every registered test-time detector must do."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from small_networks import trained
from unpoison import input_detectors
from unpoison.data import DatasetExamples, TensorExamples, TrainingSet
from unpoison.errors import InputError, InsufficientMemoryError
from unpoison.input_detectors import InputDetector, Screening

# What makes a detector quick on tiny sets, by name; nothing for all others.
QUICK: Mapping[str, Mapping[str, Any]] = {"strip": {"overlays": 6}}
CASES = [
    f"{name} {preset}"
    for name in input_detectors.names()
    for preset in input_detectors.describe(name).presets
]
EACH = pytest.mark.parametrize("case", CASES)


def make(case: str, **options: Any) -> InputDetector:
    name, preset = case.split()
    return input_detectors.get(name, preset=preset, **{**QUICK.get(name, {}), **options})


def make_set(*, counts: tuple[int, ...], channels: int, side: int = 6, seed: int = 11) -> TrainingSet:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    patterns = torch.rand(len(counts), channels, side, side, generator=torch.Generator().manual_seed(1))
    pixels = patterns[labels] + 0.2 * torch.randn(len(labels), channels, side, side, generator=draw)
    images = (pixels.clamp(0, 1) * 255).round().byte()
    return TrainingSet(images, labels, tuple(f"class {label}" for label in range(len(counts))), "drawn")


SETS = {
    "colour": make_set(counts=(20, 20, 20), channels=3),
    "grey": make_set(counts=(20, 20, 20), channels=1),
    "two classes": make_set(counts=(30, 30), channels=1),
    "an empty class": make_set(counts=(30, 30, 0), channels=3),
    "odd sizes": make_set(counts=(20, 20, 20), channels=1, side=7),
    "equal images": TrainingSet(
        torch.full((60, 1, 6, 6), 90, dtype=torch.uint8), torch.arange(60) % 3, ("a", "b", "c"), "equal"
    ),
}


MODELS = {name: trained(examples) for name, examples in SETS.items()}
INPUTS = {name: examples.subset(torch.arange(0, 60, 4)) for name, examples in SETS.items()}


def screen(case: str, which: str, *, seed: int = 3, rate: float = 0.2, **options: Any) -> Screening:
    return make(case, **options).screen(
        MODELS[which], INPUTS[which], reference=SETS[which], false_positive_rate=rate, seed=seed
    )


@EACH
@pytest.mark.parametrize("which", SETS)
def test_a_screening_is_complete_and_is_saved(case: str, which: str, tmp_path: Path) -> None:
    found = screen(case, which)
    count = len(INPUTS[which])
    assert found.scores.shape == found.p_values.shape == found.answers.shape == (count,)
    assert bool(torch.isfinite(found.scores).all())
    assert bool(((found.p_values > 0) & (found.p_values <= 1)).all())
    assert found.flagged.tolist() == [
        index for index in found.ranking().tolist() if float(found.scores[index]) > found.threshold
    ]
    if found.false_positive_rate is not None:
        assert sorted(found.flagged.tolist()) == (found.p_values <= 0.2).nonzero()[:, 0].tolist()
    assert set(found.suspects().tolist()) <= set(found.flagged.tolist())
    assert json.loads(json.dumps(dict(found.configuration))).keys() == found.configuration.keys()
    assert found.how
    assert "\n" not in found.summary
    found.save(tmp_path / "kept")
    loaded = Screening.load(tmp_path / "kept")
    for one in dataclasses.fields(Screening):
        before, after = getattr(found, one.name), getattr(loaded, one.name)
        if one.name == "configuration":
            assert dict(after) == json.loads(json.dumps(dict(before)))
        else:
            assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after


@EACH
def test_p_values_of_clean_inputs_are_no_smaller_than_uniform(case: str) -> None:
    """Calibration examples and inputs are exchangeable, so each rank is as likely as any other."""
    draws = [
        make(case).screen(
            MODELS["grey"],
            make_set(counts=(60, 60, 60), channels=1, seed=100 + seed),
            reference=make_set(counts=(40, 40, 40), channels=1, seed=200 + seed),
            false_positive_rate=0.1,
            seed=seed,
        )
        for seed in range(3)
    ]
    share = float(torch.cat([one.p_values <= 0.1 for one in draws]).double().mean())
    # Three calibrations of some 100 examples: the deviation of the share is below .03.
    assert share <= 0.2


@EACH
def test_equal_seeds_give_equal_scores_and_arguments_are_unchanged(case: str) -> None:
    model = copy.deepcopy(MODELS["colour"]).train()
    model[1].eval()  # type: ignore[index, operator, union-attr]
    next(model.parameters()).requires_grad_(False)
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    state, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    modes = [module.training for module in model.modules()]
    hooks = [list(module._forward_hooks) for module in model.modules()]
    first, second = (
        make(case).screen(model, INPUTS["colour"], reference=SETS["colour"], seed=3) for _ in range(2)
    )
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(torch.random.get_rng_state(), random)

    def stop(stage: str, done: int, total: int, /, **metrics: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(case).screen(model, INPUTS["colour"], reference=SETS["colour"], progress=stop)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [list(module._forward_hooks) for module in model.modules()] == hooks


@EACH
def test_progress_counts_up_in_each_stage(case: str) -> None:
    told: dict[str, list[int]] = {}

    def note(stage: str, done: int, total: int, /, **metrics: float) -> None:
        told.setdefault(stage, []).append(done)
        assert done <= total

    make(case, batch_size=4).screen(MODELS["grey"], INPUTS["grey"], reference=SETS["grey"], progress=note)
    assert list(told) == ["calibration", "screening"]
    assert told["screening"] == [4, 8, 12, 15]


@EACH
def test_inputs_of_any_kind_in_any_batches_give_the_same(case: str) -> None:
    expected = screen(case, "grey").scores
    torch.testing.assert_close(screen(case, "grey", batch_size=4).scores, expected)
    pixels = INPUTS["grey"].images.float() / 255
    lazy = DatasetExamples([(image, 0) for image in pixels], memory_bytes=0, class_names=("a", "b", "c"))
    held = TensorExamples(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    for inputs in (lazy, held):
        found = make(case).screen(
            MODELS["grey"], inputs, reference=SETS["grey"], false_positive_rate=0.2, seed=3
        )
        torch.testing.assert_close(found.scores, expected)


@EACH
def test_it_is_a_final_frozen_dataclass_without_a_seed(case: str) -> None:
    detector = make(case)
    assert not inspect.isabstract(type(detector))
    assert getattr(type(detector), "__final__", False)
    names = [field.name for field in dataclasses.fields(detector)]  # type: ignore[arg-type]
    assert "seed" not in names
    hash(detector)
    assert pickle.loads(pickle.dumps(detector)) == detector  # for the processes of a sweep
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(detector, names[0], 1)
    with pytest.raises(InputError, match="batch_size"):
        make(case, batch_size=0)


@EACH
def test_what_cannot_be_screened_is_an_input_error_of_one_line(case: str) -> None:
    model, inputs, reference = MODELS["grey"], INPUTS["grey"], SETS["grey"]
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[0].bias[0] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(InputError) as error:
        make(case).screen(broken, inputs, reference=reference)
    assert "\n" not in str(error.value)
    detector = make(case)
    for options, words in (
        ({"inputs": inputs.subset([])}, "no inputs"),
        ({"reference": reference.subset([0])}, "too few"),
        ({"false_positive_rate": 1.5}, "in \\(0, 1\\)"),
        ({"inputs": INPUTS["colour"]}, "of shape"),
    ):
        given: dict[str, Any] = {"inputs": inputs, "reference": reference, **options}
        with pytest.raises(InputError, match=words):
            detector.screen(model, given.pop("inputs"), **given)
    if detector.fixed_threshold is None:
        with pytest.raises(InputError, match="takes 99 clean examples"):
            detector.screen(model, inputs, reference=reference, false_positive_rate=0.01)


@EACH
def test_images_that_are_not_in_0_1_are_refused_where_pixels_are_changed(case: str) -> None:
    moved = TensorExamples(INPUTS["grey"].images.float() / 255 - 0.5, INPUTS["grey"].labels)
    reference = TensorExamples(SETS["grey"].images.float() / 255 - 0.5, SETS["grey"].labels)
    if input_detectors.describe(case.split()[0]).changes_pixels:
        with pytest.raises(InputError, match="normalization="):
            make(case).screen(MODELS["grey"], moved, reference=reference)
    else:
        assert len(make(case).screen(MODELS["grey"], moved, reference=reference)) == 15


@EACH
def test_what_takes_too_much_memory_is_refused_with_what_fits(case: str) -> None:
    from unpoison._memory import limited

    with limited(20_000), pytest.raises(InsufficientMemoryError, match=r"batch_size=\d+ would fit|no batch"):
        screen(case, "grey")
