"""Training speed: ours against the plain loop that people write, in one run on the same machine and threads.

Both train the same network by the same recipe for one epoch on the same images. The plain loop is a torch
`DataLoader` over a map-style dataset of PIL images that flips, pads, crops, converts and standardises one
image at a time, with 0 and with 2 worker processes (the faster of the two counts), and a contiguous network
under `torch.optim.SGD` as it comes. Each side is run several times, in turn, and its fastest run counts.

    python -m benchmarks.training --json

prints one JSON object last and keeps it as benchmarks/results/training.json (not with --no-write). About a
minute on two cores. Set OMP_NUM_THREADS to choose the threads.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from unpoison.data import TrainingSet, sample
from unpoison.models import build
from unpoison.training import Recipe, train

RESULTS = Path(__file__).parent / "results" / "training.json"


class PlainDataset(Dataset):
    """What people write: one PIL image at a time."""

    def __init__(self, training_set: TrainingSet, recipe: Recipe) -> None:
        pixels = training_set.images.permute(0, 2, 3, 1).numpy()
        self.images = [Image.fromarray(each.squeeze(2) if each.shape[2] == 1 else each) for each in pixels]
        self.labels = training_set.labels.tolist()
        self.recipe = recipe
        mean, std = training_set.channel_statistics
        self.mean, self.std = (torch.tensor(each).view(-1, 1, 1) for each in (mean, std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        if self.recipe.flip and random.random() < 0.5:
            image = ImageOps.mirror(image)
        if padding := self.recipe.crop_padding:
            pixels = np.asarray(image)
            border = [(padding, padding), (padding, padding), (0, 0)][: pixels.ndim]
            padded = Image.fromarray(np.pad(pixels, border, mode="reflect"))
            left, top = (random.randint(0, 2 * padding) for _ in range(2))
            image = padded.crop((left, top, left + image.width, top + image.height))
        pixels = np.asarray(image)
        tensor = torch.from_numpy((pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)).copy())
        return (tensor.float() / 255 - self.mean) / self.std, self.labels[index]


def plain(training_set: TrainingSet, recipe: Recipe, workers: int) -> float:
    """Seconds of one epoch of the plain loop."""
    dataset = PlainDataset(training_set, recipe)
    channels, height, width = training_set.image_shape
    model = build(
        recipe.model,
        num_classes=10,
        in_channels=channels,
        image_size=(height, width),
        width=recipe.width,
        seed=0,
    )
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    loader = DataLoader(
        dataset,
        batch_size=recipe.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    model.train()
    # Two epochs where there are workers: starting them is not counted.
    for _ in range(2 if workers else 1):
        started = time.perf_counter()
        total, correct = 0.0, 0
        for images, labels in loader:
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
        seconds = time.perf_counter() - started
    return seconds


def ours(training_set: TrainingSet, recipe: Recipe) -> float:
    """Seconds of one epoch of `unpoison.training.train`."""
    return train(training_set, recipe, seed=0).seconds


def coloured(count: int) -> TrainingSet:
    """Noise of the size of CIFAR-10's images; speed does not depend on what is shown."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(count) % 10, tuple("abcdefghij"), "colour noise")


def measure(repeats: int) -> dict[str, Any]:
    """Every case: seconds an epoch and the ratios."""
    settings = {
        "sample": (sample().train, Recipe.preset("sample")),
        "cifar10-small": (coloured(1000), Recipe.preset("cifar10-small")),
    }
    seconds: dict[str, float] = {}
    ratios: dict[str, float] = {}
    rates: dict[str, float] = {}
    for name, (training_set, preset) in settings.items():
        recipe = replace(preset, epochs=1, warmup_epochs=0.0, schedule="constant")
        runs: dict[str, list[float]] = {"ours": [], "plain, 0 workers": [], "plain, 2 workers": []}
        ours(training_set.subset(range(500)), recipe)  # the first steps of a process are slower for everybody
        for _ in range(repeats):
            runs["ours"].append(ours(training_set, recipe))
            for workers in (0, 2):
                runs[f"plain, {workers} workers"].append(plain(training_set, recipe, workers))
        for side, times in runs.items():
            seconds[f"{name}: {side}"] = min(times)
            rates[f"{name}: {side}"] = len(training_set) / min(times)
        fastest = min(min(runs["plain, 0 workers"]), min(runs["plain, 2 workers"]))
        ratios[f"plain loop, {name}"] = fastest / min(runs["ours"])
    return {
        "ratios": ratios,
        "agreement": {},
        "seconds": seconds,
        "images_per_second": rates,
        "peak_bytes": {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "repeats": repeats,
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; the fastest counts")
    arguments = parser.parse_args()
    result = measure(arguments.repeats)
    result["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result["command"] = "python -m benchmarks.training " + " ".join(sys.argv[1:])
    if not arguments.json:
        for name, rate in result["images_per_second"].items():
            print(f"{name:36s} {rate:9.0f} images/s")
        for name, ratio in result["ratios"].items():
            print(f"{name:36s} {ratio:9.2f} times as fast")
    if not arguments.no_write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
