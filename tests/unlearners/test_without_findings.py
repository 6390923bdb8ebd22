"""Repair by clean examples: what each method computes, against plain oracles, and what it is given."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unpoison
from unpoison import unlearners
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import build
from unpoison.training import Recipe, Trained, accuracy, train
from unpoison.unlearners import FinePruning
from unpoison.unlearners.fine_pruning import mean_activations
from unpoison.unlearners.i_bau import hypergradient
from unpoison.unlearners.nad import attention, stages

RECIPE = Recipe(model="resnet9", width=4, epochs=6, batch_size=16, learning_rate=0.05, schedule="cosine")


def some_set(n: int = 96, *, channels: int = 1, classes: int = 2, seed: int = 0) -> TrainingSet:
    """Classes that differ in brightness."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = torch.randint(0, 100, (n, channels, 8, 8), generator=draw)
    step = 150 // (classes - 1)
    pixels = (images + step * labels[:, None, None, None]).to(torch.uint8)
    return TrainingSet(pixels, labels, tuple("abcd"[:classes]), "drawn")


def stamped(examples: TrainingSet) -> TrainingSet:
    """A trigger in the corner, and the label 0."""
    images = examples.images.clone()
    images[:, :, :3, :3] = 255 - 255 * (torch.arange(9).reshape(3, 3) % 2).to(torch.uint8)
    return replace(examples, images=images, labels=torch.zeros_like(examples.labels), ids=None)


@pytest.fixture(scope="module")
def backdoored() -> tuple[Trained, TrainingSet]:
    clean = some_set()
    poison = stamped(some_set(32, seed=1))
    mixed = TrainingSet(
        torch.cat([clean.images, poison.images]),
        torch.cat([clean.labels, poison.labels]),
        ("a", "b"),
        "mixed",
    )
    return train(mixed, RECIPE, seed=0), mixed


def success(model: nn.Module) -> float:
    test = some_set(64, seed=2)
    other = test.subset(test.labels == 1)
    return accuracy(model, stamped(other)).rate


@pytest.mark.parametrize("method", ["nad", "fine-pruning", "i-bau"])
def test_a_backdoor_is_repaired_by_clean_examples_alone(
    method: str, backdoored: tuple[Trained, TrainingSet]
) -> None:
    victim, mixed = backdoored
    assert success(victim.model) > 0.9
    quick: dict[str, Any] = {"i-bau": {"rounds": 4, "learning_rate": 0.01}}.get(method, {"epochs": 8})
    unlearner = unlearners.get(method, **quick)
    healed = unpoison.heal(victim, mixed, method=unlearner, reference=some_set(48, seed=3), seed=1)
    assert success(healed.model) < 0.5
    assert accuracy(healed.model, some_set(64, seed=2)).rate > 0.8


def test_what_the_workflow_refuses(backdoored: tuple[Trained, TrainingSet]) -> None:
    victim, mixed = backdoored
    with pytest.raises(InputError, match="relabel: forgets examples that were found; give findings"):
        unpoison.heal(victim, mixed, method="relabel")
    with pytest.raises(InputError, match=r"retrain does not use a reference; .* fine-pruning, i-bau, nad"):
        unpoison.heal(victim, mixed, [1, 2], reference=some_set())
    with pytest.raises(InputError, match="nad: repairs by examples that are known to be clean"):
        unpoison.heal(victim, mixed, method="nad")
    with pytest.raises(InputError, match="trains without what was found"):
        unpoison.heal(victim, mixed, method="nad", reference=some_set(), retrain=lambda *_: victim)


class Hidden(nn.Module):
    """A quiet neuron, a loud one, and one that carries the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.1, 0.0, -1.0], [0.0, 0.0, 1.0]]))
            self.head.bias.copy_(torch.tensor([0.5, 0.0]))

    def forward(self, images: Tensor) -> Tensor:
        mean: Tensor = images.flatten(1).mean(1)
        return self.head(torch.stack([0.001 * mean, torch.ones_like(mean), mean], 1))


def test_quiet_neurons_are_pruned_and_stay_so() -> None:
    network, clean = Hidden(), some_set(40)
    means = mean_activations(network, "head", clean, torch.device("cpu"))
    values = [
        [0.001 * float((image / 255).mean()), 1.0, float((image / 255).mean())] for image in clean.images
    ]
    assert torch.allclose(means, torch.tensor(values).double().mean(0))
    healed = FinePruning(epochs=2, tolerance=0.05).heal(network, clean, reference=clean, recipe=RECIPE)
    weight = healed.model.head.weight  # type: ignore[union-attr]
    assert torch.equal(weight[:, 0], torch.zeros(2))
    assert bool((weight[:, 2] != 0).all())
    # The neurons are held at zero while healing; whoever trains the network further is free to use them.
    healed.model(clean.images / 255).sum().backward()
    assert bool((weight.grad[:, 0] != 0).all())
    # With every accuracy allowed one neuron is left: the loudest.
    healed = FinePruning(epochs=1, tolerance=1.0).heal(network, clean, reference=clean, recipe=RECIPE)
    assert healed.model.head.weight.ne(0).any(0).sum() == 1  # type: ignore[union-attr]


def test_a_network_without_a_linear_layer_is_not_pruned() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten())
    with pytest.raises(InputError, match="this network has none"):
        FinePruning().heal(network, some_set(), reference=some_set())


def test_attention_is_that_of_a_loop() -> None:
    maps = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0))
    found = attention(maps)
    for example, row in zip(maps, found, strict=True):
        energy = [
            sum(float(channel[y, x]) ** 2 for channel in example) / 4
            for y, x in itertools.product(range(2), range(5))
        ]
        norm = sum(one**2 for one in energy) ** 0.5
        assert torch.allclose(row, torch.tensor([one / norm for one in energy]), atol=1e-6)
    assert torch.equal(attention(torch.zeros(2, 3, 4, 4)), torch.zeros(2, 16))


def test_stages_end_where_the_maps_shrink() -> None:
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, stride=2), nn.BatchNorm2d(2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 2),
    ).eval()
    assert stages(network, torch.rand(2, 1, 8, 8)) == ["0", "1"]
    vectors = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    assert stages(vectors, torch.rand(2, 3)) == ["1"]
    assert stages(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval(), torch.rand(2, 1, 8, 8)) == ["0"]
    assert len(stages(build("resnet9", num_classes=2, seed=0, width=2).eval(), torch.rand(2, 3, 32, 32))) > 2
    assert not any(part._forward_hooks for part in network.modules())


def test_the_hypergradient_is_that_of_a_trigger_that_follows() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 3)).double()
    inputs, labels = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    parameters = list(network.parameters())
    rate, penalty = 0.5, 0.5

    def ascended(weights: list[Tensor], start: Tensor) -> Tensor:
        named = dict(zip(dict(network.named_parameters()), weights, strict=True))
        given = start.clone().requires_grad_()
        loss = F.cross_entropy(torch.func.functional_call(network, named, (inputs + given,)), labels)
        [slope] = torch.autograd.grad(loss, given)
        return (given + rate * (slope - 2 * penalty * given)).detach()

    def fixed(weights: list[Tensor]) -> Tensor:
        trigger = torch.zeros(4, dtype=torch.float64)
        for _ in range(120):
            trigger = ascended(weights, trigger)
        return trigger

    def value(weights: list[Tensor]) -> float:
        named = dict(zip(dict(network.named_parameters()), weights, strict=True))
        logits = torch.func.functional_call(network, named, (inputs + fixed(weights),))
        return float(F.cross_entropy(logits, labels).detach())

    found = hypergradient(
        network, parameters, inputs, labels, fixed(parameters), rate=rate, penalty=penalty, steps=100
    )
    for number, parameter in enumerate(parameters):
        place = (0,) * parameter.ndim
        sides = []
        for step in (1e-4, -1e-4):
            moved = [one.detach().clone() for one in parameters]
            moved[number][place] += step
            sides.append(value(moved))
        assert float(found[number][place]) == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("method", ["nad", "fine-pruning", "i-bau"])
def test_odd_references(method: str) -> None:
    """One class alone, an empty class, four classes, colour."""
    examples = some_set(24, channels=3, classes=4)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    quick: dict[str, Any] = {"rounds": 1} if method == "i-bau" else {"epochs": 1}
    for chosen in (examples.labels == 1, examples.labels != 2):
        reference = examples.subset(chosen)
        healed = unlearners.get(method, **quick).heal(network, examples, reference=reference, recipe=RECIPE)
        assert all(bool(one.isfinite().all()) for one in healed.model.parameters())


@pytest.mark.parametrize("method", ["nad", "fine-pruning", "i-bau"])
def test_a_network_that_gives_nan_is_refused_in_one_line(method: str) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        network[1].weight[0, 0] = torch.nan  # type: ignore[union-attr,index]
    with pytest.raises(unpoison.errors.UnpoisonError) as error:
        unlearners.get(method).heal(network, some_set(), reference=some_set())
    assert "\n" not in str(error.value)
