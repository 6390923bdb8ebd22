"""Feature collision, convex polytope and Bullseye: against slow oracles, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison import attacks
from unpoison.attacks import Attack, BullseyePolytope, ConvexPolytope, FeatureCollision
from unpoison.attacks._feature_space import FeatureReader
from unpoison.attacks._networks import frozen
from unpoison.attacks.convex_polytope import grams_around, nearest_weights, on_simplex
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import features
from unpoison.threats import Budget, PoisonSet, TargetedMisclassification


@pytest.fixture
def clean() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(60) % 3, ("ant", "bee", "cow"), "beasts")


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(54, 12),
            nn.Tanh(),
            nn.Linear(12, 3),
        )


def goal(clean: TrainingSet, indices: int | tuple[int, ...] = 1) -> TargetedMisclassification:
    return TargetedMisclassification.of(clean, indices, target=2)


def made(attack: Attack, clean: TrainingSet, *, count: int = 5, **options: Any) -> PoisonSet:
    options = {"surrogate": network(), "seed": 0, **options}
    return attack.craft(goal(clean), clean, budget=Budget(count=count), **options)


def read(images: Tensor, layer: str = "6") -> Tensor:
    return features(network(), layer, images, side="input").double()


def test_points_on_the_simplex_are_the_nearest() -> None:
    points = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * 2
    found = on_simplex(points)
    assert torch.allclose(found.sum(1), torch.ones(40), atol=1e-5)
    assert float(found.min()) >= 0
    for point, one in zip(points.tolist(), found, strict=True):
        # The nearest point is max(p - excess, 0), where the excess makes the sum one: by bisection.
        low, high = min(point) - 1, max(point)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if sum(max(value - middle, 0) for value in point) > 1 else (low, middle)
            )
        assert one.tolist() == pytest.approx([max(value - low, 0) for value in point], abs=1e-5)
    inside = torch.tensor([[0.2, 0.3, 0.5]])
    assert torch.allclose(on_simplex(inside), inside)


def test_weights_are_the_least_squares_on_the_simplex() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, target = torch.randn(3, 5, 9, generator=generator), torch.randn(3, 9, generator=generator)
    grams, products = rows @ rows.mT, (rows @ target[:, :, None])[:, :, 0]
    start = torch.full((3, 5), 0.2)
    found = nearest_weights(grams_around(list(rows), list(target)), start, steps=100)
    for number in range(3):
        weights = start[number].double()
        gram, product = grams[number].double(), products[number].double()
        for _ in range(3000):
            weights = on_simplex((weights - 0.03 * (gram @ weights - product))[None])[0]
        assert found[number].tolist() == pytest.approx(weights.tolist(), abs=1e-3)


def test_collisions_are_those_of_one_poison_at_a_time(clean: TrainingSet) -> None:
    bases = (2, 5, 8, 11)
    options: Any = {"steps": 30, "step_size": 0.05, "pull": 0.3, "watermark": 0.2, "eps": 20}
    together = made(FeatureCollision(**options, bases=bases), clean, count=4)
    apart = [made(FeatureCollision(**options, bases=(base,)), clean, count=1) for base in bases]
    assert torch.equal(together.images, torch.cat([one.images for one in apart]))
    assert 0 < float(together.linf.max()) <= 20


def test_collisions_come_nearer_to_the_target(clean: TrainingSet) -> None:
    poison = made(FeatureCollision(steps=60, step_size=0.05), clean)
    wanted = read(clean.images[1:2])
    before = (read(clean.images[poison.indices]) - wanted).norm(dim=1)
    after = (read(poison.images) - wanted).norm(dim=1)
    assert bool((after < before).all())
    assert float(poison.linf.max()) == 8
    assert set(poison.given_labels.tolist()) == {2}


def test_a_step_judged_late_stops_a_poison_that_rises(clean: TrainingSet) -> None:
    attack = FeatureCollision(steps=12, step_size=0.05, watermark=0.3, eps=4, late=True, bases=(2, 5, 8))
    found = made(attack, clean, count=3).images.float() / 255
    model = network()
    images, target = clean.images[[2, 5, 8]].float() / 255, clean.images[1:2].float() / 255
    reader = FeatureReader("test", [model], ())
    with frozen([model]):
        # The public code's loop, one poison at a time.
        wanted = reader(target)[0][0]
        for image, one in zip(images, found, strict=True):
            poison, step, objectives = 0.7 * image[None] + 0.3 * target, 0.05, [1e9]
            for _ in range(12):
                poison = poison.detach().requires_grad_()
                value = (reader(poison)[0][0] - wanted).square().sum()
                (slope,) = torch.autograd.grad(value, poison)
                if float(value.detach()) > objectives[-1]:
                    step *= 0.2
                    continue
                objectives.append(float(value.detach()))
                moved = (poison.detach() - step * slope - image).clamp(-4 / 255, 4 / 255)
                poison = (image + moved).clamp(0, 1)
            assert float((one - poison.detach()[0]).abs().max()) < 0.51 / 255  # rounded
    assert attacks.get("feature-collision", preset="released") == FeatureCollision(late=True)


def test_a_pull_keeps_poisons_at_their_bases(clean: TrainingSet) -> None:
    loose, pulled = (
        made(FeatureCollision(steps=60, step_size=0.05, eps=255, pull=pull), clean) for pull in (0.0, 1000.0)
    )
    assert float(pulled.l2.mean()) < 0.8 * float(loose.l2.mean())


def test_the_polytope_encloses_and_the_bullseye_centres(clean: TrainingSet) -> None:
    wanted = read(clean.images[1:2])[0]

    def off_centre(images: Tensor) -> float:
        return float((read(images).mean(0) - wanted).norm() / wanted.norm())

    def outside(images: Tensor) -> float:
        rows = read(images)
        weights = nearest_weights(
            grams_around([rows], [wanted]), torch.full((1, len(rows)), 0.2).double(), steps=100
        )
        return float((weights[0] @ rows - wanted).norm() / wanted.norm())

    bases = (2, 5, 8, 11, 14)
    polytope, bullseye = (
        made(attack, clean)
        for attack in (
            ConvexPolytope(steps=20, inner=30, eps=12, bases=bases),
            BullseyePolytope(steps=30, eps=12, bases=bases),
        )
    )
    unmoved = clean.images[list(bases)]
    assert outside(polytope.images) < 0.6 * outside(unmoved)
    assert off_centre(bullseye.images) < 0.6 * off_centre(unmoved)
    assert off_centre(bullseye.images) < off_centre(polytope.images)


@pytest.mark.parametrize("kind", [FeatureCollision, ConvexPolytope, BullseyePolytope])
def test_blocks_bases_and_several_targets(kind: Any, clean: TrainingSet) -> None:
    attack = kind(steps=2, layers=("0", "4"), bases=(20, 4, 20, 7))
    poison = attack.craft(
        goal(clean, (1, 4)),
        clean,
        budget=Budget(count=2),
        surrogate=[network(0), network(1)],
        seed=0,
    )
    assert poison.indices.tolist() == [4, 20]  # the first two that are given
    assert poison.configuration["surrogates"] == 2
    with pytest.raises(InputError, match="module path 'nothing'"):
        made(kind(layers=("nothing",)), clean)
    with pytest.raises(InputError, match="base 99 is outside"):
        made(kind(bases=(99,)), clean, count=1)
    with pytest.raises(InputError, match="more than the 1 examples of the bases given"):
        made(kind(bases=(9,)), clean, count=2)
    with pytest.raises(InputError, match=r"more than the 20 examples of the target class 2 \(cow\)"):
        made(kind(), clean, count=21)


def test_draws_average_dropout_and_leave_generators_alone(clean: TrainingSet) -> None:
    model = network()
    images = clean.images[:3].float() / 255
    with frozen([model]):
        before = torch.random.get_rng_state()
        many = FeatureReader("test", [model], (), draws=400, seed=0)(images)[0]
        assert torch.equal(torch.random.get_rng_state(), before)
        again = FeatureReader("test", [model], (), draws=400, seed=0)(images)[0]
        off = FeatureReader("test", [model], ())(images)[0]
        once = FeatureReader("test", [model], (), draws=2, seed=0)(images)[0]
        assert not any(module.training for module in model.modules())
    assert torch.equal(many, again)
    assert float((many - off).abs().max()) < 0.1
    assert float((once - off).abs().max()) > 0.1


def test_published_settings() -> None:
    assert attacks.get("feature-collision", preset="benchmark") == FeatureCollision(
        eps=8, steps=120, step_size=0.001, watermark=0.3
    )
    assert attacks.get("feature-collision", preset="published") == FeatureCollision(eps=255, pull=0.25)
    assert attacks.get("convex-polytope", preset="published") == ConvexPolytope(
        eps=25.5, steps=4000, step_size=0.04
    )
    assert attacks.get("convex-polytope", preset="benchmark") == ConvexPolytope(eps=8, steps=1200)
    assert attacks.get("bullseye-polytope", preset="published") == BullseyePolytope(
        eps=25.5, steps=800, step_size=0.04
    )
    assert attacks.get("bullseye-polytope", steps=1500, layers=["0"]) == BullseyePolytope(
        steps=1500, layers=("0",)
    )
    assert attacks.get("bullseye-polytope", preset="benchmark") == BullseyePolytope(eps=8, steps=1200)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"eps": 0}) for kind in (FeatureCollision, ConvexPolytope, BullseyePolytope)),
        *((kind, {"steps": 0}) for kind in (FeatureCollision, ConvexPolytope, BullseyePolytope)),
        *((kind, {"step_size": 0}) for kind in (FeatureCollision, ConvexPolytope, BullseyePolytope)),
        (FeatureCollision, {"shrink": 1}),
        (FeatureCollision, {"watermark": 1}),
        (FeatureCollision, {"pull": -1}),
        (ConvexPolytope, {"inner": 0}),
        (BullseyePolytope, {"draws": 0}),
    ],
)
def test_impossible_options(kind: Any, options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        kind(**options)
