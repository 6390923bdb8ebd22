"""Networks that cannot be read are refused in one line; those whose output is unclear can be told about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison.errors import InputError
from unpoison.models import check_network, check_outputs, logits_of, usual_mode
from unpoison.tasks import ClassificationTask

INPUTS = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


REFUSED: dict[str, tuple[Any, str]] = {
    "no module": (lambda images: images, "expected a torch.nn.Module, found function"),
    "TorchScript": (lambda: torch.jit.trace(nn.Linear(6, 3), INPUTS), "TorchScript.*Python network"),
    "exported": (lambda: torch.export.export(nn.Linear(6, 3), (INPUTS,)).module(), "exported program"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "module 0 is lazy.*on one batch"),
    "empty": (lambda: nn.Flatten(), "has no parameters"),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)),
        "module 1 is batch norm without running statistics",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(kind: str) -> None:
    make, words = REFUSED[kind]
    with pytest.raises(InputError, match=words) as error:
        check_network(make if kind == "no module" else make())
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantised_layers_can_be_read_but_not_differentiated() -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    quantised = nn.Sequential(
        torch.ao.quantization.quantize_dynamic(nn.Sequential(network[0]), {nn.Linear}, torch.qint8),
        network[1],
    )
    with pytest.raises(InputError, match=r"module 0\.0 is quantised"):
        check_network(quantised)
    check_network(quantised, gradients=False)


class Answers(nn.Module):
    """What `make` makes of three logits, or of one."""

    def __init__(self, make: Any, logits: int = 3) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(6, logits), make

    def forward(self, inputs: Tensor) -> Any:
        return self.make(self.linear(inputs))


def test_probabilities_are_noticed_and_can_be_told_about() -> None:
    for network, classes in (
        (Answers(lambda z: z.softmax(1)), 3),
        (Answers(lambda z: {"logits": z.softmax(1)}), 3),
        (Answers(lambda z: z.sigmoid(), 1), 2),
        (Answers(lambda z: z.sigmoid()[:, 0], 1), 2),
    ):
        with pytest.raises(InputError, match="probabilities"):
            check_outputs(network, INPUTS, classes=classes)
        for values in ("logits", "probabilities"):
            told = ClassificationTask(values=values).adapted(network)
            check_outputs(told, INPUTS, classes=classes)
        plain = Answers(lambda z: z, network.linear.out_features)
        plain.load_state_dict(network.state_dict())
        expected = logits_of(plain, INPUTS).log_softmax(1)
        torch.testing.assert_close(logits_of(told, INPUTS), expected, rtol=1e-4, atol=1e-5)
    for network in (Answers(lambda z: z), Answers(lambda z: z.log_softmax(1)), Answers(lambda z: z[:, :2])):
        check_outputs(network, INPUTS, classes=2)


def test_one_logit_stands_for_two_classes() -> None:
    for make in (lambda z: z, lambda z: z[:, 0]):
        network = Answers(make, 1)
        logits = logits_of(network, INPUTS)
        assert logits.shape == (16, 2)
        labels = torch.arange(16) % 2
        task, batch = ClassificationTask(), (INPUTS, labels)
        expected = nn.functional.binary_cross_entropy_with_logits(
            network.linear(INPUTS)[:, 0], labels.float(), reduction="none"
        )
        torch.testing.assert_close(task.loss(network, batch), expected)


def test_the_logits_can_be_named() -> None:
    network = Answers(lambda z: {"a": z, "b": 2 * z})
    with pytest.raises(InputError, match=r"output=\.\.\."):
        logits_of(network, INPUTS)
    task = ClassificationTask(output="a")
    assert torch.equal(task.logits(network, INPUTS), network.linear(INPUTS))
    assert torch.equal(logits_of(task.adapted(network), INPUTS), network.linear(INPUTS))
    last = Answers(lambda z: (0 * z, 2 * z))
    assert torch.equal(ClassificationTask(output=1).logits(last, INPUTS), 2 * last.linear(INPUTS))
    with pytest.raises(InputError, match="no 'c'"):
        ClassificationTask(output="c").logits(network, INPUTS)


def test_too_few_logits_and_rows_are_refused() -> None:
    with pytest.raises(InputError, match="gives 3 logits for 4 classes"):
        check_outputs(Answers(lambda z: z), INPUTS, classes=4)
    with pytest.raises(InputError, match="returns 15 rows of logits for 16 inputs"):
        check_outputs(Answers(lambda z: z[1:]), INPUTS, classes=3)
    with pytest.raises(InputError, match=r"outputs of shape \(2, 3\)"):
        check_outputs(Answers(lambda z: torch.stack([z, z], 1)), INPUTS, classes=3)
    assert logits_of(Answers(lambda z: z[:, :, None, None]), INPUTS).shape == (16, 3)


def test_inputs_by_name() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3).double()

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return (self.table(ids) * mask[..., None]).sum(1)

    ids, mask = torch.arange(10).view(2, 5) % 5, torch.ones(2, 5)
    found = logits_of(Masked(), {"mask": mask, "ids": ids})
    assert found.shape == (2, 3)
    assert found.dtype == torch.float64
    with pytest.raises(InputError, match="fails on mask"):
        logits_of(Masked(), {"mask": mask, "id": ids})


def test_the_usual_mode_is_independent_of_the_callers() -> None:
    network = nn.Linear(6, 3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        with usual_mode(torch.device("cpu")), torch.enable_grad():
            output = network(INPUTS)
        assert output.dtype == torch.float32
        assert output.requires_grad
        assert network(INPUTS).dtype == torch.bfloat16
