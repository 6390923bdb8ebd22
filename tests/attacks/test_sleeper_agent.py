from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison import attacks
from unpoison.attacks import SleeperAgent
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


def test_pieces_do_not_change_the_result(clean: TrainingSet) -> None:
    whole, pieces = (
        SleeperAgent(steps=3, retrainings=0, augmentation="none", micro_batch=size).craft(
            goal(), clean, budget=Budget(count=6), surrogate=network(), seed=0
        )
        for size in (128, 7)
    )
    assert pieces.configuration["losses"] == pytest.approx(whole.configuration["losses"], abs=1e-4)
    # A step takes the sign of a gradient, which rounding turns where it is nearly zero.
    assert (whole.images == pieces.images).float().mean() > 0.95


class Recorder(nn.Module):
    """A linear network that keeps the images which it is trained on; copies keep them together."""

    trained_on: ClassVar[list[Tensor]] = []

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.trained_on.append((images.detach() * 255).round().to(torch.uint8))
        logits: Tensor = self.linear(images.flatten(1))
        return logits


def test_surrogates_are_retrained_on_the_poisons_of_that_moment(clean: TrainingSet) -> None:
    Recorder.trained_on.clear()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = [Recorder(), Recorder()]
    made = SleeperAgent(steps=6, retrainings=2, recipe=QUICK).craft(
        goal(), clean, budget=Budget(count=4), surrogate=networks, seed=0
    )
    known = {image.numpy().tobytes() for image in clean.images}
    seen = [image.numpy().tobytes() for batch in Recorder.trained_on for image in batch]
    assert len(seen) == 2 * 2 * len(clean)  # twice each of two
    by_training = [
        {image for image in seen[start : start + len(clean)] if image not in known}
        for start in range(0, len(seen), len(clean))
    ]
    assert [len(poisons) for poisons in by_training] == [4, 4, 4, 4]
    assert by_training[0] == by_training[1]
    assert not by_training[0] & by_training[2]
    assert len(made.configuration["losses"]) == 6
    assert made.configuration["recipe"]["epochs"] == 1


def test_a_recipe_may_be_plain_values() -> None:
    plain = SleeperAgent(recipe={"preset": "resnet18-40", "epochs": 36})  # type: ignore[arg-type]
    assert plain.recipe == Recipe.preset("resnet18-40", epochs=36)
    assert SleeperAgent(recipe="sample").recipe == Recipe.preset("sample")  # type: ignore[arg-type]


def test_gradient_norms_of_an_example_that_is_learned_well() -> None:
    clean = TrainingSet(torch.full((2, 1, 1, 1), 255, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[14.0], [-14.0]]))  # type: ignore[operator, union-attr]
        model[1].bias.zero_()  # type: ignore[operator, union-attr]
    # The label has a margin of 28, hence a probability of 1 - 7e-13; each logit's gradient is that long.
    expected = 2 / (1 + math.exp(28))
    assert float(gradient_norms(model.eval(), clean)[0]) == pytest.approx(expected, rel=1e-4, abs=0)


def test_the_published_settings() -> None:
    assert attacks.get("sleeper-agent", preset="published") == SleeperAgent(
        eps=16, steps=250, retrainings=4, step_size=0.1, choice="gradient-norm", sources=5000
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, found 0"),
        ({"retrainings": -1}, "retrainings must be a whole number of at least 0"),
        ({"eps": 0}, r"eps must be a number in \[1, 255\]"),
        ({"step_size": 0}, "step_size must be a number above 0"),
        ({"choice": "best"}, "choice must be one of 'gradient-norm', 'random'"),
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
