"""Gradient matching: the derivative against oracles, the pieces, the poisons, and that it works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison._recompression import recompressed
from unpoison._seeds import generator
from unpoison.attacks import GradientMatching
from unpoison.attacks._alignment import Alignment, gradient_of, unchanged
from unpoison.attacks._signed_descent import SignedDescent, through_jpeg, translated
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import Backdoor, Budget, PatchTrigger, PoisonSet, TargetedMisclassification
from unpoison.training import Recipe, predict, train

RECIPE = Recipe(model="convnet-bn", width=4, epochs=6, batch_size=32, learning_rate=0.05)
QUICK = GradientMatching(eps=32, steps=12, restarts=2, augmentation="none")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.manual_seed(0)


def smooth_net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(3 * 16, 5), nn.Tanh(),
            nn.Linear(5, 3),
        )  # fmt: skip
    return net.double().eval()


def problem(networks: int = 2) -> tuple[list[nn.Module], list[tuple[Tensor, ...]], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    nets = [smooth_net(seed) for seed in range(networks)]
    target = torch.rand(1, 2, 4, 4, generator=generator, dtype=torch.float64)
    wanted = [gradient_of(net, F.cross_entropy(net(target), torch.tensor([1]))) for net in nets]
    images = torch.rand(7, 2, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 1])
    return nets, wanted, images, labels


def by_the_book(
    nets: list[nn.Module], wanted: list[tuple[Tensor, ...]], images: Tensor, labels: Tensor
) -> Tensor:
    """The loss as the paper writes it, over the whole batch at once, with one graph."""
    total = torch.zeros((), dtype=images.dtype)
    for net, target in zip(nets, wanted, strict=True):
        found = torch.autograd.grad(
            F.cross_entropy(net(images), labels), tuple(net.parameters()), create_graph=True
        )
        flat, goal = (torch.cat([part.flatten() for part in parts]) for parts in (found, target))
        total = total + 1 - flat @ goal / (flat.norm() * goal.norm())
    return total / len(nets)


@pytest.mark.parametrize("held", [0, 100])
@pytest.mark.parametrize("micro_batch", [100, 3, 1])
@pytest.mark.parametrize("networks", [1, 2])
def test_every_piece_size_gives_the_slope_of_the_whole(micro_batch: int, networks: int, held: int) -> None:
    nets, wanted, images, labels = problem(networks)
    leaf = images.clone().requires_grad_()
    expected = by_the_book(nets, wanted, leaf, labels)
    slope = torch.autograd.grad(expected, leaf)[0]
    alignment = Alignment(nets, wanted, micro_batch=micro_batch, held=held)
    value, found = alignment.differentiate(images, labels)
    assert value == pytest.approx(float(expected.detach()), rel=1e-12)
    assert alignment.loss(images, labels) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(found, slope, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("held", [0, 100])
@pytest.mark.parametrize("micro_batch", [100, 3])
def test_alternatives_together_are_what_each_is_alone(micro_batch: int, held: int) -> None:
    nets, wanted, images, labels = problem(2)
    nets[0].requires_grad_(True)
    next(nets[1].parameters()).requires_grad_(False)
    wanted = [gradient_of(net, F.cross_entropy(net(images[:1]), labels[1:2])) for net in nets]
    alignment = Alignment(nets, wanted, micro_batch=micro_batch, held=held)
    several = torch.stack([images, images.flip(3), 1 - images])

    def shifted(part: Tensor, start: int) -> Tensor:
        return part.roll(1, 3) * 0.9

    views = (unchanged, shifted, unchanged)
    losses, slopes = alignment.differentiate_together(several, labels, views)
    for loss, slope, alone, view in zip(losses, slopes, several, views, strict=True):
        expected, by_itself = alignment.differentiate(alone, labels, view)
        assert loss == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(slope, by_itself, rtol=1e-10, atol=1e-14)


def test_the_slope_is_that_of_finite_differences() -> None:
    nets, wanted, images, labels = problem()
    alignment = Alignment(nets, wanted, micro_batch=4)
    _, slope = alignment.differentiate(images, labels)
    for place in ((0, 0, 0, 0), (3, 1, 2, 1), (6, 0, 3, 3)):
        step = torch.zeros_like(images)
        step[place] = 1e-6
        rise = alignment.loss(images + step, labels) - alignment.loss(images - step, labels)
        assert rise / 2e-6 == pytest.approx(float(slope[place]), rel=1e-5, abs=1e-9)


def test_the_slope_goes_through_the_view() -> None:
    nets, wanted, images, labels = problem(1)

    def view(part: Tensor, start: int) -> Tensor:
        return part.flip(3) * 0.5

    _, found = Alignment(nets, wanted, micro_batch=3).differentiate(images, labels, view)
    leaf = images.clone().requires_grad_()
    expected = torch.autograd.grad(by_the_book(nets, wanted, leaf.flip(3) * 0.5, labels), leaf)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_parameters_that_are_not_trained_are_not_matched() -> None:
    net = smooth_net(0)
    whole = len(gradient_of(net, net(torch.rand(1, 2, 4, 4).double()).sum()))
    net[0].requires_grad_(False)
    assert len(gradient_of(net, net(torch.rand(1, 2, 4, 4).double()).sum())) == whole - 2
    net.requires_grad_(False)
    with pytest.raises(InputError, match="none of its parameters requires a gradient"):
        gradient_of(net, torch.zeros(()))


def test_a_shift_of_nothing_is_nothing_and_a_flip_mirrors() -> None:
    images = torch.rand(40, 1, 5, 6)
    same = translated(images, 0, False, torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, images)
    mirrored = translated(images, 0, True, torch.Generator().manual_seed(0))
    straight = (mirrored - images).abs().flatten(1).amax(1) < 1e-5
    turned = (mirrored - images.flip(3)).abs().flatten(1).amax(1) < 1e-5
    assert bool((straight ^ turned).all())
    assert 0 < int(turned.sum()) < 40


def test_a_descent_goes_against_the_sign_and_stays_within_its_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    bases = torch.randint(0, 256, (6, 2, 3, 3), generator=generator, dtype=torch.uint8)
    bases[0] = 0
    start = torch.randn(2, 6, 2, 3, 3, generator=generator)
    begun = ((start * 5).clamp(-5, 5) + bases).clamp(0, 255) / 255
    descent = SignedDescent(bases, start, spread=(0.5, 0.25), eps=5, rate=0.001, steps=8)
    torch.testing.assert_close(descent.images, begun)
    slope = torch.randn(descent.images.shape, generator=generator)
    expected = (begun - slope.sign() * 0.001 * torch.tensor([0.5, 0.25]).view(2, 1, 1)).clamp(0, 1)
    expected = torch.minimum(torch.maximum(expected, (bases - 5.0) / 255), (bases + 5.0) / 255)
    descent.move(slope.clone())
    torch.testing.assert_close(descent.images, expected, atol=1e-6, rtol=0)
    for _ in range(7):
        before = descent.images
        descent.move(slope.clone())
    # The last step is a thousandth of the first.
    assert float((descent.images - before).abs().max()) < 1e-6
    rounded = descent.rounded()
    assert rounded.dtype == torch.uint8
    assert int((rounded.int() - bases.int()).abs().max()) == 5
    torch.testing.assert_close(rounded.float() / 255, descent.images, atol=0.51 / 255, rtol=0)


def test_the_slope_is_right_where_poisons_are_learned_well() -> None:
    """In float32, as the slope of the matching loss in float64, whose gradients do not cancel."""
    slopes = []
    for dtype in (torch.float64, torch.float32):
        nets, wanted, images, labels = problem(1)
        logits = nets[0](images)
        # Every label gets a logit that is 28 above the others: a probability of 1 - 1e-12.
        sure = nn.Linear(2 * 16, 3).double()
        features = images.flatten(1)
        aims = 28 * F.one_hot(labels, 3).double() + 0.1 * logits.detach()
        with torch.no_grad():
            sure.weight.copy_(torch.linalg.lstsq(features, aims).solution.T)
            sure.bias.zero_()
        net = nn.Sequential(nn.Flatten(), sure).to(dtype).eval()
        target = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(4)).to(dtype)
        wanted = [gradient_of(net, -net(target)[0, 1])]
        slopes.append(Alignment([net], wanted, micro_batch=3).differentiate(images.to(dtype), labels)[1])
    exact, found = (slope.double().flatten() for slope in slopes)
    assert float(exact @ found / (exact.norm() * found.norm())) > 0.999


@pytest.fixture(scope="module")
def case() -> tuple[TrainingSet, nn.Module, TargetedMisclassification]:
    """Noisy stripes in three places, a net that knows them, and one image that it is to take for another."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(180) % 3
    images = torch.randint(0, 190, (180, 1, 12, 12), generator=generator, dtype=torch.uint8)
    for label in range(3):
        images[labels == label, :, :, 4 * label : 4 * label + 4] += 30
    training_set = TrainingSet(images, labels, ("left", "middle", "right"), "stripes")
    surrogate = train(training_set, RECIPE, seed=0).model
    one = torch.randint(0, 190, (1, 1, 12, 12), generator=generator, dtype=torch.uint8)
    one[..., 0:4] += 30
    return training_set, surrogate, TargetedMisclassification(one, 0, 2)


def craft(
    case: tuple[TrainingSet, nn.Module, TargetedMisclassification], attack: GradientMatching, seed: int = 0
) -> PoisonSet:
    training_set, surrogate, goal = case
    return attack.craft(goal, training_set, budget=Budget(count=20), surrogate=surrogate, seed=seed)


def test_poisons_are_what_they_promise(
    case: tuple[TrainingSet, nn.Module, TargetedMisclassification], tmp_path: Path
) -> None:
    training_set, surrogate, _ = case
    before = {name: value.clone() for name, value in surrogate.state_dict().items()}
    poison = craft(case, QUICK)
    assert len(poison) == 20
    assert bool((poison.given_labels == 2).all())
    assert torch.equal(poison.clean_labels, poison.given_labels)
    assert 0 < float(poison.linf.max()) <= 32
    assert torch.equal(craft(case, QUICK).images, poison.images)
    assert not torch.equal(craft(case, QUICK, seed=1).images, poison.images)
    assert all(torch.equal(value, before[name]) for name, value in surrogate.state_dict().items())
    assert all(parameter.grad is None for parameter in surrogate.parameters())
    poison.save(tmp_path / "poison")
    stored = PoisonSet.load(tmp_path / "poison").apply(training_set)
    assert stored.fingerprint == poison.apply(training_set).fingerprint


def test_the_best_restart_is_kept_and_the_loss_falls(
    case: tuple[TrainingSet, nn.Module, TargetedMisclassification],
) -> None:
    history = craft(case, replace(QUICK, restarts=3)).configuration["history"]
    assert len(history) == 3
    for one in history:
        assert len(one["losses"]) == 12
        assert one["final"] < one["losses"][0] - 0.05


@pytest.mark.parametrize("together", [2, 3])
def test_restarts_crafted_together_are_those_crafted_one_by_one(
    together: int, case: tuple[TrainingSet, nn.Module, TargetedMisclassification]
) -> None:
    alone = craft(case, replace(QUICK, restarts=3, steps=4))
    joint = craft(case, replace(QUICK, restarts=3, steps=4, together=together))
    pairs = zip(alone.configuration["history"], joint.configuration["history"], strict=True)
    for one, other in pairs:
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-3)
        assert other["final"] == pytest.approx(one["final"], abs=1e-3)
    # A step takes the sign of a slope, which rounding turns where the slope is next to nothing.
    assert (alone.images == joint.images).float().mean() > 0.95


def test_a_victim_learns_what_the_adversary_wants_of_fresh_and_stored_poison(
    case: tuple[TrainingSet, nn.Module, TargetedMisclassification], tmp_path: Path
) -> None:
    training_set, surrogate, goal = case
    poison = craft(case, replace(QUICK, steps=30))
    poison.save(tmp_path / "poison")

    def margin(examples: TrainingSet) -> float:
        victim = train(examples, replace(RECIPE, epochs=3), seed=5, start=surrogate).model
        logits = predict(victim, goal.images)[0]
        return float(logits[goal.target] - logits[goal.true_label])

    fresh, stored = (
        margin(poison.apply(training_set)),
        margin(PoisonSet.load(tmp_path / "poison").apply(training_set)),
    )
    assert fresh == stored
    assert fresh > margin(training_set) + 0.5


def test_jpeg_is_seen_and_has_the_gradient_of_the_identity() -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quality = int(torch.randint(50, 96, (1,), generator=generator(5)))
    seen = through_jpeg(images, generator(5))
    pixels = images.detach().mul(255).round().to(torch.uint8)
    assert torch.equal(seen.detach().mul(255).round().to(torch.uint8), recompressed(pixels, quality=quality))
    assert bool((seen.detach() - images.detach()).abs().max() > 0.01)
    slope = torch.autograd.grad((seen * torch.arange(16.0)).sum(), images)[0]
    assert torch.equal(slope, torch.arange(16.0).expand_as(images))


@pytest.mark.parametrize("augmentation", ["translate", "crop", "jpeg"])
def test_augmented_crafting_runs_in_pieces(
    augmentation: str, case: tuple[TrainingSet, nn.Module, TargetedMisclassification]
) -> None:
    attack = replace(QUICK, augmentation=augmentation, shift=1, steps=3, restarts=1)
    whole, pieces = craft(case, attack), craft(case, replace(attack, micro_batch=20))
    assert torch.equal(whole.images, pieces.images)
    craft(case, replace(attack, micro_batch=7, held=0))


def test_poisons_come_from_where_they_were_asked(
    case: tuple[TrainingSet, nn.Module, TargetedMisclassification],
) -> None:
    short = replace(QUICK, steps=1, restarts=1)
    third = craft(case, replace(short, poisons_from="third-party"))
    assert bool((third.given_labels == 1).all())
    anywhere = craft(case, replace(short, poisons_from="anywhere"))
    assert len(anywhere.given_labels.unique()) > 1
    bases = tuple(range(30, 60))
    assert set(craft(case, replace(short, bases=bases)).indices.tolist()) == set(range(30, 50))


def test_what_it_cannot_do_is_said(case: tuple[TrainingSet, nn.Module, TargetedMisclassification]) -> None:
    training_set, surrogate, goal = case
    budget = Budget(count=5)
    with pytest.raises(InputError, match="needs a surrogate"):
        QUICK.craft(goal, training_set, budget=budget, seed=0)
    with pytest.raises(InputError, match="serves the goal 'targeted-misclassification' only"):
        QUICK.craft(
            Backdoor(PatchTrigger.white_corner(), 0, 1),
            training_set,
            budget=budget,
            surrogate=surrogate,
            seed=0,
        )
    with pytest.raises(InputError, match=r"more than the 60 examples of class 2 \(right\)"):
        QUICK.craft(goal, training_set, budget=Budget(count=61), surrogate=surrogate, seed=0)
    with pytest.raises(InputError, match="base 999 is outside"):
        craft(case, replace(QUICK, bases=(5, 999)))
    with pytest.raises(InputError, match="names class 7"):
        QUICK.craft(replace(goal, target=7), training_set, budget=budget, surrogate=surrogate, seed=0)
    for wrong in (
        {"eps": 0},
        {"steps": 0},
        {"step_size": 0.0},
        {"augmentation": "blur"},
        {"micro_batch": 0},
        {"together": 0},
    ):
        with pytest.raises(InputError, match=f"gradient-matching: {next(iter(wrong))}"):
            GradientMatching(**wrong)  # type: ignore[arg-type]
