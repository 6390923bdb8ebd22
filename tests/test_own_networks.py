"""Networks as people have them, from the first verb to the last: an answer, or one line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unpoison
from unpoison.data import TensorExamples, TrainingSet
from unpoison.errors import InputError
from unpoison.tasks import ClassificationTask
from unpoison.training import Recipe

IMAGES = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
EXAMPLES = TrainingSet(IMAGES, torch.arange(40) % 4, tuple("abcd"))
TRACERS = ("ek-fac", "trak", "delta-influence")


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


class Probe(nn.Module):
    """A body without gradients and a head."""

    def __init__(self, *, detach: bool) -> None:
        super().__init__()
        self.body, self.head, self.detach = nn.Linear(64, 16), nn.Linear(16, 4), detach

    def forward(self, images: Tensor) -> Tensor:
        if self.detach:
            return self.head(self.body(images.flatten(1)).relu().detach())
        with torch.no_grad():
            hidden = self.body(images.flatten(1)).relu()
        return self.head(hidden)


@pytest.mark.parametrize("method", TRACERS)
def test_a_body_under_no_grad_is_as_one_that_is_detached(method: str) -> None:
    found = [
        unpoison.trace(
            drawn(lambda detach=detach: Probe(detach=detach)),
            EXAMPLES,
            unpoison.Observation(IMAGES[0]),
            method=method,
        )
        for detach in (False, True)
    ]
    torch.testing.assert_close(found[0].scores, found[1].scores)
    if method != "trak":
        assert found[0].untracked == ("body.weight", "body.bias")
        assert found[0].tracked_share == pytest.approx(68 / (68 + 64 * 16 + 16))
        assert "6.1 % of the model's parameters" in found[0].summary or method == "delta-influence"


class Wrapped(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.make = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten()), make
        self.head = nn.Linear(256, 4)

    def forward(self, images: Tensor) -> Any:
        return self.make(self.head(self.net(images)))


FORMS: dict[str, tuple[Callable[[Tensor], Any], torch.dtype, Any]] = {
    "tuple": (lambda z: (z, z.sum()), torch.float32, nullcontext),
    "mapping": (lambda z: {"logits": z, "features": z}, torch.float32, nullcontext),
    "float64": (lambda z: z, torch.float64, nullcontext),
    "bfloat16": (lambda z: z, torch.bfloat16, nullcontext),
    "float16": (lambda z: z, torch.float16, nullcontext),
    "inference mode": (lambda z: z, torch.float32, torch.inference_mode),
    "autocast": (lambda z: z, torch.float32, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_a_network_changes_no_result(form: str) -> None:
    make, dtype, mode = FORMS[form]
    plain, other = drawn(lambda: Wrapped(lambda z: z)), drawn(lambda: Wrapped(make)).to(dtype)
    observation = unpoison.Observation(IMAGES[1], int(plain(IMAGES[1:2].float() / 255).argmax()))
    rounding = 0.3 if dtype.itemsize == 2 else 1e-3
    for verb in (
        lambda network: unpoison.trace(network, EXAMPLES, observation, method="ek-fac"),
        lambda network: unpoison.scan(network, EXAMPLES, method="spectral-signatures"),
    ):
        expected = verb(plain).scores.double()
        with mode():
            found = verb(other).scores.double()
        assert float((found - expected).abs().max() / expected.abs().max()) < rounding


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_done_is_one_line() -> None:
    observation = unpoison.Observation(IMAGES[1])
    for make, words in (
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)), "3 channels"),
        (lambda: torch.jit.trace(Wrapped(lambda z: z), IMAGES[:2].float()), "TorchScript"),
        (lambda: Wrapped(lambda z: z.softmax(1)), "probabilities"),
        (lambda: Wrapped(lambda z: {"a": z, "b": z}), "output="),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), "lazy"),
    ):
        network = drawn(make)
        for verb in (
            lambda model: unpoison.trace(model, EXAMPLES, observation, method="ek-fac"),
            lambda model: unpoison.heal(model, EXAMPLES, [1], method="ssd"),
        ):
            with pytest.raises(InputError, match=words) as error:
                verb(network)
            assert "\n" not in str(error.value)


def test_verbs_are_told_where_the_logits_are() -> None:
    plain = drawn(lambda: Wrapped(lambda z: z))
    other = drawn(lambda: Wrapped(lambda z: {"a": -z, "b": z.softmax(1)}))
    task = ClassificationTask(output="b", values="probabilities")
    observation = unpoison.Observation(IMAGES[1])
    expected = unpoison.trace(plain, EXAMPLES, observation, method="ek-fac").scores
    found = unpoison.trace(other, EXAMPLES, observation, method="ek-fac", task=task).scores
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    healed = unpoison.heal(other, EXAMPLES, [1, 2], method="ssd", task=task)
    assert isinstance(healed.model, Wrapped)
    assert unpoison.measure(other, EXAMPLES, task=task) == unpoison.measure(plain, EXAMPLES)


@pytest.mark.parametrize("method", ["ssd", "potion", "fine-tune"])
def test_inputs_that_are_no_images_are_healed(method: str) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(20, 6), nn.Linear(6, 2)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.head((self.table(ids) * mask[..., None]).sum(1))

    ids = torch.randint(0, 20, (30, 5), generator=torch.Generator().manual_seed(1))
    labels = (ids.sum(1) > 47).long()
    examples = TensorExamples({"ids": ids, "mask": torch.ones(30, 5)}, labels)
    network = drawn(Bag).double()
    network.table.weight.requires_grad_(False)
    recipe = Recipe(epochs=4, batch_size=8, learning_rate=0.1) if method == "fine-tune" else None
    unlearner = unpoison.unlearners.get(method, **({"selection": 1.0} if method == "ssd" else {}))
    healed = unpoison.heal(network, examples, [3, 4, 9], method=unlearner, recipe=recipe)
    after, before = healed.model.state_dict(), network.state_dict()
    assert torch.equal(after["table.weight"], before["table.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert after["head.weight"].dtype == torch.float64
    again = unpoison.heal(network, examples, [3, 4, 9], method=unlearner, recipe=recipe)
    assert torch.equal(again.model.state_dict()["head.weight"], after["head.weight"])
