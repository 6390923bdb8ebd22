"""What the page shows of answers and decisions, against loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from unpoison.data import TrainingSet
from unpoison.detectors import Findings, principal_plane
from unpoison.errors import InputError
from unpoison.report import Answers, Decisions, decided_findings, difference_image, nearest_example


def make_set(n: int = 40, seed: int = 0) -> TrainingSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return TrainingSet(images, torch.arange(n) % 3, ("a", "b", "c"), "tiny")


def test_the_answers_are_those_of_a_loop() -> None:
    examples = make_set()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4)).eval()  # one answer is no class
    answers = Answers.of(model, examples)
    logits = model(examples.images.float() / 255).detach()
    confusion = np.zeros((3, 3), int)
    for row in range(40):
        label, answer = int(examples.labels[row]), int(logits[row].argmax())
        assert (answers.labels[row], answers.answers[row]) == (label, answer)
        assert answers.confidence[row] == pytest.approx(float(logits[row].softmax(0).max()))
        if answer < 3:
            confusion[label, answer] += 1
    np.testing.assert_array_equal(answers.confusion, confusion)
    assert answers.accuracy.successes == confusion.trace()
    assert [rate.successes for rate in answers.by_class] == confusion.diagonal().tolist()
    assert [rate.trials for rate in answers.by_class] == [14, 13, 13]
    wrong = answers.wrong()
    assert sorted(wrong.tolist()) == [row for row in range(40) if answers.labels[row] != answers.answers[row]]
    assert (np.diff(answers.confidence[wrong]) <= 0).all()
    counts = [count for *_, count in answers.confused(99)]
    assert sum(counts) == confusion.sum() - confusion.trace()
    assert counts == sorted(counts, reverse=True)


def test_the_nearest_example_is_that_of_a_loop() -> None:
    examples = make_set()
    excluded = np.zeros(40, bool)
    excluded[::3] = True
    for index in range(40):
        distances = {
            other: float((examples.images[other].float() - examples.images[index].float()).square().sum())
            for other in range(40)
            if other != index and not excluded[other]
        }
        assert nearest_example(examples.images, index, excluded) == min(distances, key=distances.__getitem__)
    assert nearest_example(examples.images, 0, np.ones(40, bool)) is None


def test_a_difference_is_grey_where_there_is_none() -> None:
    one = make_set().images[0]
    assert (difference_image(one, one) == 128).all()
    assert difference_image(one, one[:, :2]) is None


def test_what_is_decided_can_be_saved_and_healed_by(tmp_path: Path) -> None:
    examples = make_set()
    decisions = Decisions(tmp_path / "log.jsonl", examples.fingerprint, len(examples))
    with pytest.raises(InputError, match="decide about some"):
        decided_findings(decisions, examples)
    decisions.decide([3, 9, 5], "blame")
    decisions.decide([5], "clear")
    alone = decided_findings(decisions, examples)
    assert alone.flagged.tolist() == [3, 9]
    base_scores = torch.arange(40).double()
    base = Findings(
        **{
            **{
                name: getattr(alone, name)
                for name in ("configuration", "fingerprint", "labels", "class_names")
            },
            "method": "some",
            "scores": base_scores,
            "flagged": torch.tensor([39]),
            "threshold": alone.threshold,
            "poison_found": True,
            "p_value": 0.01,
            "summary": "",
            "evidence": {"influence": base_scores},
        }
    )
    decided = decided_findings(decisions, examples, base)
    assert decided.flagged.tolist() == [9, 3]
    assert decided.p_value is None
    decided.save(tmp_path / "findings")
    again = Findings.load(tmp_path / "findings")
    assert again.flagged.tolist() == [9, 3]
    assert again.threshold == decided.threshold
    assert "influence" in again.evidence


def test_the_plane_has_the_two_largest_variances() -> None:
    examples = make_set(60)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
    plane = principal_plane(model, examples).double()
    features = examples.images.flatten(1).double() / 255
    values = torch.linalg.svdvals(features - features.mean(0))[:2]
    assert torch.allclose(plane.norm(dim=0), values, rtol=1e-4)
    assert torch.allclose(plane.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-5)
