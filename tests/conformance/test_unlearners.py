"""The contract of `Unlearner`, for every registered unlearner."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unpoison import unlearners
from unpoison.data import TrainingSet
from unpoison.errors import InputError, MismatchError, UnpoisonError
from unpoison.training import Recipe, Trained, train
from unpoison.unlearners import Unlearner

# What a method needs to be quick and to have an effect on so little data, by name and preset. One that is not
# listed is tried as it is, so that a plug-in's is tested, too.
QUICK: dict[str, dict[str, Any]] = {
    # With its own alpha nothing is dampened here.
    "ssd default": {"selection": 1.0, "dampening": 0.5},
    "ssd published": {"selection": 2.0, "dampening": 0.2},
    # Longer steps, for a shorter search.
    "potion default": {"step": 10.0},
    "potion published": {"step": 10.0},
    "nad default": {"epochs": 1},
    "nad published": {"epochs": 1},
    "fine-pruning default": {"epochs": 1},
    "i-bau default": {"rounds": 1, "fixed_points": 1},
    # With all its steps it diverges on so little data.
    "scrub published": {"steps": 3},
}
# Settings that no preset has.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "potion assd": ("potion", {"importance": "assd", "step": 10.0}),
    # With the ascent of "loss", since that of the divergence begins with a gradient of zero.
    "scrub rewound": ("scrub", {"rewind": True, "ascent": "loss"}),
    "relabel, not always": ("relabel", {"always_relabel": False}),
    "fine-tune last layer": ("fine-tune", {"layers": 1}),
}
# Nothing is drawn by these.
NOT_RANDOM = ("ssd", "potion")


def _cases() -> dict[str, Unlearner]:
    presets = {
        f"{name} {preset}": unlearners.get(name, preset=preset, **QUICK.get(f"{name} {preset}", {}))
        for name in unlearners.names()
        for preset in unlearners.describe(name).presets
    }
    return presets | {case: unlearners.get(name, **options) for case, (name, options) in MORE.items()}


CASES = [pytest.param(unlearner, id=case) for case, unlearner in _cases().items()]
READERS = [case for case in CASES if case.values[0].method.reads_forget_set]  # type: ignore[union-attr]
OTHERS = [case for case in CASES if case not in READERS]
OF_CLEAN = [case for case in CASES if case.values[0].method.uses_reference]  # type: ignore[union-attr]

RECIPE = Recipe(model="resnet9", width=2, epochs=2, batch_size=16, learning_rate=0.05, flip=True)


class View(nn.Module):
    """Flattens by `view`, which needs contiguous maps."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.view(len(maps), -1)


class Small(nn.Sequential):
    """A network of the caller's own, with batch norm and dropout."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, stride=4),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            View(),
            nn.Linear(16, classes),
        )


def make_set(*, shift: int = 0) -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (48, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(48) % 3
    images[:4] += shift
    return TrainingSet(images, labels, ("a", "b", "c"), "drawn")


FORGET = torch.tensor([3, 0, 2, 1, 2])


def fresh() -> nn.Module:
    """The caller's network before training."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Small()


def start_for(own: bool) -> nn.Module | None:
    return fresh() if own else None


@pytest.fixture(scope="module")
def victim() -> Trained:
    return train(make_set(), RECIPE, seed=0)


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Small()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


@pytest.mark.parametrize("unlearner", OTHERS)
def test_what_is_forgotten_has_no_influence(unlearner: Unlearner, victim: Trained) -> None:
    one = unlearner.heal(victim, make_set(), FORGET)
    other = unlearner.heal(victim, make_set(shift=50), FORGET)
    assert torch.equal(weights(one.model), weights(other.model))


@pytest.mark.parametrize("unlearner", READERS)
def test_what_is_forgotten_is_read_where_it_is_declared(unlearner: Unlearner, victim: Trained) -> None:
    one = unlearner.heal(victim, make_set(), FORGET)
    other = unlearner.heal(victim, make_set(shift=50), FORGET)
    assert not torch.equal(weights(one.model), weights(other.model))


@pytest.mark.parametrize("unlearner", CASES)
def test_the_healed_model_has_the_fingerprint_of_what_was_kept(unlearner: Unlearner, victim: Trained) -> None:
    healed = unlearner.heal(victim, make_set(), FORGET)
    assert healed.training_fingerprint == make_set().without(FORGET).fingerprint


@pytest.mark.parametrize("unlearner", CASES)
def test_what_is_kept_matters(unlearner: Unlearner, victim: Trained) -> None:
    one = unlearner.heal(victim, make_set(), FORGET)
    other = unlearner.heal(victim, make_set(shift=50), FORGET + 10)
    assert not torch.equal(weights(one.model), weights(victim.model))
    assert not torch.equal(weights(one.model), weights(other.model))


@pytest.mark.parametrize("unlearner", CASES)
def test_the_seed_decides(unlearner: Unlearner, victim: Trained) -> None:
    state = torch.random.get_rng_state()
    one, again = (unlearner.heal(victim, make_set(), FORGET, seed=4) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weights(one.model), weights(again.model))
    other = unlearner.heal(victim, make_set(), FORGET.flip(0), seed=5)
    same = torch.equal(weights(one.model), weights(other.model))
    assert same == (unlearner.method.name in NOT_RANDOM)
    reordered = unlearner.heal(victim, make_set(), FORGET.flip(0).tolist(), seed=4)
    assert torch.equal(weights(one.model), weights(reordered.model))


@pytest.mark.parametrize("own", [False, True], ids=["trained", "own network"])
@pytest.mark.parametrize("unlearner", CASES)
def test_nothing_given_is_changed(
    unlearner: Unlearner, own: bool, victim: Trained, network: nn.Module
) -> None:
    model: Any = network.train() if own else victim
    module: nn.Module = network if own else victim.model
    next(module.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in module.parameters()]
    modes = [part.training for part in module.modules()]
    state = copy.deepcopy(module.state_dict())
    gradients = [(parameter.grad, copy.deepcopy(parameter.grad)) for parameter in module.parameters()]
    training_set = make_set()
    fingerprint = make_set().fingerprint
    start = start_for(own)
    healed = unlearner.heal(model, training_set, FORGET, recipe=RECIPE, start=start)
    assert healed.model is not module
    assert start is None or all(
        torch.equal(value, fresh().state_dict()[key]) for key, value in start.state_dict().items()
    )
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    for parameter, (gradient, values) in zip(module.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or (values is not None and torch.equal(gradient, values))
    assert not any(part._forward_pre_hooks for part in module.modules())
    assert training_set.fingerprint == fingerprint
    next(module.parameters()).requires_grad_(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unlearner", CASES)
def test_frozen_parts_and_precision_stay_as_they_are(unlearner: Unlearner, dtype: torch.dtype) -> None:
    network = fresh().to(dtype)
    for part in list(network.children())[:2]:  # a convolution and its batch norm
        part.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    # An incompetent teacher that is the model itself teaches nothing.
    start = copy.deepcopy(network) if unlearner.needs_recipe else None
    healed = unlearner.heal(network, make_set(), FORGET, recipe=RECIPE, start=start).model
    after = healed.state_dict()
    assert [name for name in after if name[0] in "01" and not torch.equal(after[name], before[name])] == []
    # At its own learning rate SCRUB's steps are below the precision of bfloat16.
    if dtype != torch.bfloat16 or unlearner.method.name != "scrub":
        assert not torch.equal(after["5.weight"], before["5.weight"])
    assert {name: value.dtype for name, value in after.items()} == {
        name: value.dtype for name, value in before.items()
    }
    assert [one.requires_grad for one in healed.parameters()] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("own", [False, True], ids=["trained", "own network"])
@pytest.mark.parametrize("unlearner", CASES)
def test_the_healed_model_is_ready_and_can_be_stored(
    unlearner: Unlearner, own: bool, victim: Trained, network: nn.Module, tmp_path: Any
) -> None:
    healed = unlearner.heal(
        network if own else victim, make_set(), FORGET, recipe=RECIPE, start=start_for(own)
    )
    if own:
        assert type(healed.model) is Small
        assert healed.model.state_dict().keys() == network.state_dict().keys()
    assert not any(part.training for part in healed.model.modules())
    assert {name: parameter.requires_grad for name, parameter in healed.model.named_parameters()} == {
        name: True for name, _ in healed.model.named_parameters()
    }
    assert not any(part._forward_pre_hooks for part in healed.model.modules())
    assert healed.class_names == ("a", "b", "c")
    assert healed.own_model == own
    healed.save(tmp_path / "model")
    loaded = Trained.load(tmp_path / "model", model=Small() if own else None)
    assert torch.equal(weights(loaded.model), weights(healed.model))


@pytest.mark.parametrize("unlearner", CASES)
def test_the_recipe_of_the_sample_is_not_assumed_for_another_network(
    unlearner: Unlearner, network: nn.Module
) -> None:
    start = fresh()
    if unlearner.needs_recipe:
        with pytest.raises(InputError, match="how this network was trained is not known; give recipe="):
            unlearner.heal(network, make_set(), FORGET, start=start)
        return
    if getattr(unlearner, "schedule", "") == "recipe":
        with pytest.raises(InputError, match="schedule 'recipe' needs the recipe of the training"):
            unlearner.heal(network, make_set(), FORGET, start=start)
        return
    healed = unlearner.heal(network, make_set(), FORGET, start=start)
    assert healed.recipe is None
    assert not torch.equal(weights(healed.model), weights(network))
    found = ("fine-pruning", "fine-tune", "nad", "relabel")
    assert (healed.tuning is not None) == (unlearner.method.name in found)


@pytest.mark.parametrize("unlearner", [case for case in CASES if case.values[0].uses_start])  # type: ignore[union-attr]
def test_a_start_that_does_not_fit_is_refused(unlearner: Unlearner, network: nn.Module) -> None:
    with pytest.raises(MismatchError, match=r"start has another '5.weight' than the model"):
        unlearner.heal(network, make_set(), FORGET, recipe=RECIPE, start=Small(classes=4))
    with pytest.raises(InputError, match="start is the model itself"):
        unlearner.heal(network, make_set(), FORGET, recipe=RECIPE, start=network)


@pytest.mark.parametrize("unlearner", CASES)
def test_progress_is_reported(unlearner: Unlearner, victim: Trained) -> None:
    seen: list[tuple[str, int, int, dict[str, float]]] = []

    def progress(stage: str, done: int, total: int, /, **metrics: float) -> None:
        seen.append((stage, done, total, metrics))

    healed = unlearner.heal(victim, make_set(), FORGET, progress=progress)
    assert len(seen) == len(healed.history) >= 1
    assert {stage for stage, *_ in seen} <= {"training", "dampening"}
    for place, ((_, done, total, metrics), record) in enumerate(zip(seen, healed.history, strict=True)):
        assert done == place + 1 == record.epoch + 1
        assert metrics == {"loss": record.loss, "accuracy": record.accuracy}
        assert total >= len(seen)
        if getattr(unlearner, "steps", None) is None:
            assert total == len(seen)
    assert healed.seconds >= 0
    assert all(record.seconds >= 0 for record in healed.history)
    assert all(0 < record.examples <= 44 + 3 * 4 for record in healed.history)


@pytest.mark.parametrize("unlearner", CASES)
def test_what_progress_raises_ends_the_work(unlearner: Unlearner, victim: Trained) -> None:
    class Stop(Exception):
        pass

    def progress(stage: str, done: int, total: int, /, **metrics: float) -> None:
        raise Stop

    with pytest.raises(Stop):
        unlearner.heal(victim, make_set(), FORGET, progress=progress)


@pytest.mark.parametrize("unlearner", CASES)
def test_a_mask_and_numbers_of_numpy_are_accepted(
    unlearner: Unlearner, victim: Trained, tmp_path: Any
) -> None:
    mask = torch.zeros(48, dtype=torch.bool)
    mask[FORGET] = True
    one = unlearner.heal(victim, make_set(), FORGET, seed=4)
    other = unlearner.heal(victim, make_set(), mask.numpy(), seed=np.int64(4))  # type: ignore[arg-type]
    assert torch.equal(weights(one.model), weights(other.model))
    other.save(tmp_path / "model")


@pytest.mark.parametrize("unlearner", CASES)
def test_it_works_where_gradients_are_off(unlearner: Unlearner, victim: Trained) -> None:
    expected = unlearner.heal(victim, make_set(), FORGET)
    with torch.inference_mode():
        assert torch.equal(weights(unlearner.heal(victim, make_set(), FORGET).model), weights(expected.model))


@pytest.mark.parametrize("unlearner", OTHERS)
def test_only_what_is_kept_is_trained_on(unlearner: Unlearner, victim: Trained) -> None:
    healed = unlearner.heal(victim, make_set(), FORGET)
    assert {record.examples for record in healed.history} == {44}


@pytest.mark.parametrize("unlearner", CASES)
@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ([], "there is nothing to forget"),
        (torch.zeros(0), "there is nothing to forget"),
        (torch.zeros(48, dtype=torch.bool), "there is nothing to forget"),
        (range(48), "all 48 examples of drawn are to be forgotten"),
        (range(0, 48, 3), r"leaves none of class 0 \(a\)"),
        ([0, 48], r"index 48 is outside 0\.\.47"),
        ([-1], r"index -1 is outside 0\.\.47"),
        (torch.zeros(47, dtype=torch.bool), r"a mask must be bool \[48\]"),
        (torch.tensor([1.0]), r"found torch\.float32"),
    ],
    ids=str,
)
def test_what_cannot_be_forgotten_is_refused_in_one_line(
    unlearner: Unlearner, forget: Any, message: str, victim: Trained
) -> None:
    with pytest.raises(InputError, match=message) as error:
        unlearner.heal(victim, make_set(), forget if isinstance(forget, Tensor) else list(forget))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("unlearner", CASES)
def test_a_class_may_be_lost_on_purpose(unlearner: Any, victim: Trained) -> None:
    healed = dataclasses.replace(unlearner, lose_classes=True).heal(victim, make_set(), range(0, 48, 3))
    assert healed.training_fingerprint == make_set().without(range(0, 48, 3)).fingerprint


@pytest.mark.parametrize("unlearner", CASES)
def test_without_findings(unlearner: Unlearner, victim: Trained) -> None:
    declared, clean = unlearner.method, make_set(shift=50).subset(torch.arange(24))
    if declared.needs_findings:
        with pytest.raises(InputError, match="forgets examples that were found; give findings"):
            unlearner.heal(victim, make_set(), reference=clean)
        return
    if declared.uses_reference:
        with pytest.raises(
            InputError, match="repairs by examples that are known to be clean; give reference="
        ):
            unlearner.heal(victim, make_set())
    one, again = (unlearner.heal(victim, make_set(), reference=clean) for _ in range(2))
    assert torch.equal(weights(one.model), weights(again.model))
    assert not torch.equal(weights(one.model), weights(victim.model))
    assert one.training_fingerprint == make_set().fingerprint
    # The training set is held to be poisoned: nothing of it is learned.
    other = unlearner.heal(victim, make_set(shift=50), reference=clean)
    assert torch.equal(weights(one.model), weights(other.model))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (make_set().subset(torch.arange(0)), "the reference drawn is empty"),
        (
            TrainingSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), tuple("abcd"), "four"),
            "has 4",
        ),
        (
            TrainingSet(
                torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4).long(), tuple("abc"), "rgb"
            ),
            "8",
        ),
    ],
    ids=["empty", "classes", "shape"],
)
@pytest.mark.parametrize("unlearner", OF_CLEAN)
def test_a_reference_that_does_not_fit_is_refused(
    unlearner: Unlearner, reference: TrainingSet, message: str, victim: Trained
) -> None:
    with pytest.raises(UnpoisonError, match=message) as error:
        unlearner.heal(victim, make_set(), reference=reference)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("unlearner", OF_CLEAN)
def test_one_clean_example_is_enough(unlearner: Unlearner, victim: Trained) -> None:
    # Batch norm cannot train on one example.
    frozen = copy.deepcopy(victim.model)
    for part in frozen.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.requires_grad_(False)
    healed = unlearner.heal(frozen, make_set(), reference=make_set().subset(torch.tensor([7])), recipe=RECIPE)
    assert bool(weights(healed.model).isfinite().all())


@pytest.mark.parametrize("name", unlearners.names())
def test_it_is_a_final_frozen_dataclass_that_declares_what_it_is(name: str) -> None:
    kind = unlearners.METHODS.implementation(name)
    assert issubclass(kind, Unlearner)
    assert not inspect.isabstract(kind)
    assert getattr(kind, "__final__", False)
    assert dataclasses.is_dataclass(kind)
    hash(unlearners.get(name))
    method = unlearners.describe(name)
    assert method.name == name
    assert kind.method == method
    assert all(value for value in json.loads(json.dumps(method.to_dict())).values() if value is not False)


def test_there_is_no_unlearner_of_an_unknown_name() -> None:
    with pytest.raises(InputError, match=r"no unlearner 'magic'; there are bad-teaching, .*, scrub, ssd"):
        unlearners.get("magic")


@pytest.mark.parametrize("unlearner", CASES)
def test_a_network_of_which_everything_is_frozen_is_refused_in_one_line(unlearner: Unlearner) -> None:
    network = fresh().requires_grad_(False)
    with pytest.raises(InputError, match="every parameter is frozen") as error:
        unlearner.heal(network, make_set(), FORGET, recipe=RECIPE, start=copy.deepcopy(network))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("unlearner", CASES)
def test_nothing_given_is_changed_by_a_work_that_is_ended(unlearner: Unlearner, network: nn.Module) -> None:
    class Stop(Exception):
        pass

    def progress(stage: str, done: int, total: int, /, **metrics: float) -> None:
        raise Stop

    network.train()[1].eval()  # type: ignore[index]
    training_set, start = make_set(), fresh()
    torch.nn.functional.cross_entropy(network(training_set.images / 255), training_set.labels).backward()
    network.register_forward_hook(lambda *_: None)
    state, modes = copy.deepcopy(network.state_dict()), [part.training for part in network.modules()]
    gradients = [(one.grad, one.grad.clone()) for one in network.parameters() if one.grad is not None]
    with pytest.raises(Stop):
        unlearner.heal(network, training_set, FORGET, recipe=RECIPE, start=start, progress=progress)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert [part.training for part in network.modules()] == modes
    assert len(network._forward_hooks) == 1
    assert not any(part._forward_pre_hooks for part in network.modules())
    now = [one.grad for one in network.parameters()]
    for (gradient, values), found in zip(gradients, now, strict=True):
        assert found is gradient
        assert torch.equal(gradient, values)
    assert torch.equal(weights(start), weights(fresh()))
    assert training_set.fingerprint == make_set().fingerprint
