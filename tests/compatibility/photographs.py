"""JPEG photographs of many sizes, traced from the command with a network of timm that takes small squares."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unpoison.data import Preparation, sample
from unpoison.detectors import Findings

FOLDER: Final = Path(__file__).parent
COMMAND: Final = (
    f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import torchvision_shim as shim; "
    "shim.without_cuda_operators(); from unpoison.cli import main; sys.exit(main(sys.argv[1:]))"
)


def take(folder: Path, count: int) -> None:
    """Write `count` files of 300 to 900 pixels: the bundled sample, enlarged and tinted, with noise.

    They lie in a folder for each class, and are called by their numbers: `3/0017.jpg`.
    """
    held, draws = sample().train, np.random.default_rng(0)
    for row in range(count):
        size = draws.integers(300, 901, 2)
        grey = Image.fromarray(held.images[row, 0].numpy()).resize((int(size[0]), int(size[1])))
        pixels = np.asarray(grey, np.float64)[..., None] * draws.uniform(0.4, 1, 3)
        pixels += draws.normal(0, 8, pixels.shape)
        place = folder / str(int(held.labels[row])) / f"{row:04}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place, quality=90)


def prepared(picture: Image.Image, size: int = 224) -> Tensor:
    """The transform: the middle square of 224 pixels, from -1 to 1."""
    pixels = torch.from_numpy(np.array(Preparation(size).apply(picture)))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def small(picture: Image.Image) -> Tensor:
    """The same with 32 pixels."""
    return prepared(picture, 32)


def trace(
    network: str, count: int, transform: str, *more: str
) -> tuple[float, dict[str, Any], int, list[bool]]:
    """`unpoison trace` of one photograph in a folder of others, by EK-FAC and with two workers.

    Returns:
        The seconds of the command, the results of its run.json, its peak memory, and of each flagged example
        whether its id is the name of its file.
    """
    with tempfile.TemporaryDirectory() as place:
        photos, suspect, found = (Path(place) / name for name in ("photos", "suspect.jpg", "found"))
        take(photos, count + 1)
        next(photos.rglob(f"{count:04}.jpg")).rename(suspect)
        words = ["trace", "--model", network, "--data", str(photos), "--suspect", str(suspect)]
        words += ["--transform", f"photographs:{transform}", "--workers", "2", "--held-share", "0"]
        words += ["--method", "ek-fac", *more, "--out", str(found)]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", COMMAND, *words], check=True)
        spent = time.perf_counter() - started
        results = json.loads((found / "run.json").read_text(encoding="utf-8"))["results"]
        named = [(photos / one).is_file() for one in results["flagged_ids"]]
        return spent, results, Findings.load(found / "findings").peak_bytes, named
