"""Memory and time of a set that is never held: tracing and scanning a map-style dataset.

    python -m benchmarks.own_data [--json]

A dataset of 20,000 and of 200,000 images Float[3 64 64], made as they are read, through `DatasetExamples`
with nothing kept in memory, and a small network: `scan` by spectral signatures and `trace` by EK-FAC. Each
size is a process of its own, so that its peak memory is its own. On the first 5,000 images the scores are
compared with those of the same images held in memory, bit for bit.

Then 1,000 JPEG photographs of 300 to 900 pixels in class folders, brought to 224 pixels as they are read, and
a timm network of 22.9 million parameters (left out without timm): `unpoison trace --transform --workers 2` by
EK-FAC, covariances of 200 images. Decoding is that of both workers together, in all passes.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys

import torch
from torch import Tensor, nn

import unpoison
from benchmarks._harness import Bench, main, peak_bytes, tally, timed
from benchmarks._tables import points
from benchmarks.compatibility import FOLDER
from unpoison.data import DatasetExamples, TensorExamples

SIZES, COMPARED, LIMIT = (20_000, 200_000), 5_000, 1_500_000_000


class Made:
    """Images that are made as they are read."""

    def __init__(self, count: int) -> None:
        self.targets = [row % 4 for row in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image = torch.empty(3, 64, 64).fill_((row * 31 % 97) / 97)
        image[row % 3, row % 64] = (row * 17 % 89) / 89
        return image, self.targets[row]


def point(count: int) -> None:
    """Print seconds, peak memory and agreement of one size, measured in this process."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    dataset = Made(count)
    scan = functools.partial(unpoison.scan, model, method="spectral-signatures")
    query = unpoison.Observation(dataset[7][0].flip(-1))
    trace = functools.partial(unpoison.trace, model, observation=query, method="ek-fac")
    for verb in (scan, trace):  # warm-up
        verb(DatasetExamples([dataset[row] for row in range(200)], memory_bytes=0))
    before, examples = peak_bytes(), DatasetExamples(dataset, memory_bytes=0)
    taken = [timed(functools.partial(verb, examples))[0] for verb in (scan, trace)]
    peak, part = peak_bytes(), examples.subset(torch.arange(min(COMPARED, count)))
    held = TensorExamples(*part.at(range(len(part))))
    same = [torch.equal(verb(part).scores, verb(held).scores) for verb in (scan, trace)]
    print(json.dumps([taken, [peak, before], same]))


def photographs(bench: Bench, count: int) -> None:
    """`unpoison trace` on a folder of photographs."""
    sys.path.insert(0, str(FOLDER))
    import photographs as made

    more = ("--option", "covariance_examples=200", "--threads", str(bench.options.threads))
    spent, results, peak, named = made.trace("timm:vit_small_patch32_224", count, "prepared", *more)
    name, parts, reading = f"{count:,} photographs", results["detector_seconds"], results["reading"]
    taken = {"decoding": reading["seconds"], "waited for it": reading["waited"], **parts, "command": spent}
    bench.seconds[name], bench.peak_bytes[name] = taken, {"peak memory": peak}
    bench.rates[f"{name}: flagged examples that are named by their files"] = tally(named)
    bench.rates[f"{name}: decoding is not the slowest"] = tally([taken["decoding"] < max(parts.values())])


tables = points("dataset")


def measure(bench: Bench) -> None:
    """Every size in a process of its own."""
    for count in SIZES[:1] if bench.options.quick else SIZES:
        taken, held, same = bench.apart(f"benchmarks.own_data.point({count})")
        name = f"{count:,} images"
        bench.seconds[name] = dict(zip(("scan", "trace"), taken, strict=True))
        bench.peak_bytes[name] = dict(zip(("peak memory", "of it before the work"), held, strict=True))
        bench.rates[f"{name}: scores of a verb are those in memory"] = tally(same)
        bench.rates[f"{name}: peak memory within 1.5 GB"] = tally([held[0] < LIMIT])
    if importlib.util.find_spec("timm") is not None:
        photographs(bench, 60 if bench.options.quick else 1_000)


if __name__ == "__main__":
    main(measure, threads=1)
