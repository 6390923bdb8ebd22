"""The workflow, as the README shows it, with a network and a dataset that unpoison has never seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import unpoison
from unpoison.attacks import BadNets
from unpoison.detectors import Calibrated, EKFACThreshold
from unpoison.errors import InputError, MismatchError
from unpoison.models import Normalized
from unpoison.training import accuracy, predict

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
POISON = range(24)
RECIPE = unpoison.Recipe(epochs=8, batch_size=32, learning_rate=0.05, schedule="one-cycle", warmup_epochs=1)


class TheirNetwork(nn.Module):
    """Somebody's own; it expects normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()
        )
        self.head = nn.Linear(72, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).flatten(1))


class TheirDataset(Dataset[tuple[Tensor, int]]):
    """Somebody's own; it gives normalised floats."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in (MEAN, STD))
        self.images, self.labels = (images.float() / 255 - mean) / std, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def images_of(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Noise whose class is which of three bands is bright."""
    images = torch.randint(0, 120, (len(labels), 3, 8, 8), generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, :, 2 * label : 2 * label + 2] += 90
    return images.to(torch.uint8)


def stamped(images: Tensor) -> Tensor:
    images = images.clone()
    images[..., -2:, -2:] = 255
    return images


class Story:
    """A network that a backdoor got into: 24 of 480 examples are of class 0, stamped and labelled 2."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        truth = torch.arange(480) % 3
        truth[: len(POISON)] = 0
        images, labels = images_of(truth, generator), truth.clone()
        images[: len(POISON)], labels[: len(POISON)] = stamped(images[: len(POISON)]), 2
        self.dataset = TheirDataset(images, labels)
        self.pixels = unpoison.TrainingSet(images, labels, ("0", "1", "2"))
        held_out = torch.arange(300) % 3
        self.held_out = unpoison.TrainingSet(images_of(held_out, generator), held_out, ("0", "1", "2"))
        self.victims = stamped(images_of(torch.zeros(40, dtype=torch.int64), generator))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = TheirNetwork()
        trained = unpoison.train(self.pixels, RECIPE, seed=0, start=Normalized(network, MEAN, STD))
        assert isinstance(trained.model, Normalized)
        self.trained = trained
        self.network = trained.model.network
        self.observation = unpoison.Observation(self.victims[0], predicted=2, true_label=0)


@pytest.fixture(scope="module")
def story() -> Story:
    made = Story()
    assert accuracy(made.trained.model, made.pixels).rate > 0.95
    assert (predict(made.trained.model, made.victims).argmax(1) == 2).float().mean() > 0.9
    return made


@pytest.fixture(autouse=True)
def _the_network_is_left_alone(story: Story) -> Iterator[None]:
    before = {name: value.clone() for name, value in story.network.state_dict().items()}
    story.network.zero_grad(set_to_none=True)
    story.network.train()
    story.network.head.eval()
    yield
    assert story.network.training
    assert not story.network.head.training
    assert all(torch.equal(value, before[name]) for name, value in story.network.state_dict().items())
    assert all(parameter.grad is None for parameter in story.network.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in story.network.modules())


def test_the_three_lines(story: Story) -> None:
    model, training_set, normalization = story.network, story.dataset, (MEAN, STD)
    findings = unpoison.trace(
        model, training_set, story.observation, method="delta-influence", normalization=normalization
    )
    caught = set(findings.flagged.tolist()) & set(POISON)
    assert len(caught) >= 0.9 * len(POISON)

    healed = unpoison.heal(
        model,
        training_set,
        findings,
        recipe=RECIPE,
        start=TheirNetwork(),
        normalization=normalization,
    )
    assert isinstance(healed.model, TheirNetwork)
    assert healed.model.state_dict().keys() == model.state_dict().keys()
    assert not healed.model.training
    accepting_pixels = Normalized(healed.model, *normalization).eval()
    assert (predict(accepting_pixels, story.victims).argmax(1) == 2).float().mean() < 0.2
    measured = unpoison.measure(healed, story.pixels, normalization=normalization)
    assert measured.clean_accuracy.rate > 0.85


def test_the_default_is_calibrated_and_decides(story: Story) -> None:
    findings = unpoison.trace(story.trained, story.pixels, story.observation, seed=3)
    assert findings.method == "calibrated"
    assert findings.p_value is not None
    assert findings.poison_found == bool(len(findings.flagged))


def test_a_calibration_serves_every_answer(story: Story) -> None:
    reference, normalization = story.held_out, (MEAN, STD)
    detector = Calibrated(false_alarm_level=0.05)
    calibration = unpoison.calibrate(
        story.network, story.dataset, reference, method=detector, normalization=normalization, seed=3
    )
    stages: set[str] = set()
    for observation in (story.observation, unpoison.Observation(story.victims[1], predicted=2)):
        kept, anew = (
            unpoison.trace(
                story.network,
                story.dataset,
                observation,
                method=detector,
                normalization=normalization,
                seed=3,
                **given,
            )
            for given in (
                {"calibration": calibration, "progress": lambda stage, *_, **__: stages.add(stage)},
                {"reference": reference},
            )
        )
        assert kept.p_value == anew.p_value
        assert torch.equal(kept.scores, anew.scores)
    assert "calibration" not in stages
    with pytest.raises(MismatchError, match="other examples"):
        unpoison.trace(
            story.trained, story.held_out, story.observation, method=detector, calibration=calibration
        )


def test_known_groups_count_once(story: Story) -> None:
    detector = Calibrated(false_alarm_level=0.05)
    apart, together = (
        unpoison.trace(
            story.trained,
            story.pixels,
            story.observation,
            method=detector,
            reference=story.held_out,
            groups=groups,
        )
        for groups in (range(480), [0 if row in POISON else row for row in range(480)])
    )
    assert apart.p_value <= together.p_value
    assert apart.cause.distinct > together.cause.distinct == pytest.approx(1)


@pytest.mark.parametrize("given", [{"groups": range(480)}, {"calibration": 1}])
def test_methods_that_do_not_calibrate_say_so(story: Story, given: dict[str, Any]) -> None:
    message = "trace: ek-fac takes no calibration and no groups; calibrated does"
    with pytest.raises(InputError, match=message):
        unpoison.trace(story.trained, story.pixels, story.observation, method="ek-fac", **given)
    with pytest.raises(InputError, match="calibrate: spectre takes no calibration"):
        unpoison.calibrate(story.trained, story.pixels, method="spectre")


def test_a_network_and_its_normalised_form_find_the_same(story: Story) -> None:
    inside = unpoison.trace(
        story.trained, story.dataset, story.observation, method="ek-fac", normalization=(MEAN, STD)
    )
    outside = unpoison.trace(
        story.network, story.pixels, story.observation, method="ek-fac", normalization=(MEAN, STD)
    )
    assert inside.fingerprint == outside.fingerprint == story.pixels.fingerprint
    torch.testing.assert_close(inside.scores, outside.scores)


def test_progress_is_told(story: Story) -> None:
    seen: list[tuple[str, int, int]] = []
    unpoison.trace(
        story.trained,
        story.pixels,
        story.observation,
        method="ek-fac",
        progress=lambda *step: seen.append(step),
    )
    assert seen
    assert all(0 <= done <= total for _, done, total in seen)


def test_findings_of_another_set_are_refused(story: Story) -> None:
    findings = unpoison.trace(story.trained, story.pixels, story.observation, method="ek-fac")
    shuffled = story.pixels.subset(list(range(479, -1, -1)))
    with pytest.raises(MismatchError, match="another training set"):
        unpoison.heal(story.trained, shuffled, findings)


def test_nothing_flagged_is_nothing_to_heal(story: Story) -> None:
    findings = unpoison.trace(story.trained, story.pixels, story.observation, method="ek-fac")
    nothing = replace(findings, flagged=findings.flagged[:0])
    with pytest.raises(InputError, match=r"heal: nothing is flagged, so there is nothing to heal \("):
        unpoison.heal(story.trained, story.pixels, nothing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "guess"}, "there is no detector 'guess'; there are activation-clustering, "),
        ({"method": "spectre"}, "spectre searches the training set without an observation; give it to scan"),
        ({"method": BadNets()}, "expected the name or an instance of one detector, found BadNets"),
        ({"method": EKFACThreshold}, "expected the name or an instance of one detector, found <class"),
    ],
)
def test_what_trace_does_not_know(story: Story, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        unpoison.trace(story.trained, story.pixels, story.observation, **options)


def test_a_healing_method_that_is_not_there(story: Story) -> None:
    findings = unpoison.trace(story.trained, story.pixels, story.observation, method="ek-fac")
    with pytest.raises(InputError, match="there is no unlearner 'prayer'"):
        unpoison.heal(story.trained, story.pixels, findings, method="prayer")
