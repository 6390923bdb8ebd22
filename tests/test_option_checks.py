"""Options against their annotations and intervals."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

from unpoison._option_checks import CheckedOptions, Fraction, PositiveInt, check_options
from unpoison.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options:
    steps: int = 1
    rate: float = 0.5
    mode: Literal["slow", "fast"] = "slow"
    together: int | None = None
    flip: bool = True
    bases: tuple[int, ...] = ()
    classes: tuple[int | str, ...] = ()
    layer: str | None = None
    epochs: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_options("test", self, steps="[1, inf)", rate="(0, 1]", together="[1, inf)")


def test_what_fits_is_taken_and_lists_become_tuples() -> None:
    made: Any = Options(steps=3, rate=1, together=2, bases=[1, 2], classes="bag", layer="conv")  # type: ignore[arg-type]
    assert (made.bases, made.classes, made.rate) == ((1, 2), ("bag",), 1)
    assert hash(made) == hash(
        Options(steps=3, rate=1, together=2, bases=(1, 2), classes=("bag",), layer="conv")
    )


def test_numbers_of_numpy_and_torch_are_stored_as_pythons() -> None:
    made = Options(
        steps=np.int64(3),
        rate=np.float32(0.5),
        together=torch.tensor(2),
        flip=np.bool_(False),
        bases=[np.uint8(7)],
    )  # type: ignore[arg-type]
    assert (made.steps, made.rate, made.together, made.flip, made.bases) == (3, 0.5, 2, False, (7,))
    assert {type(made.steps), type(made.bases[0])} == {int}
    assert type(made.rate) is float
    json.dumps(asdict(made))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "test: steps must be a whole number of at least 1, found 0"),
        ({"steps": 1.0}, "steps must be a whole number of at least 1, found 1.0"),
        ({"steps": True}, "steps must be a whole number of at least 1, found True"),
        ({"rate": 0}, r"rate must be a number in \(0, 1\], found 0"),
        ({"rate": float("nan")}, r"rate must be a number in \(0, 1\], found nan"),
        ({"rate": "1"}, r"rate must be a number in \(0, 1\], found '1'"),
        ({"mode": "best"}, "mode must be one of 'slow', 'fast', found 'best'"),
        ({"together": 0}, "together must be a whole number of at least 1 or none, found 0"),
        ({"flip": 1}, "flip must be true or false, found 1"),
        ({"bases": [1, "a"]}, "bases must be a list, each entry a whole number, found"),
        ({"bases": 0.5}, "bases must be a list, each entry a whole number, found 0.5"),
        ({"classes": [None]}, "classes must be a list, each entry a whole number or text, found"),
        ({"layer": 3}, "layer must be text or none, found 3"),
        ({"steps": np.float64(2.0)}, "steps must be a whole number of at least 1, found"),
        ({"epochs": [1.5]}, "epochs must be a list, each entry a whole number or none, found"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Options(**options)


@dataclass(frozen=True, kw_only=True)
class Annotations(CheckedOptions):
    steps: PositiveInt = 1
    share: Fraction | None = None
    decay: Annotated[float, "(0, 1]"] = 1.0
    layers: Literal["all"] | PositiveInt = "all"


def test_intervals_are_read_from_annotations() -> None:
    made = Annotations(steps=np.int64(3), share=0, decay=0.5, layers=2)  # type: ignore[arg-type]
    assert (made.steps, type(made.steps), made.share, made.decay, made.layers) == (3, int, 0, 0.5, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "^Annotations: steps must be a whole number of at least 1, found 0"),
        ({"share": 1.5}, r"share must be a number in \[0, 1\] or none, found 1.5"),
        ({"decay": 0.0}, r"decay must be a number in \(0, 1\], found 0.0"),
        ({"layers": 0}, "layers must be one of 'all' or a whole number of at least 1, found 0"),
    ],
)
def test_intervals_of_annotations_are_kept(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Annotations(**options)
