"""Certified training: certificates against brute force, and networks that depend on their parts alone."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unpoison
from unpoison import defenses
from unpoison.data import TrainingSet
from unpoison.defenses import DPA, FiniteAggregation
from unpoison.errors import InputError, MismatchError
from unpoison.training import Defense, Partition, Recipe, Trained, Voting, certified, certify, train

RECIPE = Recipe(model="resnet9", width=2, epochs=2, batch_size=8, learning_rate=0.05)
DISJOINT = torch.arange(4)[:, None]
OVERLAPPING = (torch.arange(4)[:, None] - torch.tensor([0, 2])) % 4


def some_set(n: int = 24, *, classes: int = 3) -> TrainingSet:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    images = torch.randint(0, 80, (n, 1, 8, 8), generator=draw)
    pixels = (images + 170 // max(classes - 1, 1) * labels[:, None, None, None]).to(torch.uint8)
    return TrainingSet(pixels, labels, tuple("abcd"[:classes]), "drawn")


def winner(votes: tuple[int, ...], classes: int) -> int:
    """The class of the most votes, the lower of equals."""
    counts = [votes.count(label) for label in range(classes)]
    return counts.index(max(counts))


@pytest.mark.parametrize("uses", [DISJOINT, OVERLAPPING], ids=["dpa", "finite aggregation"])
def test_no_changed_votes_within_the_radius_change_the_winner(uses: Tensor) -> None:
    """Every vote of four networks among three classes or none, and every change of every set of parts."""
    cast = list(itertools.product((-1, 0, 1, 2), repeat=4))[::3]
    found = certified(torch.tensor(cast), uses, classes=3)
    for votes, predicted, radius in zip(cast, found.predicted.tolist(), found.radius.tolist(), strict=True):
        assert predicted == winner(votes, 3)
        for count in range(min(radius + 1, 3) + 1):
            broken = False
            for parts in itertools.combinations(range(4), count):
                touched = [number for number in range(4) if set(uses[number].tolist()) & set(parts)]
                for others in itertools.product((-1, 0, 1, 2), repeat=len(touched)):
                    changed = list(votes)
                    for number, vote in zip(touched, others, strict=True):
                        changed[number] = vote
                    broken = broken or winner(tuple(changed), 3) != predicted
            assert not (broken and count <= radius)
            # With disjoint parts the certificate is the best there is.
            assert broken or count <= radius or uses.shape[1] > 1


def test_the_radius_of_disjoint_parts_is_half_the_lead() -> None:
    votes = torch.randint(0, 5, (60, 31), generator=torch.Generator().manual_seed(0))
    found = certified(votes, torch.arange(31)[:, None], classes=5)
    for row, predicted, radius in zip(
        votes.tolist(), found.predicted.tolist(), found.radius.tolist(), strict=True
    ):
        counts = [row.count(label) for label in range(5)]
        leads = [
            (counts[predicted] - counts[other] - (other < predicted)) // 2
            for other in range(5)
            if other != predicted
        ]
        assert radius == min(leads)


def learned(examples: TrainingSet, uses: Tensor, query: int) -> tuple[Partition, Tensor]:
    """The votes of a trivial learner: the label of the example that is nearest to a pixel value."""
    partition = Partition.by_content(examples, uses)
    votes = []
    for number in range(len(uses)):
        chosen = partition.examples_of(number).tolist()
        distances = [
            (abs(int(examples.images[one, 0, 0, 0]) - query), int(examples.labels[one])) for one in chosen
        ]
        votes.append(min(distances)[1] if distances else -1)
    return partition, torch.tensor([votes])


@pytest.mark.parametrize("uses", [DISJOINT, OVERLAPPING], ids=["dpa", "finite aggregation"])
def test_no_poison_within_the_radius_changes_a_prediction(uses: Tensor) -> None:
    """Brute force: every removal, insertion and other label of a tiny set, one and two at a time."""
    clean = [(value, int(value > 120)) for value in (*range(3, 100, 8), *range(150, 255, 8))]

    def predicted(rows: list[tuple[int, int]], query: int) -> tuple[int, int]:
        values = torch.tensor([value for value, _ in rows]).to(torch.uint8)[:, None, None, None]
        examples = TrainingSet(values, torch.tensor([label for _, label in rows]), ("a", "b"), "tiny")
        found = certified(learned(examples, uses, query)[1], uses, classes=2)
        return int(found.predicted), int(found.radius)

    changes: list[Any] = [("without", one) for one in range(len(clean))]
    changes += [("with", (value, label)) for value in range(0, 256, 15) for label in (0, 1)]
    changes += [("relabel", one) for one in range(len(clean))]
    tested = 0
    for query in (15, 90, 120, 215):
        answer, radius = predicted(clean, query)
        for count in range(1, min(radius, 2) + 1):
            for chosen in list(itertools.combinations(changes, count))[:: 1 if count == 1 else 71]:
                rows: list[tuple[int, int]] = list(clean)
                for how, what in chosen:
                    if how == "relabel":
                        rows[what] = (rows[what][0], 1 - rows[what][1])
                for how, what in chosen:
                    if how == "with":
                        rows.append(what)
                gone = {what for how, what in chosen if how == "without"}
                rows = [row for place, row in enumerate(rows) if place not in gone]
                assert predicted(rows, query)[0] == answer
                tested += 1
    assert tested > 50


@pytest.mark.parametrize(
    "defense",
    [DPA(partitions=4), FiniteAggregation(partitions=2, spread=2)],
    ids=["dpa", "finite aggregation"],
)
def test_a_network_depends_on_its_parts_alone(defense: Defense) -> None:
    examples = some_set(32)
    partition = defense.partition(examples)
    assert partition is not None
    whole = train(examples, RECIPE, seed=1, defense=defense).model
    # Another order, one example gone, and one whose label is another.
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    labels = examples.labels.clone()
    labels[5] = (labels[5] + 1) % 3
    changed = replace(examples, labels=labels, ids=None).subset(order[order != 9])
    other = train(changed, RECIPE, seed=1, defense=defense).model
    assert isinstance(whole, Voting)
    assert isinstance(other, Voting)
    touched = {int(partition.parts[one]) for one in (5, 9)}
    same = 0
    for number, (one, two) in enumerate(zip(whole.networks, other.networks, strict=True)):
        if touched & set(partition.uses[number].tolist()):
            continue
        states = one.state_dict(), two.state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        same += 1
    if isinstance(defense, DPA):
        assert same >= 2


def test_a_vote_is_stored_measured_and_certified(tmp_path: Path) -> None:
    examples = some_set(48)
    trained = unpoison.train(examples, RECIPE, defense=DPA(partitions=3), seed=0)
    trained.save(tmp_path / "model")
    loaded = Trained.load(tmp_path / "model")
    test = some_set(30)
    images = test.images / 255
    assert torch.equal(loaded.model(images), trained.model(images))
    found = certify(loaded, test)
    assert torch.equal(found.predicted, trained.model(images).argmax(1))
    measured = unpoison.measure(loaded, test)
    assert measured.certified[0] == measured.clean_accuracy
    rates = [one.rate for one in measured.certified]
    assert rates == sorted(rates, reverse=True)
    assert len(json.loads(json.dumps(measured.to_dict()))["certified"]) == len(rates)
    for number, rate in enumerate(rates):
        right = found.predicted == test.labels
        assert rate == pytest.approx(float((right & (found.radius >= number)).double().mean()))
    assert trained.history[0].examples == 48
    assert "certified" not in unpoison.measure(train(examples, RECIPE, seed=0), test).to_dict()


def test_a_vote_is_counted_by_a_loop_and_ties_go_to_the_lower_class() -> None:
    class Fixed(nn.Module):
        def __init__(self, label: int) -> None:
            super().__init__()
            self.register_buffer("label", torch.tensor(label))

        def forward(self, images: Tensor) -> Tensor:
            logits = torch.zeros(len(images), 4)
            logits[:, int(self.label)] = 9.0
            return logits

    for cast in itertools.product(range(4), repeat=3):
        for voters in ([True, True, True], [True, False, True]):
            votes = tuple(label if votes_ else -1 for label, votes_ in zip(cast, voters, strict=True))
            model = Voting([Fixed(label) for label in cast], torch.arange(3)[:, None], torch.tensor(voters))
            counts = model(torch.zeros(2, 1, 4, 4))
            assert model.votes(torch.zeros(1, 1, 4, 4)).tolist() == [list(votes)]
            assert int(counts[0].argmax()) == winner(votes, 4)
            assert counts[0].floor().tolist() == [votes.count(label) for label in range(4)]


def test_parts_that_are_too_small_cast_no_vote() -> None:
    examples = some_set(8)
    trained = train(examples, RECIPE, seed=0, defense=DPA(partitions=16))
    assert isinstance(trained.model, Voting)
    partition = DPA(partitions=16).partition(examples)
    sizes = [len(partition.examples_of(number)) for number in range(16)]
    assert trained.model.voters.tolist() == [size >= 2 for size in sizes]
    one = some_set(3).subset(torch.tensor([0]))
    with pytest.raises(InputError, match="no part of 2 has 2 examples to train on") as error:
        train(one, RECIPE, seed=0, defense=DPA(partitions=2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "defense",
    [DPA(partitions=8, workers=2), FiniteAggregation(partitions=2, spread=2, workers=3)],
    ids=["dpa", "finite aggregation"],
)
def test_networks_that_are_trained_at_a_time_are_those_trained_one_by_one(
    defense: Any, tmp_path: Path
) -> None:
    examples, told = some_set(18), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one_by_one = train(examples, RECIPE, seed=3, defense=replace(defense, workers=1))
        at_a_time = train(
            examples,
            RECIPE,
            seed=3,
            defense=defense,
            checkpoints=tmp_path,
            progress=lambda stage, done, total, /, **metrics: told.append((stage, done, total)),
        )
    finally:
        torch.set_num_threads(threads)
    images = examples.images / 255
    assert isinstance(at_a_time.model, Voting)
    assert isinstance(one_by_one.model, Voting)
    assert torch.equal(at_a_time.model.votes(images), one_by_one.model.votes(images))
    states = at_a_time.model.state_dict(), one_by_one.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    bare = [[replace(epoch, seconds=0.0) for epoch in one.history] for one in (at_a_time, one_by_one)]
    assert bare[0] == bare[1]
    assert at_a_time.defense == one_by_one.defense
    count = len(at_a_time.model.voters)
    assert told == [("training", done * 2, count * 2) for done in range(1, count + 1)]
    assert len(list(tmp_path.iterdir())) == int(at_a_time.model.voters.sum())


def test_a_network_that_a_worker_cannot_train_is_named_in_one_line() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 2)

        def forward(self, images: Tensor) -> Tensor:
            return torch.as_tensor(self.layer(images.flatten(1)))

    with pytest.raises(InputError, match=r"drawn: network \d: model: returns logits of shape") as error:
        train(some_set(), RECIPE, seed=0, start=Wrong(), defense=DPA(partitions=2, workers=2))
    assert "\n" not in str(error.value)


def test_what_needs_gradients_is_refused_in_one_line(tmp_path: Path) -> None:
    examples = some_set(24, classes=2)
    voted = train(examples, RECIPE, seed=0, defense=DPA(partitions=2))
    with pytest.raises(InputError, match="scrub: the model is a vote of networks, which gives no gradients"):
        unpoison.heal(voted, examples, [1, 2], method="scrub")
    with pytest.raises(unpoison.errors.UnpoisonError, match="gradient") as error:
        unpoison.trace(voted, examples, unpoison.Observation(examples.images[0]), method="ek-fac")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="the model is no vote of networks"):
        certify(train(examples, RECIPE, seed=0), examples)
    voted.save(tmp_path / "model")
    record = json.loads((tmp_path / "model" / "trained.json").read_text())
    record["voting"] = [3, 1]
    (tmp_path / "model" / "trained.json").write_text(json.dumps(record))
    with pytest.raises(MismatchError, match="do not fit"):
        Trained.load(tmp_path / "model")


def test_the_published_settings_are_there() -> None:
    assert defenses.get("dpa", preset="cifar10-250") == DPA(partitions=250)
    assert defenses.get("finite-aggregation", preset="cifar10-50-16") == FiniteAggregation(
        partitions=50, spread=16
    )
    assert all(defenses.describe(name).certifies for name in ("dpa", "finite-aggregation"))
    uses = FiniteAggregation(partitions=3, spread=4).partition(some_set()).uses
    assert uses.shape == (12, 4)
    assert torch.bincount(uses.flatten()).tolist() == [4] * 12
    assert all(len(set(row)) == 4 for row in uses.tolist())
