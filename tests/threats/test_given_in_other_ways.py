"""Triggers, budgets and tables of poisons as other programs give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unpoison.attacks import BadNets
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.threats import (
    Backdoor,
    Budget,
    PatchTrigger,
    PoisonSet,
    read_poison_table,
    write_poison_table,
)

GREY = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)


def poisoned(**options: Any) -> tuple[TrainingSet, PoisonSet]:
    clean = TrainingSet(torch.full((30, 1, 8, 8), 90, dtype=torch.uint8), torch.arange(30) % 3, tuple("abc"))
    given = {"target": 1, "seed": 0, "budget": Budget(count=3), **options}
    goal = Backdoor(PatchTrigger.white_corner(), 0, given.pop("target"))
    return clean, BadNets().craft(goal, clean, **given)


@pytest.mark.parametrize("mode", ["LA", "L", "RGB", "RGBA", "P", "1"])
def test_a_patch_has_the_channels_of_its_file(tmp_path: Path, mode: str) -> None:
    Image.new("RGBA", (3, 3), (200, 200, 200, 255)).convert(mode).save(tmp_path / "patch.png")
    patch = PatchTrigger.from_image(tmp_path / "patch.png", row=-3, column=-3)
    assert patch.values.shape[0] == (1 if mode in ("LA", "L", "1") else 3)
    images = GREY.expand(1, patch.values.shape[0], 8, 8).clone()
    assert int(patch.stamp(images)[0, 0, -1, -1]) == (255 if mode == "1" else 200)
    assert patch.mask.unique().tolist() == [255]


def test_a_patch_of_16_bits_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[100, 256, 30000]], np.uint16)).save(tmp_path / "patch.png")
    with pytest.raises(InputError, match="16 bits a channel"):
        PatchTrigger.from_image(tmp_path / "patch.png", row=0, column=0)


def test_tensors_have_their_channels_first_and_arrays_last() -> None:
    values = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    for given in (values, values.permute(1, 2, 0).numpy()):
        patch = PatchTrigger.from_image(given, row=0, column=0)
        assert torch.equal(patch.values, values)
    with_alpha = torch.cat([values[:1], torch.full((1, 4, 4), 128, dtype=torch.uint8)])
    patch = PatchTrigger.from_image(with_alpha, row=0, column=0)
    assert torch.equal(patch.values, values[:1])
    assert patch.mask.unique().tolist() == [128]


@pytest.mark.parametrize(
    "options",
    [
        {"target": np.int64(1)},
        {"seed": np.int64(3)},
        {"budget": Budget(share=np.float32(0.1))},  # type: ignore[arg-type]
        {"budget": Budget(count=np.int64(3))},  # type: ignore[arg-type]
        {"budget": Budget(count=torch.tensor(3))},  # type: ignore[arg-type]
    ],
)
def test_numbers_of_numpy_are_stored_as_numbers(tmp_path: Path, options: dict[str, Any]) -> None:
    clean, poison = poisoned(**options)
    poison.save(tmp_path / "poison")
    loaded = PoisonSet.load(tmp_path / "poison")
    assert torch.equal(loaded.apply(clean).images, poison.apply(clean).images)
    assert isinstance(loaded.goal, Backdoor)
    assert loaded.goal.target == 1


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda text: text.replace(b"\r\n", b"\n"), id="LF"),
        pytest.param(lambda text: b"\xef\xbb\xbf" + text, id="byte-order mark"),
        pytest.param(lambda text: text.replace(b"/", b"\\"), id="backslashes"),
        pytest.param(lambda text: text.replace(b",", b";"), id="semicolons"),
        pytest.param(lambda text: text.replace(b",", b", "), id="spaces"),
        pytest.param(lambda text: text + b"\r\n", id="a blank line at the end"),
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path: Path, edit: Callable[[bytes], bytes]) -> None:
    clean, poison = poisoned()
    write_poison_table(tmp_path / "table", poison)
    file = tmp_path / "table" / "poisons.csv"
    file.write_bytes(edit(file.read_bytes()))
    read = read_poison_table(tmp_path / "table", clean, goal=poison.goal)
    assert torch.equal(read.apply(clean).images, poison.apply(clean).images)


def test_a_table_names_no_file_outside_its_folder(tmp_path: Path) -> None:
    clean, poison = poisoned()
    write_poison_table(tmp_path / "table", poison)
    file = tmp_path / "table" / "poisons.csv"
    for outside in (b"..\\images", b"C:\\images", b"\\images"):
        text = file.read_bytes()
        file.write_bytes(text.replace(b"images", outside, 1))
        with pytest.raises(InputError, match="must lie inside the folder"):
            read_poison_table(tmp_path / "table", clean, goal=poison.goal)
        file.write_bytes(text)
