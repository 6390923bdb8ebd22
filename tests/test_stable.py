"""The stable cross-entropy against float64, by every way in which it is differentiated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

from unpoison._stable import cross_entropy, margin, margins, softmax_minus_one_hot

LABELS = torch.tensor([2, 0, 1])


def fitted(probability_missing: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [3 4] that give each label the probability one minus the given number."""
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=draws, dtype=torch.float64)
    others = logits.scatter(1, LABELS[:, None], -torch.inf).logsumexp(1)
    height = others + math.log1p(-probability_missing) - math.log(probability_missing)
    return logits.scatter(1, LABELS[:, None], height[:, None]).to(dtype)


def reference(logits: Tensor) -> Tensor:
    """Float64[3 4]: the gradient of each row's cross-entropy, from the definition with exact differences."""
    rows = []
    for row, label in zip(logits.double().tolist(), LABELS.tolist(), strict=True):
        top = max(row)
        powers = [math.exp(one - top) for one in row]
        total = math.fsum(powers)
        entries = [power / total for power in powers]
        entries[label] = -math.fsum(one for place, one in enumerate(entries) if place != label)
        rows.append(entries)
    return torch.tensor(rows, dtype=torch.float64)


def gradient(logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(cross_entropy(leaf, LABELS, reduction="sum"), leaf)
    return found


@pytest.mark.parametrize("missing", [0.9, 0.3, 1e-5, 1e-12, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_float64(missing: float, dtype: torch.dtype) -> None:
    logits = fitted(missing, dtype)
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    expected = torch.full((3,), -math.log1p(-missing), dtype=dtype)
    torch.testing.assert_close(
        cross_entropy(logits, LABELS, reduction="none"), expected, rtol=20 * rounding, atol=0
    )
    torch.testing.assert_close(gradient(logits).double(), reference(logits), rtol=20 * rounding, atol=0)


def test_the_textbook_form_is_wrong_there_in_float32() -> None:
    leaf = fitted(1e-12).requires_grad_()
    (textbook,) = torch.autograd.grad(F.cross_entropy(leaf, LABELS, reduction="sum"), leaf)
    assert not textbook.gather(1, LABELS[:, None]).any()
    found = gradient(fitted(1e-12))
    assert bool((found.gather(1, LABELS[:, None]) < -5e-13).all())
    assert float(found.sum(1).abs().max()) < 1e-18


@pytest.mark.parametrize("missing", [0.3, 1e-12])
def test_second_derivatives_are_those_of_float64(missing: float) -> None:
    def second(logits: Tensor) -> Tensor:
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, LABELS, reduction="sum")
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        weights = torch.arange(12, dtype=logits.dtype).view(3, 4).cos()
        (found,) = torch.autograd.grad((first * weights).sum(), leaf)
        return found

    logits = fitted(missing)
    # In float64 with so many digits to spare, the textbook form is right too.
    expected = second(logits.double())
    if missing > 1e-3:
        double = logits.double().requires_grad_()
        (first,) = torch.autograd.grad(
            F.cross_entropy(double, LABELS, reduction="sum"), double, create_graph=True
        )
        weights = torch.arange(12, dtype=torch.float64).view(3, 4).cos()
        (textbook,) = torch.autograd.grad((first * weights).sum(), double)
        torch.testing.assert_close(expected, textbook, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(second(logits).double(), expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_elsewhere_it_is_torch_s(reduction: Any, label_smoothing: float) -> None:
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 30
    labels = torch.arange(7) % 5
    options: Any = {"reduction": reduction, "label_smoothing": label_smoothing}
    torch.testing.assert_close(
        cross_entropy(logits, labels, **options), F.cross_entropy(logits, labels, **options)
    )


# PyTorch's own rules for jvp are scripted when they are first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_it_goes_through_torch_func() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Linear(6, 4).double()
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss_with(loss: Any) -> Any:
        def of(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            logits: Tensor = functional_call(network, parameters, (image[None],))
            value: Tensor = loss(logits, label[None])
            return value

        return of

    def both(transform: Any) -> None:
        found, expected = (transform(loss_with(loss)) for loss in (cross_entropy, F.cross_entropy))
        torch.testing.assert_close(found, expected)

    both(lambda loss: vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, LABELS))
    tangent = {name: torch.ones_like(value) for name, value in parameters.items()}
    both(
        lambda loss: vmap(
            lambda image, label: jvp(lambda own: grad(loss)(own, image, label), (parameters,), (tangent,))[1]
        )(inputs, LABELS)
    )
    both(lambda loss: hessian(lambda image: loss(parameters, image, LABELS[0]))(inputs[0]))


def test_bfloat16_is_computed_in_float32() -> None:
    logits = fitted(1e-12, torch.bfloat16)
    losses = cross_entropy(logits, LABELS, reduction="none")
    assert losses.dtype == torch.float32
    assert torch.equal(losses, cross_entropy(logits.float(), LABELS, reduction="none"))
    found = gradient(logits)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), reference(logits), rtol=0.02, atol=0)


def test_logits_of_any_size_give_finite_derivatives() -> None:
    logits = torch.tensor([[1e30, 0.0, -1e30], [-1e30, 0.0, -1e30], [0.0, 0.0, -torch.inf]])
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf, torch.tensor([0, 0, 0]), reduction="none")
    assert losses.tolist() == pytest.approx([0.0, 1e30, math.log(2)])
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert leaf.grad.tolist() == [[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-0.5, 0.5, 0.0]]


def test_the_margin_keeps_its_gradient() -> None:
    leaf = fitted(1e-20).requires_grad_()
    (found,) = torch.autograd.grad(margin(leaf, LABELS).sum(), leaf)
    assert found.gather(1, LABELS[:, None]).flatten().tolist() == [-1.0, -1.0, -1.0]
    torch.testing.assert_close(found.sum(1), torch.zeros(3), atol=1e-6, rtol=0)
    expected = reference(leaf.detach()) * 1e20
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("missing", [0.9, 0.5, 1e-5, 1e-12, 1e-20])
def test_the_margins_of_all_labels_are_those_of_each(missing: float) -> None:
    logits = fitted(missing).requires_grad_()
    every = margins(logits)
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((every * weights).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    each = torch.stack([margin(exact, torch.full((3,), label)) for label in range(4)], 1)
    (expected,) = torch.autograd.grad((each * weights.double()).sum(), exact)
    torch.testing.assert_close(every.double(), each, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("missing", [0.9, 0.3, 1e-5, 1e-12, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_minus_one_hot_is_that_gradient(missing: float, dtype: torch.dtype) -> None:
    logits = fitted(missing, dtype)
    found = softmax_minus_one_hot(logits, LABELS)
    assert found.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.double(), reference(logits), rtol=20 * rounding, atol=0)


def test_softmax_minus_one_hot_of_half_precision_is_computed_in_single() -> None:
    logits = fitted(1e-12, torch.bfloat16)
    found = softmax_minus_one_hot(logits, LABELS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference(logits), rtol=1e-4, atol=0)
