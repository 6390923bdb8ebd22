"""Clean-label noise: Narcissus, COMBAT, and availability poison by error-minimising noise and TAP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison import attacks
from unpoison.attacks import TAP, Combat, ErrorMinimizing, Narcissus
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import (
    AdditiveTrigger,
    Availability,
    Backdoor,
    Budget,
    GeneratedNoiseTrigger,
    PatchTrigger,
    generator_weights,
)


@pytest.fixture
def clean() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(60, 190, (90, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(90) % 3, ("ant", "bee", "cow"), "beasts")


def linear(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def goal() -> Backdoor:
    return Backdoor(PatchTrigger.white_corner(2), source=None, target=2)


def loss(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(network(images.float() / 255), labels))


def test_narcissus_finds_the_noise_that_a_linear_network_calls_its_target(clean: TrainingSet) -> None:
    network = linear()
    made = Narcissus(steps=40, eps=6).craft(goal(), clean, budget=Budget(count=9), surrogate=network, seed=0)
    assert set(made.given_labels.tolist()) == set(made.clean_labels.tolist()) == {2}
    change = made.images.int() - clean.images[made.indices].int()
    assert bool((change == change[0]).all())  # one noise for all
    assert int(change.abs().max()) == 6
    assert isinstance(made.goal, Backdoor)
    trigger = made.goal.trigger
    assert isinstance(trigger, AdditiveTrigger)
    assert torch.equal(trigger.values, (3 * change[0]).to(torch.int16))
    # Where both other classes lose to the target by a pixel, its noise is at the bound.
    weight = network[1].weight.detach()  # type: ignore[index, union-attr]
    lead = weight[2] - weight[:2]
    clear = (lead.sign().sum(0).abs() == 2) & (lead.abs().amin(0) > 0.05)
    assert bool(clear.any())
    assert torch.equal(change[0].flatten()[clear], (6 * lead[0].sign()[clear]).int())
    twice = Narcissus(steps=40, eps=6, magnify=2).craft(
        goal(), clean, budget=Budget(count=9), surrogate=network, seed=0
    )
    assert torch.equal(twice.images, made.images)


def test_narcissus_refuses_a_surrogate_that_answers_always_the_same(clean: TrainingSet) -> None:
    network = linear()
    with torch.no_grad():
        network[1].weight.zero_()  # type: ignore[index, union-attr]
    with pytest.raises(InputError, match="do not depend on its inputs; give a trained network"):
        Narcissus(steps=2).craft(goal(), clean, budget=Budget(count=1), surrogate=network, seed=0)


def test_combat_learns_noise_that_is_called_the_target(clean: TrainingSet) -> None:
    attack = Combat(epochs=20, width=4, generator_rate=0.02, learning_rate=0.05, clean_weight=0, low_pass=1)
    losses: list[float] = []
    made = attack.craft(
        goal(),
        clean,
        budget=Budget(count=15),
        surrogate=linear(),
        seed=0,
        progress=lambda stage, done, total, **metrics: losses.append(metrics["loss"]),
    )
    assert losses[-1] < 0.85 * losses[0]
    assert set(made.given_labels.tolist()) == {2}
    assert 0 < float(made.linf.max()) <= 20
    assert isinstance(made.goal, Backdoor)
    trigger = made.goal.trigger
    assert torch.equal(trigger.stamp(clean.images[made.indices]), made.images)
    # A generator that is given is used as it is.
    given = Backdoor(
        GeneratedNoiseTrigger(
            generator_weights(1, 1, 2, draws=torch.Generator().manual_seed(0)) * 3, 1, 2, eps=20
        ),
        None,
        2,
    )
    assert Combat().craft(given, clean, budget=Budget(count=3), seed=0).goal is given


def test_error_minimising_noise_lowers_the_error_of_its_network(clean: TrainingSet) -> None:
    attack = ErrorMinimizing(rounds=6, steps=5, step_size=2, learning_rate=0.05, batch_size=30)
    made = attack.craft(Availability(), clean, budget=Budget(share=1.0), surrogate=linear(), seed=0)
    errors = made.configuration["errors"]
    assert errors[-1] < 0.1 < errors[0] + 0.1
    assert torch.equal(made.given_labels, clean.labels)
    assert float(made.linf.max()) == 8
    # What is random is learned by another network, and only with the noise.
    changes = (made.images.float() - clean.images.float()).flatten(1)
    one_hot = F.one_hot(clean.labels, 3).float()
    half = torch.arange(90) < 45
    found = torch.linalg.lstsq(changes[half], one_hot[half]).solution
    right = (changes[~half] @ found).argmax(1) == clean.labels[~half]
    assert float(right.float().mean()) > 0.8


def test_one_noise_for_each_class(clean: TrainingSet) -> None:
    attack = attacks.get("error-minimizing", preset="class-wise", rounds=3, batch_size=30)
    made = attack.craft(Availability(), clean, budget=Budget(count=40), surrogate=linear(), seed=0)
    changes = made.images.int() - clean.images[made.indices].int()
    for label in range(3):
        own = changes[made.clean_labels == label]
        assert bool((own == own[0]).all())
    assert not torch.equal(changes[0], changes[1])


def test_it_stops_once_nothing_is_predicted_wrongly(clean: TrainingSet) -> None:
    attack = ErrorMinimizing(stop_error=1.0, rounds=9, steps=1, batch_size=30)
    made = attack.craft(Availability(), clean, budget=Budget(count=5), surrogate=linear(), seed=0)
    assert len(made.configuration["errors"]) < 9


def test_tap_moves_every_class_to_the_next(clean: TrainingSet) -> None:
    network = linear()
    attack = TAP(steps=30, step_size=0.5, augmentation="none")
    made = attack.craft(Availability(), clean, budget=Budget(share=1.0), surrogate=network, seed=0)
    assert torch.equal(made.given_labels, clean.labels)
    aims = (clean.labels + 1) % 3
    assert loss(network, made.images, aims) < loss(network, clean.images, aims) - 0.05
    # The oracle of a linear network: pixels follow the sign of the gradient, image by image.
    weight, bias = (one.detach().double() for one in network.parameters())
    for row in range(0, 90, 11):
        pixels = clean.images[row].flatten().double()
        change = torch.zeros(64, dtype=torch.float64)
        for _ in range(30):
            probabilities = (weight @ ((pixels + change) / 255) + bias).softmax(0)
            slope = weight.t() @ (probabilities - F.one_hot(aims[row], 3))
            change = (change - 0.5 * slope.sign()).clamp(-8, 8)
        found = made.images[row].flatten().double() - pixels
        assert float((found - change).abs().mean()) < 0.2
    other = TAP(steps=3, augmentation="none", batch_size=7)
    parts = other.craft(Availability(), clean, budget=Budget(count=20), surrogate=network, seed=0)
    whole = TAP(steps=3, augmentation="none").craft(
        Availability(), clean, budget=Budget(count=20), surrogate=network, seed=0
    )
    assert torch.equal(parts.images, whole.images)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("narcissus", {"magnify": 0.5}, "magnify must be a number of at least 1"),
        ("combat", {"low_pass": 0}, r"low_pass must be a number in \(0, 1\]"),
        ("error-minimizing", {"batch_size": 1}, "batch_size must be a whole number of at least 2"),
        ("tap", {"shift_of_labels": 0}, "shift_of_labels must be a whole number of at least 1"),
        ("input-aware", {"share": 0.6}, r"share must be a number in \(0, 0.5\]"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        attacks.get(name, **options)
