"""Healing on examples that are no 8-bit images: every method that goes on from the model's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import unpoison
from unpoison import unlearners
from unpoison.data import DatasetExamples, Examples, TensorExamples, TrainingSet
from unpoison.errors import InputError
from unpoison.tasks import ClassificationTask
from unpoison.training import Recipe
from unpoison.unlearners import SCRUB, BestOf, Relabel, Unlearner

FORGET = [3, 0, 7]
LABELS = torch.arange(60) % 3
METHODS: dict[str, Unlearner] = {
    "fine-tune": unlearners.get("fine-tune"),
    "relabel": unlearners.get("relabel"),
    "relabel, not always": unlearners.get("relabel", always_relabel=False),
    "ssd": unlearners.get("ssd", selection=1.0, dampening=0.5),
    "ssd, chosen": unlearners.get("ssd", selection=None),
    "potion": unlearners.get("potion", step=10.0),
    "scrub": unlearners.get("scrub", learning_rate=0.01),
    "scrub, rewound": unlearners.get("scrub", learning_rate=0.01, rewind=True, ascent="loss"),
    "bad-teaching": unlearners.get("bad-teaching", learning_rate=0.01),
    "nad": unlearners.get("nad", epochs=1),
    "fine-pruning": unlearners.get("fine-pruning", epochs=1),
    "i-bau": unlearners.get("i-bau", rounds=1),
    "best-of": BestOf(candidates=(SCRUB(learning_rate=0.01), Relabel()), tolerance=1.0),
}


def made(*layers: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(*layers)
        for layer in network:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    return network.eval()


class Read(nn.Module):
    """Takes a mapping and returns one, in which no name is known."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self.table(tokens) * mask[..., None]
        return {"features": hidden, "answers": self.head(hidden.sum(1) / mask.sum(1, keepdim=True))}


def cases() -> dict[str, tuple[nn.Module, Examples, ClassificationTask | None]]:
    draw = torch.Generator().manual_seed(1)
    vectors = torch.randn(60, 5, generator=draw, dtype=torch.float64) * 9
    volumes = torch.randn(60, 1, 4, 6, 6, generator=draw)
    tokens = torch.randint(0, 9, (60, 5), generator=draw)
    mask = (torch.rand(60, 5, generator=draw) < 0.7).float()
    mask[:, 0] = 1

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 60

        def __getitem__(self, index: int) -> Any:
            return {"tokens": tokens[index], "mask": mask[index], "label": int(LABELS[index])}

    def collated(rows: list[Any]) -> dict[str, Any]:
        parts = {name: torch.stack([row[name] for row in rows]) for name in ("tokens", "mask")}
        return {"both": parts, "label": [row["label"] for row in rows]}

    named = DatasetExamples(Rows(), collate_fn=collated, inputs="both", labels="label")
    return {
        "vectors": (
            made(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double(),
            DatasetExamples(TensorDataset(vectors, LABELS), memory_bytes=0),
            None,
        ),
        "volumes in memory": (
            made(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4 * 2 * 4 * 4, 3)),
            TensorExamples(volumes, LABELS),
            None,
        ),
        "mappings": (made(Read()), named, ClassificationTask(output="answers")),
    }


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


@pytest.mark.parametrize("kind", ["vectors", "volumes in memory", "mappings"])
@pytest.mark.parametrize("name", METHODS)
def test_any_inputs_are_healed(name: str, kind: str) -> None:
    network, examples, task = cases()[kind]
    if kind == "mappings":
        network = network[0]  # type: ignore[index]
        if name == "i-bau":
            with pytest.raises(InputError, match="which must be a tensor of floats"):
                unpoison.heal(network, examples, FORGET, method=METHODS[name], task=task)
            return
    before = {key: value.clone() for key, value in network.state_dict().items()}
    healed = unpoison.heal(network, examples, FORGET, method=METHODS[name], task=task, seed=2)
    again = unpoison.heal(network, examples, FORGET, method=METHODS[name], task=task, seed=2)
    after = healed.model.state_dict()
    assert list(after) == list(before)
    assert {key: value.dtype for key, value in after.items()} == {
        key: value.dtype for key, value in before.items()
    }
    assert bool(weights(healed.model).isfinite().all())
    assert torch.equal(weights(healed.model), weights(again.model))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    # Dampening may find nothing to dampen, and the best may be the model itself.
    if not name.startswith(("ssd", "potion", "best-of")):
        assert not torch.equal(weights(healed.model), weights(network))
    assert type(healed.model) is type(network)


@pytest.mark.parametrize("name", METHODS)
def test_a_dataset_gives_what_the_same_images_in_memory_give(name: str) -> None:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (60, 1, 6, 6), dtype=torch.uint8, generator=draw)
    held = TrainingSet(images, LABELS, ("a", "b", "c"), "drawn")
    read = DatasetExamples(TensorDataset(images.float() / 255, LABELS), memory_bytes=0, workers=0)
    network = made(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    one, other = (METHODS[name].heal(network, examples, FORGET, seed=4) for examples in (held, read))
    torch.testing.assert_close(weights(one.model), weights(other.model), rtol=1e-4, atol=1e-5)
    assert [record.examples for record in one.history] == [record.examples for record in other.history]


def test_batches_are_read_ahead_by_workers() -> None:
    network, examples, _ = cases()["vectors"]
    ahead = DatasetExamples(examples.source.dataset, memory_bytes=0, workers=2)  # type: ignore[attr-defined]
    one, other = (SCRUB(epochs=1, batch_size=16).heal(network, each, FORGET) for each in (examples, ahead))
    assert torch.equal(weights(one.model), weights(other.model))


def test_what_needs_8_bit_images_says_so() -> None:
    network, examples, _ = cases()["vectors"]
    recipe = Recipe(epochs=1)
    with pytest.raises(InputError, match="retrain: works on 8-bit images in memory"):
        unlearners.get("retrain").heal(network, examples, FORGET, recipe=recipe)
    both = BestOf(candidates=(unlearners.get("retrain"), Relabel()))
    with pytest.raises(InputError, match=r"best-of|BestOf: works on 8-bit images in memory"):
        both.heal(network, examples, FORGET, recipe=recipe)


@pytest.mark.parametrize("name", ["fine-tune", "relabel", "scrub", "bad-teaching"])
def test_batch_norm_that_is_given_in_eval_mode_stays_so(name: str) -> None:
    network, examples, _ = cases()["vectors"]
    norm = network[1]  # type: ignore[index]
    norm.running_mean.fill_(0.5)
    network.train()
    norm.eval()
    healed = METHODS[name].heal(network, examples, FORGET)
    assert torch.equal(healed.model[1].running_mean, norm.running_mean)  # type: ignore[index]
    assert network.training
    assert not norm.training
    usual = METHODS[name].heal(network.eval(), examples, FORGET)
    assert not torch.equal(usual.model[1].running_mean, norm.running_mean)  # type: ignore[index]


@pytest.mark.parametrize("name", ["fine-tune", "relabel"])
def test_so_it_does_where_our_trainer_trains(name: str) -> None:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (60, 1, 6, 6), dtype=torch.uint8, generator=draw)
    held = TrainingSet(images, LABELS, ("a", "b", "c"), "drawn")
    network = made(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    recipe = Recipe(epochs=4, batch_size=20, learning_rate=0.05)
    norm = network.train()[1].eval()  # type: ignore[index]
    healed = METHODS[name].heal(network, held, FORGET, recipe=recipe).model
    assert torch.equal(healed[1].running_mean, norm.running_mean)  # type: ignore[index]
    assert not torch.equal(healed[0].weight, network[0].weight)  # type: ignore[index]
    usual = METHODS[name].heal(network.eval(), held, FORGET, recipe=recipe).model
    assert not torch.equal(usual[1].running_mean, norm.running_mean)  # type: ignore[index]


def test_by_a_recipe_other_inputs_are_trained_on_as_it_says() -> None:
    """The groups of a recipe's optimiser, and its schedule within an epoch."""
    network, examples, _ = cases()["vectors"]
    network = made(nn.Linear(5, 3)).double()
    recipe = Recipe(
        epochs=4,
        batch_size=100,
        learning_rate=0.01,
        bias_learning_rate_factor=4.0,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.1,
        decay_norm_and_bias=False,
    )
    healed = unlearners.get("fine-tune").heal(network, examples, FORGET, recipe=recipe)
    weight, bias = (one.detach().clone() for one in network.parameters())
    rows = [row for row in range(60) if row not in FORGET]
    inputs, labels = examples.at(rows)
    for epoch in range(2):  # half of the epochs, twice the rate, cosine
        rate = 0.02 * (1 + torch.cos(torch.tensor((epoch + 0.5) / 2 * torch.pi)).item()) / 2
        weight.requires_grad_(), bias.requires_grad_()
        loss = nn.functional.cross_entropy(inputs @ weight.t() + bias, labels)
        of_weight, of_bias = torch.autograd.grad(loss, (weight, bias))
        weight = (weight - rate * (of_weight + 0.1 * weight)).detach()
        bias = (bias - 4 * rate * of_bias).detach()
        assert healed.history[epoch].learning_rate == pytest.approx(rate)
    torch.testing.assert_close(healed.model[0].weight.detach(), weight)  # type: ignore[index]
    torch.testing.assert_close(healed.model[0].bias.detach(), bias)  # type: ignore[index]
