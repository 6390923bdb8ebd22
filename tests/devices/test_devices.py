"""Every method on a pretended accelerator: no operation mixes devices, and results are those of the CPU.

`pretended` says what this can and cannot see. Every registered method is tested, with the quick options of
the conformance tests or with its defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison import attacks, defenses, detectors
from unpoison.data import TrainingSet
from unpoison.influence import InfluenceIndex, fit_factors, precondition, project, score
from unpoison.models import names
from unpoison.tasks import ClassificationTask
from unpoison.threats import Budget
from unpoison.training import Defense, Recipe, Step, train

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))
import test_attacks as attack_cases
import test_defenses as defense_cases
import test_detectors as detector_cases
import test_unlearners as unlearner_cases
from pretended import DEVICE, MixedDevices, Pretended, moved_to_cpu, pretended_accelerator


def make_set(n: int = 48, *, side: int = 12) -> TrainingSet:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=draws)
    return TrainingSet(images, torch.arange(n) % 3, ("a", "b", "c"), "drawn")


def on_both(work: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What the work gives on the CPU, and on the device."""
    on_cpu = work("cpu")
    with pretended_accelerator():
        return on_cpu, work(DEVICE)


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[key], moved_to_cpu(right[key])) for key in left
    )


def ours(model: nn.Module) -> bool:
    return all(isinstance(tensor, Pretended) for tensor in model.state_dict().values())


RECIPE = Recipe(model="resnet9", width=2, epochs=2, batch_size=16, flip=True, crop_padding=1, cutout=3)


@pytest.mark.parametrize("model", names())
def test_training(model: str) -> None:
    recipe = replace(RECIPE, model=model, width=4, epochs=1, label_smoothing=0.1)
    on_cpu, there = on_both(lambda device: train(make_set(), recipe, seed=0, device=device))
    assert ours(there.model)
    assert same(on_cpu.model, there.model)


# PyTorch takes the pretended device for "meta" here; the weights are copied all the same.
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_training_with_everything(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(400, 3)
    )
    include = torch.arange(48) > 5

    def work(device: Any) -> Any:
        examples = make_set().to(device)
        options: dict[str, Any] = {
            "start": network,
            "include": include.to(device),
            "checkpoints": tmp_path / str(device),
        }
        train(examples, replace(RECIPE, epochs=1), seed=0, **{**options, "checkpoints": None})
        train(examples, RECIPE, seed=0, **options)
        return train(examples, RECIPE, seed=0, **options)

    on_cpu, there = on_both(work)
    assert same(on_cpu.model, there.model)


@pytest.mark.parametrize("name", defenses.names())
def test_defenses(name: str) -> None:
    def work(device: Any) -> Any:
        return train(
            defense_cases.SETS["even"].to(device),
            defense_cases.recipe_for(name),
            seed=1,
            defense=defense_cases.make(name),
        )

    on_cpu, there = on_both(work)
    assert ours(there.model)
    assert on_cpu.dropped.tolist() == there.dropped.tolist()
    assert same(on_cpu.model, there.model)


@pytest.fixture(scope="module")
def victim() -> Any:
    return train(unlearner_cases.make_set(), unlearner_cases.RECIPE, seed=0)


@pytest.mark.parametrize("unlearner", unlearner_cases.CASES)
def test_unlearners(unlearner: Any, victim: Any) -> None:
    def work(device: Any) -> Any:
        model = replace(victim, model=victim.model.to(device))
        try:
            return unlearner.heal(model, unlearner_cases.make_set().to(device), unlearner_cases.FORGET)
        finally:
            victim.model.to("cpu")

    on_cpu, there = on_both(work)
    assert ours(there.model)
    assert same(on_cpu.model, there.model)


ATTACKS = [(name, kind) for name in attacks.names() for kind in attack_cases.goals_of(name)]


@pytest.mark.parametrize(("name", "kind"), ATTACKS)
def test_attacks(name: str, kind: str) -> None:
    def work(device: Any) -> Any:
        clean = attack_cases.SETS["colour"]
        surrogate = attack_cases.surrogate(clean).to(device)
        goal = attack_cases.GOALS[kind](clean)
        attack = attack_cases.quick(name)
        found = attack.craft(goal, clean.to(device), budget=Budget(share=0.1), surrogate=surrogate, seed=5)
        return found, goal.success(surrogate, clean.to(device)), found.apply(clean.to(device)).fingerprint

    (on_cpu, *rest), (there, *others) = on_both(work)
    assert torch.equal(on_cpu.indices, there.indices)
    assert torch.equal(on_cpu.images, there.images)
    assert rest == others


@pytest.mark.parametrize("case", detector_cases.CASES)
def test_detectors(case: str) -> None:
    def work(device: Any) -> Any:
        model, examples = detector_cases.MODELS["colour"], detector_cases.SETS["colour"]
        options = (
            {"reference": examples.to(device)} if detectors.describe(case.split()[0]).uses_reference else {}
        )
        try:
            return detector_cases.make(case).find(
                model.to(device), examples.to(device), detector_cases.observe("colour"), seed=3, **options
            )
        finally:
            model.to("cpu")

    on_cpu, there = on_both(work)
    assert on_cpu.flagged.tolist() == there.flagged.tolist()
    # The published damping of 1e-8 multiplies rounding: products of other layouts differ in their last bit.
    scale = float(on_cpu.scores.nan_to_num().abs().max())
    torch.testing.assert_close(on_cpu.scores, there.scores, rtol=1e-4, atol=5e-3 * scale, equal_nan=True)


class Layers(nn.Module):
    """Every kind of layer that the influence engine differentiates, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.layer_norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(nn.functional.relu_(self.norm(self.first(images))))
        logits: Tensor = self.head(self.layer_norm(maps.flatten(2).mean(2)))
        return logits


def test_the_influence_engine() -> None:
    network, task = Layers().eval(), ClassificationTask()

    def work(device: Any) -> Any:
        model, examples = network.to(device), make_set(24, side=6).to(device)
        try:
            queries = examples.batch(0, 3)
            found = []
            for factors in (fit_factors(model, examples, task, seed=0, batch_size=10), None):
                asked = precondition(model, factors, queries, task, combine=torch.ones(2, 3, device=device))
                scores = score(
                    model, asked, examples, task, gradient_norms=True, self_influence=factors is not None
                )
                found += [scores.values, scores.gradient_norms, scores.self_influence]
            loss = lambda model, batch: task.loss(model, batch)  # noqa: E731
            found.append(project(model, examples, loss, dimensions=8, seed=0).values)
            return found
        finally:
            network.to("cpu")

    for one, other in zip(*on_both(work), strict=True):
        assert one is other is None or torch.allclose(one, moved_to_cpu(other), rtol=1e-4, atol=1e-6)


def test_an_index_of_influences(tmp_path: Path) -> None:
    network = Layers().eval()

    def work(device: Any) -> Any:
        model, examples = network.to(device), make_set(24, side=6).to(device)
        try:
            folder = tmp_path / str(device)
            index = InfluenceIndex.build(folder, model, examples, batch_size=10, shard_examples=16, seed=0)
            queries = index.queries(model, examples.batch(0, 3), combine=torch.ones(2, 3, device=device))
            rows = torch.tensor([3, 20])
            found = [index.influence(queries), index.influence(queries, rows), index.cosines(rows)]
            return [*found, index.self_influence, index.gradient_norms(), index.values()]
        finally:
            network.to("cpu")

    for one, other in zip(*on_both(work), strict=True):
        assert torch.allclose(one, moved_to_cpu(other), rtol=1e-2, atol=1e-3 * float(one.abs().max()))


class Planted(Defense):
    """A defense with a mistake."""

    def __init__(self, mistake: Callable[[Tensor, Tensor], Any]) -> None:
        self.mistake = mistake

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        self.mistake(training_set.images.float(), training_set.labels)
        return alive


@pytest.mark.parametrize(
    "mistake",
    [
        lambda images, labels: images[labels.cpu()],
        lambda images, labels: images.index_select(0, labels.cpu()),
        lambda images, labels: images.cpu()[labels],
        lambda images, labels: images * torch.zeros(len(images), 1, 1, 1),
        lambda images, labels: torch.where(labels > 0, labels, torch.arange(len(labels))),
        lambda images, labels: torch.zeros(len(labels), 3).scatter_(1, labels[:, None], 1.0),
        lambda images, labels: nn.Linear(12, 2)(images),
        lambda images, labels: images.numpy(),
        lambda images, labels: torch.rand(images.shape, generator=torch.Generator(), device=images.device),
        lambda images, labels: images.normal_(generator=torch.Generator()),
        lambda images, labels: images.__setitem__(torch.tensor([0]), 0.0),
        lambda images, labels: torch.cat([images, torch.zeros(1, 3, 12, 12)]),
    ],
)
def test_a_planted_mistake_is_found(mistake: Callable[[Tensor, Tensor], Any]) -> None:
    recipe = Recipe(model="convnet", width=2, epochs=1, batch_size=24)
    if "Generator" not in mistake.__code__.co_names:
        train(make_set(), recipe, seed=0, defense=Planted(mistake))
    with pretended_accelerator(), pytest.raises(MixedDevices):
        train(make_set(), recipe, seed=0, device=DEVICE, defense=Planted(mistake))


def test_a_mistake_in_the_backward_pass_is_found() -> None:
    class InHook(Defense):
        def gradients(self, step: Step) -> tuple[Tensor, Tensor]:
            for parameter in step.model.parameters():
                parameter.register_hook(lambda gradient: gradient + torch.zeros(gradient.shape))
            return super().gradients(step)

    recipe = Recipe(model="convnet", width=2, epochs=1, batch_size=24)
    with pretended_accelerator(), pytest.raises(MixedDevices):
        train(make_set(), recipe, seed=0, device=DEVICE, defense=InHook())


def test_nothing_is_left_behind() -> None:
    generator, autocast = torch.Generator, torch.autocast
    with pretended_accelerator():
        tensor = torch.ones(3, device=DEVICE)
        assert tensor.device == DEVICE
        assert (tensor + 1).tolist() == [2.0, 2.0, 2.0]
        assert type(tensor.cpu()) is Tensor
    assert (torch.Generator, torch.autocast) == (generator, autocast)
    assert type(torch.ones(3) + 1) is Tensor
    with pytest.raises((RuntimeError, ModuleNotFoundError)):
        torch.ones(3, device=DEVICE)
