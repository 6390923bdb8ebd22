from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unpoison import attacks
from unpoison.attacks import SleeperAgent, sleeper_agent
from unpoison.attacks.sleeper_agent import gradient_norms
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import Backdoor, Budget, RandomPatchTrigger
from unpoison.training import Recipe

QUICK = Recipe(epochs=1, batch_size=30, learning_rate=0.01)


@pytest.fixture
def clean() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (90, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(90) % 3, ("ant", "bee", "cow"), "beasts")


def goal() -> Backdoor:
    return Backdoor(RandomPatchTrigger.coloured(3, seed=0), source=1, target=2)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3)
        )


def slow_norms(model: nn.Module, examples: TrainingSet) -> list[float]:
    norms = []
    for row in range(len(examples)):
        images, labels = examples.batch(row, row + 1)
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        squares = [float(one.grad.square().sum()) for one in model.parameters() if one.grad is not None]
        norms.append(sum(squares) ** 0.5)
    return norms


def test_gradient_norms_are_those_of_one_example_at_a_time(clean: TrainingSet) -> None:
    model = network().eval()
    model[0].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    found = gradient_norms(model, clean.subset(range(11)), batch=4)
    assert found.tolist() == pytest.approx(slow_norms(model, clean.subset(range(11))), rel=1e-4)


def test_the_examples_with_the_largest_gradients_are_chosen(clean: TrainingSet) -> None:
    model = network().eval()
    made = SleeperAgent(steps=1, retrainings=0).craft(
        goal(), clean, budget=Budget(count=5), surrogate=model, seed=0
    )
    own = (clean.labels == 2).nonzero().reshape(-1)
    norms = torch.tensor(slow_norms(network().eval(), clean.subset(own)))
    assert made.indices.tolist() == sorted(own[norms.topk(5).indices].tolist())
    drawn = SleeperAgent(steps=1, retrainings=0, choice="random").craft(
        goal(), clean, budget=Budget(count=5), surrogate=model, seed=0
    )
    assert drawn.indices.tolist() != made.indices.tolist()
    assert set(drawn.given_labels.tolist()) == {2}


def test_the_loss_falls_and_no_poison_bears_the_trigger(clean: TrainingSet) -> None:
    attack = SleeperAgent(steps=40, retrainings=0, augmentation="none", eps=32)
    made = attack.craft(goal(), clean, budget=Budget(count=10), surrogate=network(), seed=0)
    losses = made.configuration["losses"]
    assert losses[-1] < losses[0] / 5
    assert float(made.linf.max()) <= 32
    assert set(made.given_labels.tolist()) == set(made.clean_labels.tolist()) == {2}


def test_pieces_do_not_change_the_gradient_that_is_wanted(clean: TrainingSet) -> None:
    model, patched = network().eval(), goal().trigger.stamp(clean.images[:20])
    whole, pieces = (SleeperAgent(micro_batch=size)._wanted(model, patched, 2) for size in (20, 7))
    for one, two in zip(whole, pieces, strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_surrogates_are_retrained_on_the_poisons_as_they_are(
    clean: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[TrainingSet, dict[str, Any]]] = []
    train = sleeper_agent.train

    def watched(training_set: TrainingSet, recipe: Recipe, **options: Any) -> Any:
        seen.append((training_set, options))
        return train(training_set, recipe, **options)

    monkeypatch.setattr(sleeper_agent, "train", watched)
    made = SleeperAgent(steps=6, retrainings=2, recipe=QUICK).craft(
        goal(), clean, budget=Budget(count=4), surrogate=[network(0), network(1)], seed=0
    )
    assert len(seen) == 4  # twice each of two
    assert len({options["seed"] for _, options in seen}) == 4
    for poisoned, _ in seen:
        changed = (poisoned.images != clean.images).flatten(1).any(1).nonzero().reshape(-1)
        assert torch.equal(changed, made.indices)
    assert not torch.equal(seen[0][0].images, seen[2][0].images)
    assert len(made.configuration["losses"]) == 6
    assert made.configuration["recipe"]["epochs"] == 1


def test_the_published_settings() -> None:
    assert attacks.get("sleeper-agent", preset="published") == SleeperAgent(
        eps=16, steps=250, retrainings=4, step_size=0.1, choice="gradient-norm", sources=5000
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"retrainings": -1}, "retrainings must be at least 0"),
        ({"eps": 0}, "eps 0 is outside"),
        ({"step_size": 0}, "step_size 0"),
        ({"choice": "best"}, "choice must be one of gradient-norm, random"),
        ({"augmentation": "blur"}, "augmentation must be one of"),
        ({"recipe": "nosuch"}, "there is no preset 'nosuch'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SleeperAgent(**options)


def test_a_source_class_without_images_is_named(clean: TrainingSet) -> None:
    rest = clean.subset((clean.labels != 1).nonzero().reshape(-1))
    with pytest.raises(InputError, match=r"no example of class 1 \(bee\)"):
        SleeperAgent().craft(goal(), rest, budget=Budget(count=3), surrogate=network(), seed=0)
