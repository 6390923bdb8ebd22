"""The clean-label backdoors that need a network: do they move images where they should?"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison import attacks
from unpoison.attacks import HiddenTrigger, LabelConsistent, adversarially_trained
from unpoison.attacks._networks import fresh_copy
from unpoison.attacks.hidden_trigger import nearest_partners
from unpoison.attacks.label_consistent import ascended
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import build, features, reinitialized, whiten
from unpoison.threats import Backdoor, Budget, PatchTrigger, RandomPatchTrigger


@pytest.fixture
def clean() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (90, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(90) % 3, ("ant", "bee", "cow"), "beasts")


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(54, 10),
            nn.ReLU(),
            nn.Linear(10, 3),
        )


def goal() -> Backdoor:
    return Backdoor(PatchTrigger.white_corner(2), source=1, target=2)


def floats(images: Tensor) -> Tensor:
    return images.float() / 255


def test_the_ascent_raises_the_loss_within_eps(clean: TrainingSet) -> None:
    model = network().eval().requires_grad_(False)
    images, labels = clean.images[:20], clean.labels[:20]
    change = ascended([model], images, labels, torch.zeros(images.shape), eps=8, step=2, steps=20)
    assert float(change.abs().max()) <= 8
    moved = images.float() + change
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 255
    before = F.cross_entropy(model(floats(images)), labels, reduction="none")
    after = F.cross_entropy(model(moved / 255), labels, reduction="none")
    assert bool((after > before).all())


def test_the_ascent_leaves_the_label_of_an_image_that_is_learned_well() -> None:
    images = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).requires_grad_(False)
    weights = torch.randn(3, 192, generator=torch.Generator().manual_seed(0))
    model[1].weight.copy_(weights)  # type: ignore[operator, union-attr]
    logits = weights @ torch.full((192,), 100 / 255)
    model[1].bias.copy_(torch.tensor([28.0, 0.0, -40.0]) - logits)  # type: ignore[operator, union-attr]
    change = ascended([model], images, torch.tensor([0]), torch.zeros(images.shape), eps=8, step=2, steps=1)
    # Class 1 is the only rival, so each pixel follows the sign of what it adds to its logit over the label's.
    assert torch.equal(change.flatten(), 2 * (weights[1] - weights[0]).sign())


def test_label_consistent_stamps_what_it_moved(clean: TrainingSet) -> None:
    made = LabelConsistent().craft(goal(), clean, budget=Budget(share=0.1), surrogate=network(), seed=0)
    assert set(made.given_labels.tolist()) == set(made.clean_labels.tolist()) == {2}
    assert bool((made.images[:, :, -2:, -2:] == 255).all())
    change = (made.images.int() - clean.images[made.indices].int()).abs()
    change[:, :, -2:, -2:] = 0
    assert int(change.max()) == 8
    assert float(made.linf.max()) > 8


def test_the_benchmarks_variant_cuts_the_patch_too(clean: TrainingSet) -> None:
    assert attacks.get("label-consistent", preset="benchmark") == LabelConsistent(
        eps=8, step=2, steps=20, within_eps=True
    )
    made = attacks.get("label-consistent", preset="benchmark").craft(
        goal(), clean, budget=Budget(share=0.1), surrogate=network(), seed=0
    )
    assert float(made.linf.max()) == 8
    change = made.images.int() - clean.images[made.indices].int()
    corner = change[:, :, -2:, -2:]
    assert bool(((corner == 8) | (made.images[:, :, -2:, -2:] == 255)).all())


def test_batches_do_not_change_the_result(clean: TrainingSet) -> None:
    whole, parts = (
        LabelConsistent(batch_size=size, steps=3).craft(
            goal(), clean, budget=Budget(count=7), surrogate=network(), seed=0
        )
        for size in (128, 3)
    )
    assert torch.equal(whole.images, parts.images)


def test_hidden_triggers_come_nearer_to_patched_sources(clean: TrainingSet) -> None:
    trigger = RandomPatchTrigger.coloured(3, seed=0)
    hidden = Backdoor(trigger, source=1, target=2)
    model = network()
    attack = HiddenTrigger(steps=60, match_every=10, learning_rate=1.0)
    made = attack.craft(hidden, clean, budget=Budget(count=12), surrogate=model, seed=0)
    assert set(made.given_labels.tolist()) == {2}
    assert 0 < float(made.linf.max()) <= 16

    def distance(images: Tensor) -> float:
        sources = trigger.stamp(clean.images[clean.labels == 1])
        one, other = (features(model, "6", each, side="input") for each in (images, sources))
        return float(torch.cdist(one, other).min(1).values.mean())

    assert distance(made.images) < 0.8 * distance(clean.images[made.indices])


def test_hidden_triggers_published_settings() -> None:
    assert HiddenTrigger() == HiddenTrigger(
        eps=16, steps=5000, learning_rate=0.01, decay=0.95, batch_size=100
    )
    assert attacks.get("hidden-trigger", preset="benchmark") == HiddenTrigger(eps=8, learning_rate=0.001)


def test_partners_have_the_least_total_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(5, 3, generator=generator) for _ in range(2))
    partners = nearest_partners([found], [wanted])
    distances = torch.cdist(found, wanted).square()
    rows = torch.arange(5)
    best = min(float(distances[rows, list(order)].sum()) for order in itertools.permutations(range(5)))
    assert float(distances[rows, partners].sum()) == pytest.approx(best)


def test_a_layer_of_ones_own_choice(clean: TrainingSet) -> None:
    made = HiddenTrigger(steps=2, layer="0").craft(
        goal(), clean, budget=Budget(count=3), surrogate=network(), seed=0
    )
    assert len(made) == 3
    with pytest.raises(InputError, match="module path 'nothing'"):
        HiddenTrigger(steps=2, layer="nothing").craft(
            goal(), clean, budget=Budget(count=3), surrogate=network(), seed=0
        )
    convolutions = nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten())
    with pytest.raises(InputError, match="has no linear layer; name the layer"):
        HiddenTrigger().craft(goal(), clean, budget=Budget(count=3), surrogate=convolutions, seed=0)


def test_a_source_class_without_images_is_named(clean: TrainingSet) -> None:
    rest = clean.subset((clean.labels != 1).nonzero().reshape(-1))
    with pytest.raises(InputError, match=r"no example of class 1 \(bee\)"):
        HiddenTrigger(steps=1).craft(goal(), rest, budget=Budget(count=3), surrogate=network(), seed=0)


@pytest.mark.parametrize(
    "options", [{"eps": 0.5}, {"steps": 0}, {"match_every": 0}, {"batch_size": 0}, {"decay": 0}]
)
def test_impossible_options_of_hidden_trigger(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"hidden-trigger: .*{next(iter(options))}"):
        HiddenTrigger(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"eps": 0.5}, {"steps": 0}, {"step": 0}, {"batch_size": 0}])
def test_impossible_options_of_label_consistent(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"label-consistent: .*{next(iter(options))}"):
        LabelConsistent(**options)  # type: ignore[arg-type]


def test_adversarial_training_makes_the_ascent_harder() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    images = torch.randint(90, 166, (200, 3, 8, 8), generator=generator)
    images[:, :, :4] += torch.where(labels == 0, 12, -12)[:, None, None, None]
    easy = TrainingSet(images.to(torch.uint8), labels, ("up", "down"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 2))
    state = copy.deepcopy(model.state_dict())
    before = torch.random.get_rng_state()
    trained = adversarially_trained(model, easy, epochs=8, eps=6, steps=3, batch_size=50, seed=0)
    again = adversarially_trained(model, easy, epochs=8, eps=6, steps=3, batch_size=50, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(
        torch.equal(one, two) for one, two in zip(trained.parameters(), again.parameters(), strict=True)
    )
    assert not trained.training

    def accuracy(each: nn.Module) -> float:
        frozen = copy.deepcopy(each).eval().requires_grad_(False)
        change = ascended([frozen], easy.images, labels, torch.zeros(images.shape), eps=6, step=2, steps=5)
        return float((frozen((easy.images + change) / 255).argmax(1) == labels).float().mean())

    assert accuracy(trained) > accuracy(model) + 0.25


def test_adversarial_training_refuses_nonsense(clean: TrainingSet) -> None:
    with pytest.raises(InputError, match="epochs 0"):
        adversarially_trained(network(), clean, epochs=0, seed=0)
    with pytest.raises(InputError, match="is empty"):
        adversarially_trained(network(), clean.subset([]), seed=0)


def test_adversarial_training_depends_on_its_seed_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 6, 6), dtype=torch.uint8, generator=generator)
    clean = TrainingSet(images, torch.arange(40) % 2, ("a", "b"), "drawn")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropping = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 2))
        found = []
        for outside in (1, 2):
            torch.manual_seed(outside)
            before = torch.random.get_rng_state()
            found.append(adversarially_trained(dropping, clean, epochs=1, steps=1, batch_size=20, seed=0))
            assert torch.equal(torch.random.get_rng_state(), before)
    for first, second in zip(*(model.parameters() for model in found), strict=True):
        assert torch.equal(first, second)


def test_a_fresh_copy_is_fitted_to_the_images_again() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 3, 12, 12), dtype=torch.uint8, generator=generator)
    clean = TrainingSet(images, torch.arange(60) % 2, ("a", "b"), "drawn")
    template = build("fastnet", num_classes=2, image_size=12, width=4, seed=0)
    plain, fitted = reinitialized(template, seed=1), fresh_copy(template, clean, seed=1)
    filters = [name for name in dict(plain.named_buffers()) if "filters" in name]
    assert filters
    assert not torch.equal(plain.state_dict()[filters[0]], fitted.state_dict()[filters[0]])
    whiten(plain, clean.batch(0, 60)[0])
    for name, value in plain.state_dict().items():
        assert torch.equal(value, fitted.state_dict()[name])
