"""Memory and time of a set that is never held: tracing and scanning a map-style dataset.

    python -m benchmarks.own_data [--json]

A dataset of 20,000 and of 200,000 images Float[3 64 64], made as they are read, through `DatasetExamples`
with nothing kept in memory, and a small network: `scan` by spectral signatures and `trace` by EK-FAC. Each
size is a process of its own, so that its peak memory is its own. On the first 5,000 images the scores are
compared with those of the same images held in memory, bit for bit.

Then 1,000 JPEG photographs of 300 to 900 pixels in class folders (the sample, enlarged and tinted, with
noise), brought to 224 pixels as they are read, and a timm network of 22.9 million parameters: `unpoison trace
--transform --workers 2` by EK-FAC, covariances of 200 images. Decoding is the time of both workers together,
in all passes; factors and scores are those of the whole process. Needs timm, and is left out without it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import unpoison
from benchmarks._harness import Bench, main, peak_bytes, say, tally, timed
from benchmarks._tables import Section, points
from benchmarks.compatibility import FOLDER
from unpoison.data import DatasetExamples, Preparation, TensorExamples, sample
from unpoison.detectors import Findings

SIZES: Final = (20_000, 200_000)
COMPARED: Final = 5_000
LIMIT: Final = 1_500_000_000
PHOTOGRAPHS: Final = 1_000
NETWORK: Final = "timm:vit_small_patch32_224"
COMMAND: Final = (
    f"import sys; sys.path[:0] = [{str(FOLDER)!r}]; import torchvision_shim as shim; "
    "shim.without_cuda_operators(); from unpoison.cli import main; sys.exit(main(sys.argv[1:]))"
)


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


def take_photographs(folder: Path, count: int) -> None:
    """JPEG files of many sizes, in a folder for each class."""
    held, draws = sample().train, np.random.default_rng(0)
    for row in range(count):
        grey = Image.fromarray(held.images[row, 0].numpy())
        large = np.asarray(grey.resize(tuple(draws.integers(300, 901, 2).tolist())), np.float64)
        pixels = large[..., None] * draws.uniform(0.4, 1, 3) + draws.normal(0, 8, (*large.shape, 3))
        place = folder / str(int(held.labels[row])) / f"{row:04}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place, quality=90)


def prepared(picture: Image.Image) -> Tensor:
    """What the network takes."""
    pixels = torch.from_numpy(np.array(Preparation(224).apply(picture))).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1


def trace_photographs(bench: Bench, count: int) -> None:
    """`unpoison trace` on a folder of photographs."""
    with tempfile.TemporaryDirectory() as place:
        photos, suspect, found = (Path(place) / name for name in ("photos", "suspect.jpg", "found"))
        take_photographs(photos, count + 1)
        next(photos.rglob(f"{count:04}.jpg")).rename(suspect)
        words = f"trace --model {NETWORK} --data {photos} --suspect {suspect} --out {found}"
        words += " --transform benchmarks.own_data:prepared --workers 2 --held-share 0 --method ek-fac"
        words += f" --option covariance_examples=200 --threads {bench.options.threads}"
        spent, _ = timed(lambda: subprocess.run([sys.executable, "-c", COMMAND, *words.split()], check=True))
        results = json.loads((found / "run.json").read_text(encoding="utf-8"))["results"]
        peak, ids = Findings.load(found / "findings").peak_bytes, results["flagged_ids"]
        named = [(photos / one).is_file() for one in ids]
    name, parts, reading = f"{count:,} photographs", results["detector_seconds"], results["reading"]
    bench.seconds[name] = {
        "decoding, both workers": reading["seconds"],
        "of it waited for": reading["waited"],
        "factors": parts["factors"],
        "scores": parts["scores"],
        "the command": spent,
    }
    bench.peak_bytes[name] = {"peak memory": peak}
    bench.rates[f"{name}: flagged examples that are named by their files"] = tally(named)
    slowest = max(parts["factors"], parts["scores"])
    bench.rates[f"{name}: decoding takes less than the slowest part"] = tally([reading["seconds"] < slowest])
    say(f"{name}: {bench.seconds[name]}")


def measure(bench: Bench) -> None:
    """Every size in a process of its own."""
    if importlib.util.find_spec("timm") is not None:
        trace_photographs(bench, 60 if bench.options.quick else PHOTOGRAPHS)
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
