"""Memory and time of a set that is never held: tracing and scanning a map-style dataset.

    python -m benchmarks.own_data [--json]

A dataset of 20,000 and of 200,000 images Float[3 64 64], made as they are read, through `DatasetExamples`
with nothing kept in memory, and a small network: `scan` by spectral signatures and `trace` by EK-FAC. Each
size is a process of its own, so that its peak memory is its own. On the first 5,000 images the scores are
compared with those of the same images held in memory, bit for bit.
"""

from __future__ import annotations

import json
from typing import Any, Final

import torch
from torch import Tensor, nn

import unpoison
from benchmarks._harness import Bench, main, peak_bytes, say, tally, timed
from benchmarks._tables import Section, points
from unpoison.data import DatasetExamples, TensorExamples

SIZES: Final = (20_000, 200_000)
COMPARED: Final = 5_000
LIMIT: Final = 1_500_000_000


class Made:
    """Images that are made as they are read."""

    def __init__(self, count: int) -> None:
        self.targets = [row % 4 for row in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        image = torch.empty(3, 64, 64).fill_((row * 31 % 97) / 97)
        image[row % 3, row % 64] = (row * 17 % 89) / 89
        return image, self.targets[row]


def network() -> nn.Module:
    """A convolution and two linear layers."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def point(count: int) -> None:
    """Print seconds, peak memory and agreement of one size, measured in this process."""
    model, dataset = network(), Made(count)
    query = unpoison.Observation(dataset[7][0].flip(-1))
    warm = DatasetExamples([dataset[row] for row in range(200)], memory_bytes=0)
    scan(model, warm)
    trace(model, warm, query)
    before = peak_bytes()
    examples = DatasetExamples(dataset, memory_bytes=0)
    scanning, _ = timed(lambda: scan(model, examples))
    tracing, _ = timed(lambda: trace(model, examples, query))
    peak, rows = peak_bytes(), torch.arange(min(COMPARED, count))
    part = examples.subset(rows)
    held = TensorExamples(*part.at(rows))
    scans = torch.equal(scan(model, part), scan(model, held))
    traces = torch.equal(trace(model, part, query), trace(model, held, query))
    print(json.dumps([[scanning, tracing], [peak, before], [scans, traces]]))


def scan(model: nn.Module, examples: Any) -> Tensor:
    """Scores."""
    return unpoison.scan(model, examples, method="spectral-signatures").scores


def trace(model: nn.Module, examples: Any, query: unpoison.Observation) -> Tensor:
    """Scores."""
    return unpoison.trace(model, examples, query, method="ek-fac").scores


def measure(bench: Bench) -> None:
    """Every size in a process of its own."""
    for count in SIZES[:1] if bench.options.quick else SIZES:
        taken, held, same = bench.apart(f"benchmarks.own_data.point({count})")
        name = f"{count:,} images"
        bench.seconds[name] = dict(zip(("scan", "trace"), taken, strict=True))
        bench.peak_bytes[name] = dict(zip(("peak memory", "of it before the work"), held, strict=True))
        bench.rates[f"{name}: scores of a verb are those in memory"] = tally(same)
        bench.rates[f"{name}: peak memory within 1.5 GB"] = tally([held[0] < LIMIT])
        say(f"{name}: {bench.seconds[name]}, {held[0] / 1e6:.0f} MB")


SECTION = Section.of(__name__, __doc__, tables=points("dataset"))


if __name__ == "__main__":
    main(measure, threads=1)
