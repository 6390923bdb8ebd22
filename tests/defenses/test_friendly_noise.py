"""Friendly noise against a plain loop over single images: large, clamped, predictions unchanged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison import defenses
from unpoison.defenses import FriendlyNoise
from unpoison.errors import InputError
from unpoison.models import build
from unpoison.training import Batch, train

sys.path.insert(0, str(Path(__file__).parent))
from runs import RECIPE, check_run, some_set


def network() -> nn.Module:
    return build("resnet9", num_classes=3, in_channels=1, width=2, seed=0, image_size=(12, 12)).eval()


def by_hand(
    model: nn.Module, image: Tensor, start: Tensor, steps: int, weight: float, clamp: float
) -> Tensor:
    """The noise of one image by torch's own optimiser and schedule."""
    noise = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([noise], lr=100 / 128, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps // 4 * 3])
    answer = F.softmax(model(image[None]), 1).detach()
    for _ in range(steps):
        clamped = noise.clamp(-clamp / 255, clamp / 255)
        noisy = F.log_softmax(model((image + clamped).clamp(0, 1)[None]), 1)
        loss = F.kl_div(noisy, answer, reduction="sum") - weight * clamped.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return noise.detach().clamp(-clamp / 255, clamp / 255)


@pytest.mark.parametrize(("weight", "clamp"), [(1.0, 16.0), (50.0, 6.0)])
def test_it_is_what_a_loop_over_images_finds(weight: float, clamp: float) -> None:
    model, images = network(), some_set().images[:5].float() / 255
    start = (2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1) * 8 / 255
    defense = FriendlyNoise(weight=weight, clamp=clamp, steps=12)
    found, divergences = defense.optimized(model, images, start)
    for place in range(5):
        alone = by_hand(model, images[place], start[place], 12, weight, clamp)
        torch.testing.assert_close(found[place], alone, atol=2e-5, rtol=1e-3)
    assert bool((divergences >= -1e-6).all())
    assert float(found.abs().max()) <= clamp / 255 + 1e-7


def test_more_weight_makes_more_noise_and_predictions_stay() -> None:
    model, images = network(), some_set().images.float() / 255
    start = (2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1) * 8 / 255
    none, heavy = (FriendlyNoise(weight=weight, steps=30) for weight in (0.0, 2000.0))
    (quiet, small), (loud, large) = (one.optimized(model, images, start) for one in (none, heavy))
    assert float(loud.abs().mean()) > 1.2 * float(quiet.abs().mean())
    at_random = F.log_softmax(model((images + start.sign() * 16 / 255).clamp(0, 1)), 1)
    answers = F.log_softmax(model(images), 1)
    by_chance = F.kl_div(at_random, answers, reduction="none", log_target=True).sum(1)
    assert float(small.mean()) < 0.2 * float(by_chance.mean().detach())
    assert float(small.mean()) < float(large.mean())


@pytest.mark.parametrize("random", ["bernoulli", "gaussian", "uniform", "none"])
def test_the_batch_shows_the_noise(random: str) -> None:
    training_set = some_set()
    defense = FriendlyNoise(random=random, begin_epoch=0, steps=4, images_at_once=7)  # type: ignore[arg-type]
    defense.begin(training_set, RECIPE, seed=3)
    alive = torch.arange(40) != 11
    assert torch.equal(defense.keep(0, network(), training_set, alive), alive)
    noise = defense.state()["noise"]
    assert not bool(noise[11].any())
    assert noise.dtype == torch.int8
    indices = torch.tensor([7, 11, 2])
    batch = Batch(
        images=training_set.images[indices],
        labels=training_set.labels[indices],
        num_classes=training_set.num_classes,
        indices=indices,
        epoch=1,
        augment=lambda images: images,
        generator=torch.Generator().manual_seed(0),
    )
    shown, labels = defense.batch(batch)
    assert torch.equal(labels, training_set.labels[indices])
    clean = training_set.images[indices].float() / 255
    friendly = (clean + noise[indices] * (16 / 127 / 255)).clamp(0, 1)
    rest = shown - friendly
    if random == "none":
        torch.testing.assert_close(shown, friendly)
    elif random == "bernoulli":
        torch.testing.assert_close(rest.abs(), torch.full_like(rest, 8 / 255))
        assert 0.4 < float((rest > 0).float().mean()) < 0.6
    elif random == "gaussian":
        assert 7 / 255 < float(rest.std()) < 9 / 255
    else:
        assert 7 / 255 < float(rest.abs().max()) <= 8 / 255 + 1e-6


def test_how_many_images_at_once_changes_nothing() -> None:
    found = []
    for at_once in (3, 40):
        defense = FriendlyNoise(begin_epoch=0, steps=3, images_at_once=at_once)
        defense.begin(some_set(), RECIPE, seed=3)
        defense.keep(0, network(), some_set(), torch.ones(40, dtype=torch.bool))
        found.append(defense.state()["noise"])
    assert int((found[0].int() - found[1].int()).abs().max()) <= 1


@pytest.mark.parametrize("preset", ["friends-b", "friends-g"])
@pytest.mark.parametrize("begin_epoch", [1, 2])
def test_it_defends_a_run(preset: str, begin_epoch: int, tmp_path: Path) -> None:
    trained = check_run(
        lambda: defenses.get("friendly-noise", preset=preset, begin_epoch=begin_epoch, steps=3), tmp_path
    )
    assert trained.defense is not None
    told = trained.defense["friendly_noise"]
    assert 0 < told["mean_size"] <= 16
    assert told["mean_divergence"] < 1


def test_a_short_run_has_none() -> None:
    trained = train(some_set(), RECIPE, seed=0, defense=FriendlyNoise())
    assert trained.defense is not None
    assert trained.defense["friendly_noise"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"random": "pink"}, "random must be one of 'bernoulli'"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"momentum": 1}, r"momentum must be a number in \[0, 1\)"),
        ({"clamp": 0}, "clamp must be a number"),
        ({"begin_epoch": 1.5}, "begin_epoch must be a whole number"),
    ],
)
def test_it_refuses(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        FriendlyNoise(**options)
    with pytest.raises(InputError, match="no preset"):
        defenses.get("friendly-noise", preset="friends")
