"""A recipe of seconds on 300 images of 12x12."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch

from unpoison.data import TrainingSet, write_npz

CLASSES = ("left", "middle", "right")


def images(n: int, seed: int, classes: tuple[str, ...] = CLASSES) -> TrainingSet:
    """Noise with a bright band, whose place is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(classes)
    pixels = torch.randint(0, 60, (n, 1, 12, 12), generator=generator, dtype=torch.uint8)
    width = 12 // len(classes)
    for label in range(len(classes)):
        pixels[labels == label, :, :, width * label : width * (label + 1)] += 120
    return TrainingSet(pixels, labels, classes, "tiny")


def write_recipe(folder: Path) -> Path:
    """Write tiny.npz and tiny.toml into the folder; gives the path of the recipe."""
    write_npz(folder / "tiny.npz", images(300, 0), images(60, 1))
    path = folder / "tiny.toml"
    path.write_text(
        textwrap.dedent(
            """
            name = "tiny"
            seeds = [0, 1]
            [data]
            source = "tiny.npz"
            [[attacks]]
            name = "badnets"
            budget = 0.1
            [targets]
            pairs = [["left", "right"]]
            [training]
            model = "resnet9"
            width = 4
            epochs = 3
            batch_size = 32
            learning_rate = 0.05
            [[detectors]]
            name = "ek-fac"
            options = { threshold = 0.0 }
            [[unlearners]]
            name = "fine-tune"
            options = { layers = 1, lose_classes = true }
            """
        )
    )
    return path
