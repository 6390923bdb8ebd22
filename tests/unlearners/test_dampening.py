from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import TrainingDivergedError
from unpoison.influence import precondition
from unpoison.tasks import ClassificationTask
from unpoison.unlearners._dampening import cross_entropy_of_each, dampen, importances, logit_norm, ratios


def make_set(count: int = 12) -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(count) % 2, ("a", "b"), "drawn")


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)
        )


def one_by_one(network: nn.Module, examples: TrainingSet, value: object, power: int, size: int = 1) -> dict:
    network.eval()
    totals = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    starts = range(0, len(examples), size)
    for start in starts:
        images, labels = examples.batch(start, start + size)
        network.zero_grad()
        value(network(images), labels).mean().backward()  # type: ignore[operator]
        for name, parameter in network.named_parameters():
            totals[name] += parameter.grad.abs() ** power / len(starts)
    network.zero_grad()
    return totals


@pytest.mark.parametrize("value", [cross_entropy_of_each, logit_norm])
@pytest.mark.parametrize("power", [1, 2])
def test_importances_are_those_of_a_loop_over_the_examples(network, value, power) -> None:  # type: ignore[no-untyped-def]
    examples = make_set()
    expected = one_by_one(copy.deepcopy(network), examples, value, power)
    for workspace in (1, 1 << 20):
        found = importances(
            network, examples, value=value, power=power, workspace_bytes=workspace, batch_size=5, method="x"
        )
        assert list(found) == list(expected)
        for name, importance in found.items():
            torch.testing.assert_close(importance, expected[name], rtol=1e-4, atol=1e-8)


def test_importances_of_batches_are_the_squares_of_batch_means(network: nn.Module) -> None:
    examples = make_set()
    expected = one_by_one(copy.deepcopy(network), examples, cross_entropy_of_each, 2, size=4)
    found = importances(network, examples, per_example=False, batch_size=4, method="x")
    for name, importance in found.items():
        torch.testing.assert_close(importance, expected[name], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_examples_that_are_fit_have_the_importances_of_float64(per_example: bool, dtype: torch.dtype) -> None:
    """At a probability of 1 - 1e-12, where float32's softmax minus one-hot is zero at the label."""
    examples = make_set(4)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double()
    with torch.no_grad():
        network[1].weight.zero_()
        network[1].bias.copy_(torch.tensor([28.0, 0.0]))
    examples = examples.subset(examples.labels == 0)
    options = {"per_example": per_example, "method": "x"}
    expected = importances(network, examples, **options)  # type: ignore[arg-type]
    found = importances(network.to(dtype), examples, **options)  # type: ignore[arg-type]
    exact = (1 / (1 + math.exp(28))) ** 2
    assert expected["1.bias"].tolist() == pytest.approx([exact, exact], rel=1e-9)
    assert found["1.bias"].tolist() == pytest.approx(
        [exact, exact], rel=1e-4 if dtype == torch.float32 else 0.02
    )


def test_they_agree_with_the_gradients_of_influence(network: nn.Module) -> None:
    class OfLoss(ClassificationTask.__base__):  # type: ignore[name-defined, misc]
        def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

        measurement = loss

        def sampled_loss(self, model: nn.Module, batch: tuple[Tensor, ...], noise: Tensor) -> Tensor:
            raise NotImplementedError

    examples = make_set()
    gradients = precondition(
        network, None, examples.batch(0, len(examples)), OfLoss(), modules=["0", "1", "4"]
    ).by_parameter(network)
    found = importances(network, examples, method="x")
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient.square().mean(0), rtol=1e-4, atol=1e-9)


def test_the_network_is_left_as_it_was(network: nn.Module) -> None:
    network.train()
    before = copy.deepcopy(network.state_dict())
    for per_example in (True, False):
        importances(network, make_set(), per_example=per_example, method="x")
    assert all(module.training for module in network.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_dampening_is_the_formula(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    own, reference = (
        {name: torch.rand(value.shape, generator=generator) for name, value in network.named_parameters()}
        for _ in range(2)
    )
    own["4.bias"][:] = 0
    reference["4.bias"][:] = 0
    reference["1.bias"][:] = 0
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    count = dampen(network, own, reference, selection=2.0, dampening=0.7)
    expected_count = 0
    for name, parameter in network.named_parameters():
        for place in torch.cartesian_prod(*map(torch.arange, parameter.shape)).reshape(-1, parameter.ndim):
            at = tuple(place.tolist())
            f, d, old = float(own[name][at]), float(reference[name][at]), float(before[name][at])
            if f > 2.0 * d:
                expected_count += 1
                old *= min(1.0, 0.7 * d / f)
            assert float(parameter.detach()[at]) == pytest.approx(old, abs=1e-6)
    assert count == expected_count


def test_what_matters_to_the_examples_to_forget_alone_becomes_nothing() -> None:
    layer = nn.Linear(1, 1, bias=False)
    dampen(layer, {"weight": torch.ones(1, 1)}, {"weight": torch.zeros(1, 1)}, selection=10.0, dampening=1.0)
    assert not layer.weight.any()


def test_ratios_are_sorted_and_finite() -> None:
    own = {"a": torch.tensor([1.0, 4.0, 0.0]), "b": torch.tensor([2.0])}
    reference = {"a": torch.tensor([1.0, 0.0, 0.0]), "b": torch.tensor([4.0])}
    assert ratios(own, reference).tolist() == [0.5, 1.0]


def test_a_model_that_has_diverged_is_named(network: nn.Module) -> None:
    with torch.no_grad():
        network.get_parameter("4.weight").fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"ssd: the gradient of parameter 0\.weight"):
        importances(network, make_set(), method="ssd")


def test_a_network_that_torch_cannot_batch_is_read_example_by_example() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(192, 2)

        def forward(self, images: Tensor) -> Tensor:
            scale = 2.0 if float(images.detach().sum()) > 0 else 1.0
            logits: Tensor = self.layer(images.flatten(1)) * scale
            return logits

    network, examples = Counting(), make_set()
    found = importances(network, examples, method="ssd")
    squares = [
        importances(network, examples.subset([index]), per_example=False, method="ssd")["layer.weight"]
        for index in range(len(examples))
    ]
    torch.testing.assert_close(found["layer.weight"], torch.stack(squares).mean(0))
