"""What all detectors that start from an observation by way of influence have in common."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional

from unpoison import detectors
from unpoison._progress import Progress
from unpoison.detectors import Detector, EKFACThreshold
from unpoison.errors import MismatchError
from unpoison.influence import fit_factors, precondition, score
from unpoison.tasks import ClassificationTask

TRACING = ["artifact-mixture", "calibrated", "delta-influence", "ek-fac"]


def quick(name: str) -> Detector:
    options: dict[str, dict[str, Any]] = {
        "calibrated": {"false_alarm_level": 0.1},
        "delta-influence": {"draws": 4},
    }
    return detectors.get(name, **options.get(name, {}))


class Stop(Exception):
    pass


def stop_at(stage: str) -> Progress:
    def progress(name: str, done: int, total: int, /, **metrics: float) -> None:
        assert 0 < done <= total
        if name == stage:
            raise Stop

    return progress


@pytest.mark.parametrize("stage", ["nowhere", "covariance", "eigenvalues", "queries", "scores"])
@pytest.mark.parametrize("name", TRACING)
def test_the_model_is_unchanged_also_after_an_error(scene: Any, name: str, stage: str) -> None:
    detector, model = quick(name), copy.deepcopy(scene.model).train()
    model[2].eval()
    model[0].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    images, labels = scene.poisoned.images.clone(), scene.poisoned.labels.clone()
    if stage == "nowhere":
        detector.find(model, scene.poisoned, scene.observation)
    else:
        with pytest.raises(Stop):
            detector.find(model, scene.poisoned, scene.observation, progress=stop_at(stage))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, *[True] * 4]
    assert torch.equal(model[5].weight.grad, torch.ones_like(model[5].weight))
    assert [parameter.grad is None for parameter in model.parameters()] == [True] * 4 + [False, True]
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert not any(module._backward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(scene.poisoned.images, images)
    assert torch.equal(scene.poisoned.labels, labels)


@pytest.mark.parametrize("name", TRACING)
def test_factors_are_reused_and_checked(scene: Any, name: str) -> None:
    detector: Any = quick(name)
    stages: list[str] = []
    reused = detector.find(
        scene.model,
        scene.poisoned,
        scene.observation,
        factors=scene.factors,
        progress=lambda stage, done, total, **_: stages.append(stage),
    )
    assert not {"covariance", "eigenvalues"} & set(stages)
    assert "scores" in stages
    assert reused.fingerprint == scene.poisoned.fingerprint
    other = copy.deepcopy(scene.model)
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(MismatchError, match="fitted to another model"):
        detector.find(other, scene.poisoned, scene.observation, factors=scene.factors)
    foreign = fit_factors(scene.model, scene.clean, ClassificationTask(), seed=0)
    with pytest.raises(MismatchError, match="fitted to other examples"):
        detector.find(scene.model, scene.poisoned, scene.observation, factors=foreign)


def test_ek_fac_flags_influence_above_its_threshold(scene: Any) -> None:
    found = EKFACThreshold(threshold=1.0).find(scene.model, scene.poisoned, scene.observations)
    task = ClassificationTask()
    factors = scene.factors
    expected = torch.zeros(len(scene.poisoned))
    for image in scene.observations.images:
        batch = (image[None].float() / 255, torch.tensor([0]))
        query = precondition(scene.model, factors, batch, task)
        expected += score(scene.model, query, scene.poisoned, task).values[0] / len(scene.observations)
    # Other label samples for the factors, so similar but not equal.
    assert float(torch.corrcoef(torch.stack([found.scores, expected]))[0, 1]) > 0.95
    assert torch.equal(found.mask(), found.scores > 1.0)
    assert found.judge(scene.poison).average_precision > 0.3


@pytest.mark.parametrize("name", [*TRACING, "trak"])
def test_examples_that_are_fitted_perfectly_keep_their_influence(scene: Any, name: str) -> None:
    model = copy.deepcopy(scene.model)
    with torch.no_grad():  # larger logits, the same answers
        model[5].weight *= 3
        model[5].bias *= 3
        inputs, labels = scene.poisoned.batch(0, len(scene.poisoned))
        textbook = functional.cross_entropy(model(inputs), labels, reduction="none")
    assert int((textbook == 0).sum()) > 300
    found = quick(name).find(model, scene.poisoned, scene.observation, reference=scene.held_out)
    before = found.evidence["influence_before"]
    scored = found.labels == 0 if name == "calibrated" else torch.ones_like(found.labels, dtype=torch.bool)
    assert bool((before[scored] != 0).all())
    assert bool(before[scored].isfinite().all())
    if name == "calibrated":
        assert found.poison_found
        assert found.judge(scene.poison).average_precision >= 0.95
