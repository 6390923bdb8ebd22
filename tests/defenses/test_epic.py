"""EPIC: what it drops, when, and that drops are cumulative."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unpoison import defenses
from unpoison.data import TrainingSet
from unpoison.defenses import EPIC, isolated
from unpoison.defenses._gradients import logit_gradients, training_logits
from unpoison.defenses.epic import quotas
from unpoison.errors import InputError
from unpoison.training import Recipe, Trained, predict, train

RECIPE = Recipe(model="resnet9", width=2, epochs=5, batch_size=16, learning_rate=0.05)


def planted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With one example more in each of three classes, far from all others, and where they are."""
    far = torch.tensor([[0.0, 9.0, 9.0, 0.0], [9.0, 0.0, 0.0, 9.0], [9.0, 9.0, 0.0, 0.0]])
    return (
        torch.cat([logits, far]),
        torch.cat([labels, torch.tensor([0, 1, 2])]),
        torch.arange(len(labels), len(labels) + 3),
    )


def by_hand(logits: Tensor, labels: Tensor, medoids: int) -> list[int]:
    """EPIC by plain loops, for classes of one size."""
    dropped = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten().tolist()
        rows = [
            [
                math.exp(value) / sum(math.exp(other) for other in logits[member].tolist()) - (place == label)
                for place, value in enumerate(logits[member].tolist())
            ]
            for member in members
        ]
        n, d = len(rows), len(rows[0])
        like = [[math.exp(-math.dist(one, two) / d) for two in rows] for one in rows]
        served, picked = [0.0] * n, []
        for _ in range(medoids):
            gains = [
                -1.0 if j in picked else sum(max(like[i][j] - served[i], 0.0) for i in range(n))
                for j in range(n)
            ]
            picked.append(gains.index(max(gains)))
            served = [max(served[i], like[i][picked[-1]]) for i in range(n)]
        owner = [max(picked, key=lambda j, i=i: like[i][j]) for i in range(n)]  # type: ignore[misc]
        dropped += [members[j] for j in picked if owner.count(j) == 1]
    return sorted(dropped)


def make_set(count: int = 60) -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    patterns = torch.rand(3, 1, 8, 8, generator=generator)
    pixels = patterns[labels] + 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    return TrainingSet((pixels.clamp(0, 1) * 255).byte(), labels, ("a", "b", "c"), "drawn")


def assert_same_weights(one: Trained, other: Trained) -> None:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_drops_what_plain_loops_drop(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    for share, medoids in ((0.1, 12), (0.3, 36)):
        found = isolated(logits, labels, subset_size=share).nonzero().flatten().tolist()
        assert found == by_hand(logits, labels, medoids)
        assert found


def test_planted_outliers_are_alone(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels, where = planted(*drawn)
    assert bool(isolated(logits, labels)[where].all())


def test_the_order_of_the_examples_is_nothing(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    assert torch.equal(isolated(logits, labels)[shuffled], isolated(logits[shuffled], labels[shuffled]))


def test_classes_of_different_sizes_do_not_mix(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    # The first class is smaller: the numbers of its medoids must not shift those of the others.
    cut = torch.cat([torch.arange(40), torch.arange(120, 480)])
    whole, part = (
        isolated(logits, labels, subset_size=0.1),
        isolated(logits[cut], labels[cut], subset_size=0.1),
    )
    assert torch.equal(part[40:], whole[120:])


def test_tiny_and_empty_classes_are_left_whole() -> None:
    logits = torch.randn(13, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 10 + [1] * 2 + [3])
    for share in (0.05, 0.5, 0.99):
        assert not bool(isolated(logits, labels, subset_size=share)[10:].any())
    assert not len(isolated(logits[:0], labels[:0]))


def test_copies_are_not_alone(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels, where = planted(*drawn)
    doubled = isolated(torch.cat([logits, logits[where]]), torch.cat([labels, labels[where]]))
    assert not bool(doubled[where].any())
    assert not bool(doubled[-3:].any())


def test_a_higher_threshold_drops_more(drawn: tuple[Tensor, Tensor]) -> None:
    one, two = (isolated(*drawn, cluster_threshold=size) for size in (1, 2))
    assert bool((one <= two).all())
    assert int(one.sum()) < int(two.sum())
    assert not bool(isolated(*drawn, cluster_threshold=0).any())


def test_the_number_of_medoids() -> None:
    assert quotas([5000] * 10, 0.3, seed=0) == [1500] * 10
    assert sum(quotas([4500] + [5000] * 9, 0.1, seed=0)) == 4950
    assert quotas([0, 3, 0], 0.5, seed=0) == [0, 1, 0]
    assert quotas([], 0.5, seed=0) == []
    assert sum(quotas([7, 7, 7], 0.2, seed=1)) == 4


def test_presets() -> None:
    rounds = {
        "released-200-0.1": range(30, 151, 10),
        "released-40-0.3": range(10, 35, 2),
        "released-40-eps16-0.2": range(5, 36, 5),
        "released-tiny-imagenet": range(10, 151, 10),
        "released-transfer": range(1, 10),
        "released-fine-tune": range(5, 36),
        "paper-200-0.1": range(10, 151, 10),
        "paper-200-0.2": range(20, 151, 10),
        "paper-200-0.3": range(30, 151, 10),
    }
    for name, epochs in rounds.items():
        defense = defenses.get("epic", preset=name)
        assert [epoch for epoch in range(300) if defense.is_round(epoch)] == list(epochs)
    assert defenses.get("epic", preset="released-fine-tune", interval=4).interval == 4
    with pytest.raises(InputError, match="released-transfer"):
        defenses.get("epic", preset="published")


def test_the_schedule_follows_the_recipe() -> None:
    recipe = Recipe.preset("resnet18-200")
    assert EPIC.for_recipe(recipe, preset="released-200-0.2") == defenses.get(
        "epic", preset="released-200-0.2"
    )
    assert EPIC.for_recipe(Recipe(epochs=20)).last_epoch == 18
    defense = EPIC(interval=5, warm_up=0)
    defense.begin(make_set(), recipe, seed=0)
    assert max(epoch for epoch in range(200) if defense.is_round(epoch)) == 150


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"subset_size": 0.0}, "subset_size"),
        ({"subset_size": 1}, "subset_size"),
        ({"interval": 0}, "interval"),
        ({"warm_up": -1}, "warm_up"),
        ({"last_epoch": 1.5}, "last_epoch"),
        ({"cluster_threshold": -1}, "cluster_threshold"),
        ({"kernel": "cosine"}, "kernel"),
        ({"memory": None}, "memory"),
    ],
)
def test_values_out_of_range(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"epic: {message}"):
        EPIC(**wrong)  # type: ignore[arg-type]


def test_logits_that_are_none(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    broken = logits.clone()
    broken[7, 1] = math.nan
    with pytest.raises(InputError, match="1 of 480 examples have logits that are not finite"):
        isolated(broken, labels)
    with pytest.raises(InputError, match="expected"):
        isolated(logits, labels[:-1])
    with pytest.raises(InputError, match="labels"):
        isolated(logits, labels + 1)
    with pytest.raises(InputError, match="among"):
        isolated(logits, labels, among=labels)


def test_in_a_loop_of_ones_own(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    defense = EPIC(interval=1, warm_up=0)
    keep = defense.select(1, logits, labels)
    assert torch.equal(keep, ~isolated(logits, labels))
    other = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    later = defense.select(2, other, labels)
    assert torch.equal(later, keep & ~isolated(other, labels))
    first, second = defense.reports
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.newly == first.in_all == int((~keep).sum())
    assert second.in_all == second.newly + first.newly == len(labels) - second.alive
    assert defense.sizes_so_far() == ((1, first.newly), (2, second.newly))
    with pytest.raises(InputError, match="as in the round before"):
        defense.select(3, logits[:-1], labels[:-1])
    assert int(defense.select(0, logits, labels).sum()) == first.alive
    assert len(defense.reports) == 1


def test_each_round_anew(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    defense = EPIC(cumulative=False)
    defense.select(1, logits.flip(1), labels)
    assert torch.equal(defense.select(2, logits, labels), ~isolated(logits, labels))


def test_clustering_the_living_erodes(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    kept = {}
    for everything in (True, False):
        defense = EPIC(cluster_everything=everything)
        for epoch in range(1, 8):
            kept[everything] = int(defense.select(epoch, logits, labels).sum())
    assert kept[False] < kept[True] == int((~isolated(logits, labels)).sum())


def test_the_report_judges(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels, where = planted(*drawn)
    defense = EPIC()
    keep = defense.select(1, logits, labels)
    (report,) = defense.reports
    judged = report.judge(where)
    assert (judged.recall.successes, judged.recall.trials) == (3, 3)
    assert judged.precision.trials == int((~keep).sum())
    assert (judged.clean.successes, judged.clean.trials) == (judged.precision.trials - 3, 480)
    truth = torch.zeros(len(labels), dtype=torch.bool)
    truth[where] = True
    assert report.judge(truth, this_round=True) == judged
    with pytest.raises(InputError, match="poison: expected bool"):
        report.judge(truth[1:])


def test_in_training() -> None:
    training_set = make_set()
    defense = EPIC(subset_size=0.3, interval=1, warm_up=2, last_epoch=3)
    once = train(training_set, RECIPE, seed=0, defense=defense)
    sizes = defense.sizes_so_far()
    assert [epoch for epoch, _ in sizes] == [2, 3]
    assert once.history[1].examples == 60 > once.history[2].examples
    assert [record.examples for record in once.history[2:]] == [
        60 - sizes[0][1],
        *[60 - sizes[0][1] - sizes[1][1]] * 2,
    ]
    # The same object defends a second run, and an equal one gives the same weights.
    again = train(training_set, RECIPE, seed=0, defense=defense)
    assert defense.sizes_so_far() == sizes
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            once.model.state_dict().values(), again.model.state_dict().values(), strict=True
        )
    )


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    training_set = make_set()

    class Cut(Exception):
        pass

    def cut(stage: str, done: int, total: int, /, **metrics: float) -> None:
        if done == 3:
            raise Cut

    def fresh() -> EPIC:
        return EPIC(subset_size=0.3, interval=1, warm_up=2, last_epoch=4)

    whole_defense, cut_defense = fresh(), fresh()
    whole = train(training_set, RECIPE, seed=0, defense=whole_defense)
    with pytest.raises(Cut):
        train(training_set, RECIPE, seed=0, defense=fresh(), checkpoints=tmp_path, progress=cut)
    resumed = train(training_set, RECIPE, seed=0, defense=cut_defense, checkpoints=tmp_path)
    assert cut_defense.sizes_so_far() == whole_defense.sizes_so_far()
    assert_same_weights(whole, resumed)


def test_examples_that_the_run_does_not_include_take_no_part() -> None:
    training_set = make_set()
    include = torch.ones(60, dtype=torch.bool)
    include[:20] = False
    defense = EPIC(subset_size=0.3, interval=1, warm_up=1, last_epoch=2)
    train(training_set, RECIPE, seed=0, defense=defense, include=include)
    for report in defense.reports:
        assert not bool(report.dropped[:20].any())
        assert report.alive + report.in_all == 40


def test_the_bias_of_the_classifier_is_left_out() -> None:
    training_set = make_set()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
    before = copy.deepcopy(model.state_dict())
    without = training_logits(model, training_set, without_bias=True)
    logits = predict(model, training_set.images)
    torch.testing.assert_close(without + model[3].bias.detach(), logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False))
    assert torch.equal(
        training_logits(plain, training_set, without_bias=True), predict(plain, training_set.images)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_examples_that_are_fit_do_not_cancel(dtype: torch.dtype) -> None:
    """At a probability of 1 - 1e-12 the label's entry is minus the sum of the others."""
    logits = torch.tensor([[28.0, 0.0, -1.0], [2.0, 30.0, 0.0]], dtype=dtype)
    found = logit_gradients(logits, torch.tensor([0, 1])).tolist()
    for row, label, gradient in zip(logits.double().tolist(), (0, 1), found, strict=True):
        total = math.fsum(map(math.exp, row))
        expected = [math.exp(value) / total for value in row]
        expected[label] = -math.fsum(value for place, value in enumerate(expected) if place != label)
        assert abs(expected[label]) < 2e-12
        assert gradient == pytest.approx(expected, rel=1e-12)


def test_isolation_is_found_among_examples_that_are_fit(drawn: tuple[Tensor, Tensor]) -> None:
    """Two examples that are fit to 1 - 1e-12 differ in which other class they are nearest to."""
    logits = torch.zeros(40, 3)
    logits[:, 0] = 30
    logits[:, 1] = 2
    logits[7, 1], logits[7, 2] = 0, 2
    assert isolated(logits, torch.zeros(40, dtype=torch.int64)).nonzero().flatten().tolist() == [7]


def test_the_gradient_is_that_of_the_loss(drawn: tuple[Tensor, Tensor]) -> None:
    logits, labels = drawn
    leaf = logits.double().requires_grad_()
    nn.functional.cross_entropy(leaf, labels, reduction="sum").backward()
    assert leaf.grad is not None
    torch.testing.assert_close(logit_gradients(logits, labels), leaf.grad)
