"""Runs of craft, train and scan on a tiny set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unpoison.cli import main
from unpoison.data import TrainingSet, write_npz


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run directories `poison`, `model` and `found`, by name."""
    folder = tmp_path_factory.mktemp("runs")
    sets = []
    for seed, count in enumerate((120, 30)):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 3
        images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
        images += (80 * labels[:, None, None, None]).to(torch.uint8)
        sets.append(TrainingSet(images, labels, ("dark", "grey", "light"), "tiny"))
    write_npz(folder / "tiny.npz", *sets)
    data = ["--data", str(folder / "tiny.npz")]
    poison = ["--poison", str(folder / "poison")]
    craft = ["craft", "badnets", *data, "--source", "dark", "--target", "light", "--budget-count", "12"]
    assert main([*craft, "--out", str(folder / "poison")]) == 0
    small = ["--epochs", "1", "--model", "resnet9", "--width", "2"]
    assert main(["train", *data, *poison, *small, "--out", str(folder / "model")]) == 0
    model = ["--model", str(folder / "model"), *data, *poison, "--method", "spectral-signatures"]
    assert main(["scan", *model, "--out", str(folder / "found")]) == 0
    return {name: folder / name for name in ("poison", "model", "found")}
