"""Seeds, and JSON of numbers that are not Python's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from unpoison._artefacts import write_json
from unpoison._seeds import as_seed
from unpoison.errors import InputError


def test_seeds_are_whole_numbers_of_any_kind() -> None:
    assert [as_seed(value) for value in (3, np.int64(3), torch.tensor(3), -1)] == [3, 3, 3, -1]
    assert type(as_seed(np.int64(3))) is int
    with pytest.raises(InputError, match=r"seed must be a whole number, found 1\.5"):
        as_seed(1.5)


def test_json_holds_the_numbers_of_numpy_as_numbers(tmp_path: Path) -> None:
    value = {"count": np.int64(3), "rate": np.float32(0.5), "one": torch.tensor(2)}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == {"count": 3, "rate": 0.5, "one": 2}
    with pytest.raises(TypeError, match="ndarray cannot be written as JSON"):
        write_json(tmp_path / "a.json", {"many": np.zeros(2)})
