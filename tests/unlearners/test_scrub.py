from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unpoison import unlearners
from unpoison.data import TrainingSet
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.training import Recipe
from unpoison.unlearners import SCRUB
from unpoison.unlearners._student import soft_divergence
from unpoison.unlearners.scrub import error_on_labels_of

RECIPE = Recipe(model="convnet", width=2, epochs=1, batch_size=16, learning_rate=0.05)
FORGET = [1, 3, 5]


def make_set() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(40) % 2, ("a", "b"), "drawn")


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))


def kullback_leibler(logits: torch.Tensor, told: torch.Tensor, temperature: float) -> torch.Tensor:
    total = torch.zeros(())
    for student, teacher in zip(logits, told, strict=True):
        p = (teacher / temperature).softmax(0)
        q = (student / temperature).softmax(0)
        total = total + (p * (p / q).log()).sum()
    return total / len(logits) * temperature**2


def test_the_divergence_is_that_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, told = torch.randn(2, 5, 4, generator=generator)
    for temperature in (1.0, 4.0):
        expected = kullback_leibler(logits, told, temperature)
        found = soft_divergence(logits, told, temperature).mean() * temperature**2
        torch.testing.assert_close(found.float(), expected)


@pytest.mark.parametrize("ascent", ["divergence", "loss"])
def test_ascent_and_descent_alternate(network: nn.Module, ascent: Any) -> None:
    examples = make_set()
    method = SCRUB(
        epochs=3,
        ascent_epochs=2,
        learning_rate=0.05,
        gamma=0.9,
        alpha=0.3,
        batch_size=100,
        forget_batch_size=100,
        ascent=ascent,
    )
    # With one batch a pass the order of the examples does not matter, so the steps can be written down.
    student = copy.deepcopy(network)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    kept, poison = examples.without(FORGET).batch(0, 37), examples.subset(FORGET).batch(0, 3)

    def divergence(images: torch.Tensor) -> torch.Tensor:
        return kullback_leibler(student(images), network(images).detach(), 4.0)

    def total_loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 0.9 * F.cross_entropy(student(images), labels) + 0.3 * divergence(images)

    for turn in ("up", "down", "up", "down", "down"):
        if turn == "down":
            loss = total_loss(*kept)
        else:
            loss = -(divergence(poison[0]) if ascent == "divergence" else total_loss(*poison))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    healed = method.heal(network, examples, FORGET, recipe=RECIPE)
    for name, value in healed.model.state_dict().items():
        torch.testing.assert_close(value, student.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_steps_are_counted_over_both_sets(network: nn.Module) -> None:
    method = SCRUB(epochs=9, ascent_epochs=9, batch_size=8, forget_batch_size=2, steps=9)
    seen = method.heal(network, make_set(), FORGET, recipe=RECIPE).history
    # One step up (the third example joins the two) and five down, then one up and two down.
    assert [record.examples for record in seen] == [37, 16]
    ascending = SCRUB(epochs=9, ascent_epochs=9, forget_batch_size=1, batch_size=8, steps=2)
    assert len(ascending.heal(network, make_set(), FORGET, recipe=RECIPE).history) == 1


def test_batch_norm_does_not_learn_from_what_is_to_be_forgotten() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    seen: list[tuple[int, bool]] = []
    network[2].register_forward_hook(
        lambda module, inputs, output: seen.append((len(inputs[0]), module.training))
    )
    SCRUB(epochs=1, ascent_epochs=1, batch_size=100).heal(network, make_set(), FORGET, recipe=RECIPE)
    student = {entry for entry in seen if entry not in ((2, False), (37, False), (40, False))}
    assert student == {(3, False), (37, True)}


def test_it_rewinds_with_held_out_examples(network: nn.Module) -> None:
    examples = make_set()
    plain = SCRUB(epochs=4, ascent_epochs=4, learning_rate=0.1, batch_size=8)
    rewound = SCRUB(epochs=4, ascent_epochs=4, learning_rate=0.1, batch_size=8, rewind=True)
    healed = rewound.heal(network, examples, FORGET, recipe=RECIPE)
    assert len(healed.history) == 4
    assert {record.examples for record in healed.history} == {37 - 3}
    assert (
        healed.training_fingerprint
        == plain.heal(network, examples, FORGET, recipe=RECIPE).training_fingerprint
    )


def test_the_error_to_compare_with_is_of_the_same_labels() -> None:
    class Always(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1.0, 0.0]).expand(len(images), 2)

    examples = make_set()
    assert error_on_labels_of(Always(), examples, examples.subset([0, 2])) == 0.0
    assert error_on_labels_of(Always(), examples, examples.subset([1, 3])) == 1.0
    assert error_on_labels_of(Always(), examples, examples.subset([0, 1, 3, 5])) == pytest.approx(0.75)
    assert error_on_labels_of(Always(), examples.subset([1]), examples.subset([0])) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_of_examples_that_are_fit_has_the_gradient_of_float64(dtype: torch.dtype) -> None:
    """Student and teacher give the label 1 - 1e-12 and 1 - 5e-12; in float32 both probabilities are 1."""
    logits = torch.tensor([[28.0, 0.0, -2.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[26.0, 0.0, -1.0]], dtype=dtype)
    soft_divergence(logits, teacher, 1.0).sum().backward()
    rows = [row[0].double().tolist() for row in (logits.detach(), teacher)]
    p, q = ([math.exp(value) / math.fsum(map(math.exp, row)) for value in row] for row in rows)
    expected = [0.0, p[1] - q[1], p[2] - q[2]]
    expected[0] = -math.fsum(expected)
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx(expected, rel=1e-3 if dtype == torch.float32 else 1e-2)


def test_the_settings_of_the_paper_and_of_the_comparison() -> None:
    assert (SCRUB().learning_rate, SCRUB().ascent_epochs, SCRUB().epochs) == (5e-4, 2, 3)
    assert (
        unlearners.get("scrub", preset="small-scale").epochs,
        unlearners.get("scrub", preset="small-scale").alpha,
    ) == (10, 0.5)
    compared = unlearners.get("scrub", preset="published")
    assert (compared.steps, compared.ascent, compared.learning_rate) == (40, "loss", 0.025)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"ascent_epochs": -1}, "ascent_epochs must be a whole number of at least 0"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2"),
        ({"steps": 0}, "steps must be a whole number of at least 1 or none"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, found 0"),
        ({"temperature": math.inf}, "temperature must be a number above 0, found inf"),
        ({"alpha": -1}, "alpha must be a number of at least 0, found -1"),
        ({"momentum": 1}, r"momentum must be a number in \[0, 1\), found 1"),
        ({"ascent": "both"}, "one of 'divergence', 'loss'"),
    ],
    ids=str,
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SCRUB(**options)


def test_divergence_is_reported(network: nn.Module) -> None:
    method = SCRUB(learning_rate=1e30, epochs=3, ascent="loss")
    with pytest.raises(TrainingDivergedError, match=r"scrub: diverged: .* lower learning_rate") as error:
        method.heal(network, make_set(), FORGET, recipe=RECIPE)
    assert "\n" not in str(error.value)
