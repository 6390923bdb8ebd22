"""Training beside the usual loop.

    python -m benchmarks.training [--json]

`train` against a torch `DataLoader` over a map-style dataset of PIL images that flips, pads, crops, converts
and standardises one image at a time, with 0 and with 2 worker processes, on the same network, images and
recipe: 5,000 images of the sample, 1,000 of CIFAR's size. The loop comes in two forms: as it is usually
written, and tuned, with channels last and the fused optimiser, which `train` uses too.

- a whole training of two epochs, with everything that either side sets up: the network, the loader and its
  workers, and on our side statistics, fingerprint and the choice of a layout. The loop is given its images as
  PIL images, and the channel statistics as constants;
- the second epoch alone.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from benchmarks._harness import Bench, Timed, main, random_images
from benchmarks._tables import Record
from unpoison.data import TrainingSet, sample
from unpoison.models import build
from unpoison.training import Recipe, train

CASES = {"the sample": "sample", "CIFAR's size": "cifar10-small"}
WHOLE, EPOCH = "two epochs with set-up", "an epoch"
FORMS = ("usual loop", "tuned loop")


class PlainDataset(Dataset):
    """One PIL image at a time, as is usual."""

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


def loop(dataset: PlainDataset, shape: tuple[int, ...], *, workers: int, tuned: bool) -> list[float]:
    """Train by the usual loop; gives the seconds of each epoch."""
    recipe, size = dataset.recipe, {"in_channels": shape[0], "image_size": (shape[1], shape[2])}
    layout = torch.channels_last if tuned else torch.contiguous_format
    model = build(recipe.model, num_classes=10, width=recipe.width, seed=0, **size)
    model.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=tuned,
    )
    processes = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(dataset, recipe.batch_size, shuffle=True, **processes)
    seconds = []
    for _ in range(recipe.epochs):
        started = time.perf_counter()
        total, correct = 0.0, 0
        for images, labels in loader:
            logits = model(images.contiguous(memory_format=layout))
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
        seconds.append(time.perf_counter() - started)
    return seconds


def ours(training_set: TrainingSet, recipe: Recipe) -> list[float]:
    """The same by `train`."""
    return [record.seconds for record in train(training_set, recipe, seed=0).history]


def measure(bench: Bench) -> None:
    """Both cases, whole and by epoch."""
    for case, preset in CASES.items():
        training_set = sample().train if preset == "sample" else random_images(1000, torch.Generator())
        if bench.options.quick:
            training_set = training_set.subset(range(200))
        recipe = replace(Recipe.preset(preset), epochs=2, warmup_epochs=0.0, schedule="constant")
        plain = partial(loop, PlainDataset(training_set, recipe), training_set.image_shape)
        sides = {"unpoison": partial(ours, training_set, recipe)}
        for form in FORMS:
            for workers in (0, 2):
                side = partial(plain, workers=workers, tuned=form == FORMS[1])
                sides[f"{form}, {workers} workers"] = side
        bench.compare(f"{case}, {WHOLE}", sides)
        epochs = {side: lambda work=work: Timed(work()[-1]) for side, work in sides.items()}
        bench.compare(f"{case}, {EPOCH}", epochs, warm=True)


def slowest(record: Record, what: str) -> str:
    """The ratio to each form of the loop with the number of workers that suits it best."""
    told = []
    for form in FORMS:
        found = [ratio for name, ratio in record["ratios"].items() if name.startswith(f"{what}, {form}")]
        told += [f"{min(found):.1f}x ({form})"] if found else []
    return "; ".join(told)


if __name__ == "__main__":
    main(measure)
