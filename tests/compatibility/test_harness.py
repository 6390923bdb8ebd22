"""What the harness calls a result, a refusal and a failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import compat_harness
import pytest
import torch
from compat_datasets import convolution, of_pictures
from compat_harness import WORKS, Case, Kind, Outcome, Refused, Works, run
from torch import Tensor, nn

from unpoison.errors import InputError


def kind(open: Callable[[Tensor, Tensor], Any], **more: Any) -> Kind:
    def build(folder: Path) -> Case:
        return of_pictures(open, **more)

    return Kind(name="a kind", build=build)


def raising(error: BaseException) -> Kind:
    def open(images: Tensor, labels: Tensor) -> Any:
        raise error

    return kind(open)


def pairs(images: Tensor, labels: Tensor) -> Any:
    return [(image, int(label)) for image, label in zip(images, labels, strict=True)]


def test_a_right_result_works() -> None:
    assert run(kind(pairs), "trace") == Outcome("works")


def test_a_wrong_result_fails() -> None:
    outcome = run(kind(lambda images, labels: pairs(images.flip(0), labels)), "scan")
    assert outcome.outcome == "fails"
    assert "plain form" in outcome.words


def test_an_error_of_one_line_is_a_refusal() -> None:
    assert run(raising(InputError("photos: no such folder")), "scan").outcome == "refused"


@pytest.mark.parametrize("error", [KeyError("label"), RuntimeError("shapes")])
def test_any_other_error_fails(error: Exception) -> None:
    assert run(raising(error), "scan").outcome == "fails"


def test_a_changed_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = compat_harness.unpoison.scan

    def careless(model: nn.Module, *arguments: Any, **named: Any) -> Any:
        model.train()
        return scan(model, *arguments, **named)

    monkeypatch.setattr(compat_harness.unpoison, "scan", careless)
    assert run(kind(pairs), "scan").words == "wrong: the mode of the given model was changed"


def test_what_takes_too_long_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat_harness, "SECONDS", 1)

    def endless(images: Tensor, labels: Tensor) -> Any:
        while True:
            pass

    assert "no answer" in run(kind(endless), "scan").words


def test_a_kind_names_the_package_that_it_lacks() -> None:
    def build(folder: Path) -> Case:
        raise NotImplementedError

    assert Kind(name="a kind", build=build, needs=("torch",)).absent() is None
    assert Kind(name="a kind", build=build, needs=("torch", "no_such_package")).absent() == "no_such_package"


def test_what_is_expected() -> None:
    refused = Outcome("refused", "row 7: is missing")
    assert refused.meets(Refused("ROW 7"))
    assert refused.meets((Works(), Refused("row")))
    assert not refused.meets(Refused("row 8"))
    assert not refused.meets(WORKS)
    assert not Outcome("fails", "row 7").meets(Refused("row 7"))


def test_the_plain_form_looks_inputs_up() -> None:
    inputs = torch.rand(5, 3, 8, 8)
    network = convolution()
    numbers = torch.arange(5, dtype=torch.uint8)[:, None, None, None].float() / 255
    assert torch.allclose(compat_harness.LookedUp(network, (inputs,))(numbers), network(inputs), atol=1e-6)
