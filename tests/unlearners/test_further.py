"""The optimiser and learning rate that are found where no recipe is given."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison import unlearners
from unpoison._seeds import generator
from unpoison.data import TensorExamples
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.training import Trained
from unpoison.unlearners import FineTune, Relabel, _further
from unpoison.unlearners._validation import held_out_indices

FORGET = [1, 2]


def make_set(count: int = 150, *, shift: float = 0.0) -> TensorExamples:
    draw = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % 3
    inputs = torch.randn(count, 6, generator=draw) + 3 * nn.functional.one_hot(labels, 6)
    inputs[FORGET] += shift
    return TensorExamples(inputs, labels)


def trained() -> nn.Module:
    """A network that has learned the set."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    inputs, labels = make_set().tensors
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    return network.eval()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def test_the_largest_rate_that_keeps_the_accuracy_is_taken_of_each_optimiser(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_further, "RATES", {"sgd": (1e6, 100.0, 0.1, 0.01), "adamw": (1e30, 1e-3, 1e-4)})
    tuning = FineTune().heal(trained(), make_set(), FORGET).tuning
    assert tuning is not None
    tried = [(one["optimizer"], one["learning_rate"]) for one in tuning["trials"]]
    assert tried[-2:] == [("adamw", 1e30), ("adamw", 1e-3)]
    assert tried[:2] == [("sgd", 1e6), ("sgd", 100.0)]
    assert len(tried) in (5, 6)
    bound = tuning["accuracy_before"] - tuning["tolerance"]
    for one in tuning["trials"]:
        last = one["learning_rate"] == min(
            other["learning_rate"] for other in tuning["trials"] if other["optimizer"] == one["optimizer"]
        )
        assert (one["accuracy"] is not None and one["accuracy"] >= bound) == last
    ends = [one for one in tuning["trials"] if one["accuracy"] is not None and one["accuracy"] >= bound]
    best = min(ends, key=lambda one: one["loss"])
    assert (tuning["optimizer"], tuning["learning_rate"]) == (best["optimizer"], best["learning_rate"])
    json.dumps(tuning, allow_nan=False)
    assert tuning["tolerance"] == 0.02
    monkeypatch.setattr(_further, "STEPS", 2)  # of which an epoch has more
    again = FineTune().heal(trained(), make_set(), FORGET).tuning
    assert again is not None
    assert again["tolerance"] == 0.1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_trial_is_its_steps_on_what_is_not_held_out(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_further, "RATES", {optimizer: (0.01,)})
    monkeypatch.setattr(_further, "STEPS", 5)
    network, examples, seed = trained(), make_set(), 6
    tuning = FineTune().heal(network, examples, FORGET, seed=seed).tuning
    kept = torch.tensor([row for row in range(150) if row not in FORGET])
    rest = examples.subset(kept)
    learn, out = held_out_indices(rest, seed=seed, least=1)
    assert len(out) == 5 + 4 + 4  # a tenth of 50, 49 and 49 examples
    assert sorted([*learn.tolist(), *out.tolist()]) == list(range(148))
    student = copy.deepcopy(network)
    parameters = list(student.parameters())
    made: Any = (
        torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
        if optimizer == "sgd"
        else torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)
    )
    steps, number = 0, 0
    while steps < 5:
        order = learn[
            torch.randperm(len(learn), generator=generator(seed, "fine-tune", f"trial {number}", "order"))
        ]
        number += 1
        for rows in order.split(64)[: 5 - steps]:
            inputs, labels = rest.at(rows)
            made.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * (steps + 0.5) / 5)) / 2
            made.zero_grad()
            nn.functional.cross_entropy(student(inputs), labels).backward()
            made.step()
            steps += 1
    inputs, labels = rest.at(out)
    logits = student(inputs).detach()
    (trial,) = tuning["trials"]
    assert trial["accuracy"] == float((logits.argmax(1) == labels).double().mean())
    assert trial["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-4)


def test_it_depends_on_the_seed_and_on_what_is_kept_alone() -> None:
    network = trained()
    one, again, other = (
        FineTune().heal(network, make_set(shift=shift), FORGET, seed=5) for shift in (0.0, 0.0, 40.0)
    )
    assert torch.equal(weights(one.model), weights(again.model))
    assert torch.equal(weights(one.model), weights(other.model))
    found = [{**each.tuning, "seconds": 0} for each in (one, again, other)]
    assert found[0] == found[1] == found[2]
    assert one.recipe is None


def test_the_methods_take_their_shares_of_what_is_found() -> None:
    network = trained()
    fine, half = (FineTune(learning_rate=rate).heal(network, make_set(), FORGET) for rate in (None, 0.5))
    assert len(fine.history) == 5
    rate = fine.tuning["learning_rate"]
    assert fine.history[0].learning_rate <= rate
    assert half.history[0].learning_rate == pytest.approx(fine.history[0].learning_rate / 2)
    assert fine.history[-1].learning_rate < 0.1 * rate
    relabelled = Relabel().heal(network, make_set(), FORGET)
    assert [record.examples for record in relabelled.history] == [148 + 6, 148 + 6]
    assert relabelled.history[0].learning_rate == pytest.approx(relabelled.tuning["learning_rate"] / 4)
    inputs, labels = make_set().at(FORGET)
    assert not bool((relabelled.model(inputs).argmax(1) == labels).all())


def test_frozen_parts_take_no_part() -> None:
    network = trained()
    network[0].requires_grad_(False)  # type: ignore[index]
    for method in (FineTune(), Relabel(), FineTune(layers=1)):
        healed = method.heal(network, make_set(), FORGET)
        assert torch.equal(healed.model[0].weight, network[0].weight)  # type: ignore[index]
        assert not torch.equal(healed.model[2].weight, network[2].weight)  # type: ignore[index]


def test_one_example_a_class_is_enough() -> None:
    healed = FineTune().heal(trained(), make_set(5), [3, 4])
    assert healed.tuning["held_out"] == 3


def test_where_every_rate_diverges_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_further, "RATES", {"sgd": (1e30, 1e29)})
    with pytest.raises(TrainingDivergedError, match=r"at every learning rate .* 1e\+29; give recipe="):
        FineTune().heal(trained(), make_set(), FORGET)


def test_where_every_rate_costs_accuracy_the_best_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_further, "RATES", {"sgd": (1.0, 0.1, 1e-6), "adamw": (1e30, 1.0)})
    monkeypatch.setattr(_further, "TOLERANCES", (-1.0, -1.0))  # which nothing meets
    tuning = FineTune().heal(trained(), make_set(), FORGET).tuning
    reached = {one["learning_rate"]: one["accuracy"] or 0.0 for one in tuning["trials"]}
    assert len(tuning["trials"]) == 5
    assert reached[tuning["learning_rate"]] == max(reached.values())


def test_trials_are_reported_and_can_be_stopped() -> None:
    class Stop(Exception):
        pass

    seen: list[str] = []

    def progress(stage: str, done: int, total: int, /, **metrics: float) -> None:
        seen.append(stage)
        if len(seen) == 2:
            raise Stop

    with pytest.raises(Stop):
        FineTune().heal(trained(), make_set(), FORGET, progress=progress)
    assert seen == ["learning rates"] * 2


def test_it_is_stored_with_the_healed_model(tmp_path: Any) -> None:
    healed = Relabel().heal(trained(), make_set(), FORGET)
    healed.save(tmp_path / "healed")
    assert Trained.load(tmp_path / "healed", model=trained()).tuning == healed.tuning


def test_the_recipes_schedule_needs_a_recipe() -> None:
    with pytest.raises(InputError, match="give recipe="):
        unlearners.get("fine-tune", preset="published").heal(trained(), make_set(), FORGET)
