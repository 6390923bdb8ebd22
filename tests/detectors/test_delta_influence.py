"""Delta-Influence: every stage compared with a slow computation, on a small poisoned set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unpoison import detectors
from unpoison._seeds import generator
from unpoison.detectors import DeltaInfluence, EKFACThreshold, Observation
from unpoison.detectors._queries import Drawing, Queries, other_labels
from unpoison.errors import InputError
from unpoison.influence import AbsoluteDamping, RelativeDamping, precondition, score
from unpoison.tasks import ClassificationTask

SEED = 3


def make(**settings: Any) -> DeltaInfluence:
    return DeltaInfluence(**{"draws": 8, "space": "pixels", "damping": RelativeDamping(0.1), **settings})


def queries_of(detector: DeltaInfluence, scene: Any, observation: Observation) -> Queries:
    """The queries of the detector before they are rounded to pictures."""
    drawing = Drawing(detector.draws, detector.labels, detector.space, detector.changes)
    randomness = generator(SEED, "draws", "suspect")
    return drawing.queries(observation.images, observation.answer, scene.poisoned, randomness)


def one_by_one(detector: DeltaInfluence, scene: Any, observation: Observation) -> tuple[Tensor, Tensor]:
    """Float[m, n] of the observation's images and Float[m, draws, n], each input scored by itself."""
    queries, task, rows = queries_of(detector, scene, observation), ClassificationTask(), []
    for image, label in zip(queries.inputs, queries.labels, strict=True):
        query = precondition(
            scene.model, scene.factors, (image[None], label[None]), task, damping=detector.damping
        )
        rows.append(score(scene.model, query, scene.poisoned, task).values[0])
    values, count = torch.stack(rows), len(observation)
    return values[:count], values[count:].view(count, detector.draws, -1)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("which", ["observation", "observations"])
def test_collapses_are_differences_of_separate_scores(scene: Any, which: str) -> None:
    observation = getattr(scene, which)
    detector = make(tolerance=1)
    before, after = one_by_one(detector, scene, observation)
    found = detector.find(scene.model, scene.poisoned, observation, factors=scene.factors, seed=SEED)
    assert close(found.evidence["influence_before"], before.mean(0))
    differences = (after - before[:, None]).flatten(0, 1)
    change = found.evidence["influence_after"] - found.evidence["influence_before"]
    assert close(change, differences.mean(0))
    sure = (differences.abs() > 1e-4 * differences.abs().max()).all(0)
    assert int(sure.sum()) > 150
    assert torch.equal(found.evidence["collapses"][sure], (differences < 0).sum(0).float()[sure])


@pytest.mark.parametrize(("threshold", "tolerance"), [(0.0, 0), (0.0, 2), (0.0, 7), (-0.5, 1), (-5.0, 3)])
def test_votes_by_brute_force(scene: Any, threshold: float, tolerance: int) -> None:
    detector = make(threshold=threshold, tolerance=tolerance)
    before, after = one_by_one(detector, scene, scene.observation)
    differences = after[0] - before
    found = detector.find(scene.model, scene.poisoned, scene.observation, factors=scene.factors, seed=SEED)
    sure = ((differences - threshold).abs() > 1e-4 * differences.abs().max()).all(0)
    expected = [
        index
        for index in range(len(scene.poisoned))
        if sum(float(value) < threshold for value in differences[:, index]) >= 8 - tolerance
    ]
    mask = torch.zeros(len(scene.poisoned), dtype=torch.bool)
    mask[expected] = True
    assert torch.equal(found.mask()[sure], mask[sure])
    assert torch.equal(found.mask(), found.scores > found.threshold.value)
    assert found.poison_found == bool(len(found.flagged))
    assert found.threshold.value == 8 - tolerance - 0.5
    assert "than -0 " not in found.threshold.how
    order = found.scores[found.flagged]
    assert bool((order.diff() <= 0).all())
    # Votes first, mean collapse second.
    assert torch.equal(found.scores.round(), found.evidence["collapses"].double())


def test_drawn_labels_are_never_the_predicted_one() -> None:
    randomness = torch.Generator().manual_seed(0)
    for classes in (2, 3, 10):
        for label in range(classes):
            for how in ("uniform", "distinct"):
                drawn = other_labels(how, label, classes, 200, randomness)  # type: ignore[arg-type]
                assert drawn.tolist().count(label) == 0
                assert set(drawn.tolist()) == set(range(classes)) - {label}
                assert len(drawn) == 200


def test_distinct_labels_repeat_only_when_none_is_left() -> None:
    for seed in range(5):
        randomness = torch.Generator().manual_seed(seed)
        drawn = other_labels("distinct", 4, 10, 21, randomness).tolist()
        assert sorted(drawn[:9]) == sorted(drawn[9:18]) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        assert len(set(drawn[18:])) == 3
    uniform = other_labels("uniform", 4, 10, 9, torch.Generator().manual_seed(0)).tolist()
    assert len(set(uniform)) < 9


def test_normalized_space_differs_only_by_mean_and_deviation(scene: Any) -> None:
    mean, std = (torch.tensor(part)[:, None, None] for part in scene.poisoned.channel_statistics)
    pixels, scores = (
        queries_of(make(draws=40, space=space), scene, scene.observation)
        for space in ("pixels", "normalized")
    )
    assert pixels.draws == scores.draws
    assert torch.equal(pixels.labels, scores.labels)
    original, seen = pixels.inputs[0], set()
    for draw, one, other in zip(pixels.draws, pixels.inputs[1:], scores.inputs[1:], strict=True):
        seen.add(draw.name)
        if draw.name in ("flip", "blur", "colour switch"):  # linear, and they keep a constant
            assert torch.allclose(one, other, atol=1e-5)
        if draw.name == "invert":
            assert torch.allclose(one, 1 - original)
            assert torch.allclose(other, (1 - (original - mean) / std) * std + mean, atol=1e-6)
            assert not torch.allclose(one, other)
        if draw.name == "colour jitter":
            assert float(other.min()) >= float(mean.min()) - 1e-5
    assert len(seen) == 7


@pytest.mark.parametrize("space", ["pixels", "normalized"])
def test_a_draw_can_change_the_image_or_the_label_alone(scene: Any, space: Any) -> None:
    image = queries_of(make(draws=40, changes="image", space=space), scene, scene.observation)
    assert image.labels.tolist() == [scene.observation.predicted] * 41
    changed = [bool((one != image.inputs[0]).any()) for one in image.inputs[1:]]
    assert sum(changed) >= 38  # an affine transform of so few pixels may be the identity
    # The exchange of red and green does nothing on grey images, so it is not drawn.
    assert "colour switch" not in {draw.name for draw in image.draws}
    label = queries_of(make(draws=40, changes="label", space=space), scene, scene.observation)
    assert all(torch.equal(changed, label.inputs[0]) for changed in label.inputs[1:])
    assert scene.observation.predicted not in label.labels[1:].tolist()


def test_the_seed_decides_the_draws(scene: Any) -> None:
    first, second, other = (
        make().find(scene.model, scene.poisoned, scene.observation, factors=scene.factors, seed=seed)
        for seed in (3, 3, 4)
    )
    assert first.draws == second.draws
    assert torch.equal(first.draw_images, second.draw_images)
    assert torch.equal(first.scores, second.scores)
    assert first.configuration["seed"] == 3
    assert other.draws != first.draws
    assert not torch.equal(other.scores, first.scores)


def test_the_batch_size_does_not_matter(scene: Any) -> None:
    one, other = (
        make(batch_size=size).find(scene.model, scene.poisoned, scene.observation) for size in (64, 600)
    )
    assert close(one.evidence["influence_after"], other.evidence["influence_after"])
    assert len(set(one.flagged.tolist()) ^ set(other.flagged.tolist())) <= 2


def test_presets_are_the_published_numbers() -> None:
    numbers = {"published": (0.0, 2), "published-smooth": (-40.0, 0), "published-matching": (0.0, 1)}
    assert detectors.describe("delta-influence").presets == tuple(numbers)
    for name, (threshold, tolerance) in numbers.items():
        preset = detectors.get("delta-influence", preset=name)
        assert isinstance(preset, DeltaInfluence)
        assert (preset.threshold, preset.tolerance) == (threshold, tolerance)
        assert preset.damping == AbsoluteDamping(1e-8)
        assert (preset.draws, preset.space, preset.changes) == (50, "normalized", "both")
        assert preset.labels == ("distinct" if name == "published-smooth" else "uniform")
    baseline = detectors.get("ek-fac", preset="published")
    assert isinstance(baseline, EKFACThreshold)
    assert (baseline.threshold, baseline.damping) == (10.0, AbsoluteDamping(1e-8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 0}, "draws must be a whole number of at least 1, found 0"),
        ({"tolerance": -1}, "tolerance must be a whole number of at least 0, found -1"),
        ({"tolerance": 8}, "tolerance must be below the 8 draws, found 8"),
        ({"labels": "even"}, "labels must be one of 'uniform', 'distinct', found 'even'"),
        ({"space": "frequencies"}, "space must be one of"),
        ({"changes": "nothing"}, "changes must be one of"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**settings)
