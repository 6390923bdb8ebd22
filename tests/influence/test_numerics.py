"""Examples that are fitted to a probability of 1 - 1e-12 and beyond: float32 compared with float64."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from unpoison.data import TensorExamples
from unpoison.influence import (
    AbsoluteDamping,
    Factors,
    RelativeDamping,
    fit_factors,
    precondition,
    project,
    score,
)
from unpoison.tasks import ClassificationTask

TASK = ClassificationTask()
COUNT, CLASSES, FITTED = 24, 4, 5
MISSING = [1e-12, 1e-20]


def fitted_net(missing: float) -> tuple[nn.Module, TensorExamples]:
    """A network that gives label 0 a probability of one minus `missing` at example 5, less elsewhere."""
    randomness = torch.Generator().manual_seed(7)
    inputs = torch.randn(COUNT, 2, 5, 5, generator=randomness)
    labels = torch.arange(COUNT) % CLASSES
    labels[:8] = 0
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 6), nn.Tanh(), nn.Linear(6, CLASSES)
        ).eval()
    # Logit 0 grows along the features of that example, so that others are fitted less well.
    exact = copy.deepcopy(model).double()
    one = inputs[FITTED : FITTED + 1].double()
    with torch.no_grad():
        features = exact[:5](one)[0]
        growth = -math.log(missing) + TASK.measurement(exact, (one, torch.tensor([0]))).item()
        model[5].weight[0] += (growth * features / features.square().sum()).float()
    return model, TensorExamples(inputs, labels)


def doubled(model: nn.Module, examples: TensorExamples) -> tuple[nn.Module, TensorExamples]:
    inputs, labels = examples.tensors
    return copy.deepcopy(model).double(), TensorExamples(inputs.double(), labels)


def of_model(factors: Factors, model: nn.Module, examples: TensorExamples) -> Factors:
    """The same factors for the same network in another precision."""
    fingerprint = fit_factors(model, examples, TASK, seed=1).model_fingerprint
    return dataclasses.replace(factors, model_fingerprint=fingerprint)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest error of a column, relative to the largest number of that column."""
    size = expected.abs().amax(0) if expected.ndim > 1 else expected.abs()
    return float(((found.double() - expected).abs() / size).max())


@pytest.mark.parametrize("missing", MISSING)
def test_the_example_is_as_well_fitted_as_said(missing: float) -> None:
    model, examples = doubled(*fitted_net(missing))
    batch = examples.batch(FITTED, FITTED + 1)
    assert TASK.loss(model, batch).item() == pytest.approx(missing, rel=1e-2, abs=0)
    inputs, _ = examples.batch(0, COUNT)
    probabilities = model(inputs).float().softmax(1)
    assert probabilities[FITTED, 0].item() == 1


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("gradient", ["loss", "measurement"])
def test_scores_norms_and_self_influence(missing: float, gradient: str) -> None:
    model, examples = fitted_net(missing)
    exact, exact_examples = doubled(model, examples)
    factors = fit_factors(exact, exact_examples, TASK, seed=1)
    found, expected = (
        score(
            net,
            precondition(net, own, data.batch(9, 12), TASK, damping=RelativeDamping(0.1)),
            data,
            TASK,
            gradient=gradient,  # type: ignore[arg-type]
            gradient_norms=True,
            self_influence=True,
            batch_size=10,
        )
        for net, data, own in (
            (model, examples, of_model(factors, model, examples)),
            (exact, exact_examples, factors),
        )
    )
    assert relative_error(found.values, expected.values) < 1e-3
    assert relative_error(found.losses, expected.losses) < 1e-3
    for name in ("gradient_norms", "self_influence"):
        own, other = getattr(found, name), getattr(expected, name)
        assert bool((own > 0).all())
        assert relative_error(own, other) < 1e-3
    if gradient == "loss":
        assert float(found.gradient_norms[FITTED]) < 1e3 * missing  # type: ignore[index]


@pytest.mark.parametrize("missing", MISSING)
def test_loss_and_measurement_differ_by_a_factor_that_a_normalised_score_does_not_see(missing: float) -> None:
    model, examples = fitted_net(missing)
    factors = fit_factors(model, examples, TASK, seed=1)
    queries = precondition(model, factors, examples.batch(9, 12), TASK)
    loss, margin = (
        score(model, queries, examples, TASK, gradient=gradient, self_influence=True)  # type: ignore[arg-type]
        for gradient in ("loss", "measurement")
    )
    normalised = [one.values / one.self_influence.sqrt() for one in (loss, margin)]  # type: ignore[union-attr]
    torch.testing.assert_close(normalised[0], normalised[1], rtol=1e-3, atol=1e-5)
    # The factor is one minus the probability of the label.
    factor = margin.losses.double().sigmoid()
    torch.testing.assert_close(loss.values.double(), margin.values * factor, rtol=1e-3, atol=0)


@pytest.mark.parametrize("missing", MISSING[:1])
def test_factors_of_well_fitted_examples(missing: float) -> None:
    model, examples = fitted_net(missing)
    # Only examples that are as well fitted, so that nothing else hides them.
    inputs = examples.tensors[0][[FITTED] * 6] + 0.01 * torch.arange(6)[:, None, None, None]
    few = TensorExamples(inputs, torch.zeros(6, dtype=torch.int64))
    for empirical in (False, True):
        found = fit_factors(model, few, TASK, seed=1, empirical=empirical)
        expected = fit_factors(*doubled(model, few), TASK, seed=1, empirical=empirical)
        for name, layer in found.layers.items():
            # The mean squared gradient norm does not depend on the basis.
            total, other = float(layer.eigenvalues.sum()), float(expected.layers[name].eigenvalues.sum())
            assert 0 < total == pytest.approx(other, rel=1e-3, abs=0)


@pytest.mark.parametrize("missing", MISSING)
def test_projections_of_loss_and_measurement(missing: float) -> None:
    model, examples = fitted_net(missing)
    exact, exact_examples = doubled(model, examples)
    for function in (TASK.loss, TASK.measurement):
        found = project(model, examples, function, dimensions=8, seed=2)
        expected = project(exact, exact_examples, function, dimensions=8, seed=2)
        assert relative_error(found.gradients.t(), expected.gradients.t()) < 1e-3
        assert relative_error(found.values, expected.values) < 1e-3


def test_bfloat16_logits_give_a_gradient_that_is_not_zero() -> None:
    model, examples = fitted_net(1e-12)
    half = copy.deepcopy(model).bfloat16()
    few = TensorExamples(examples.tensors[0].bfloat16(), examples.tensors[1])
    queries = precondition(half, None, few.batch(9, 12), TASK, damping=AbsoluteDamping(0.0))
    found = score(half, queries, few, TASK, gradient_norms=True)
    exact, exact_examples = doubled(model, examples)
    queries = precondition(exact, None, exact_examples.batch(9, 12), TASK)
    expected = score(exact, queries, exact_examples, TASK, gradient_norms=True)
    # Logits of three digits: the loss of this example is known up to a factor.
    assert found.gradient_norms is not None
    assert expected.gradient_norms is not None
    assert float(found.gradient_norms[FITTED] / expected.gradient_norms[FITTED]) == pytest.approx(1, abs=0.5)


def test_what_a_pass_kept_is_freed_after_it() -> None:
    model, kept = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), list[StorageWeakRef]()
    model[1].register_forward_hook(lambda *given: kept.append(StorageWeakRef(given[-1].untyped_storage())))
    examples = TensorExamples(torch.randn(8, 4), torch.arange(8) % 3)
    project(model, examples, TASK.loss, dimensions=4, seed=0)
    assert kept
    assert all(one.expired() for one in kept)
