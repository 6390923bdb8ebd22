"""What an index of a real network takes: time in forward passes, and peak memory.

    python -m recipes.index_networks [--networks resnet18 vit_tiny] [--images 16] [--memory 4GB]
    python -m recipes.index_networks --networks resnet50 vit_b_16 --of 1000 --images 8 --memory 3GB

Networks of torchvision, and a ViT-Tiny made of its blocks, with random weights on random images of 224
pixels, each in a process of its own. Processor seconds, in those of a forward pass of the same images: of the
two passes for the factors, without the eigenvectors, which take the same time for any number of images; of
the sketches of the basis; of the rows of the index, in shards of a quarter of the images, each of which sets
up the sketch anew, as 4,096 rows share; and of all of it in a large set, whose rows take what a sketch of
the basis does, with factors of all images and with both factors of a tenth of them (`covariance_examples`,
`eigenvalue_examples`). A trace is one query and its products with all rows.

With `--of`, memory alone is measured, as for a set of so many images: factors are fitted to `--images` of
them, and of what is sketched in each stage and shard the first `--images` gradients are computed and the
others random numbers of the same shape, so that the basis, its products and the rows have their full size.
In place of eigenvectors, which take minutes but less memory than what follows, there are unit vectors. A
trace then has two exact queries and the exact scores of `--images` as well.

Goes into benchmarks/results/index_networks.json; what is there of a network and these numbers of images is
measured anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks._harness import RESULTS, encoded, machine, peak_bytes, provenance, say, timed

from unpoison._memory import limited
from unpoison.data import TrainingSet
from unpoison.influence import InfluenceIndex, RelativeDamping, fit_factors, precondition, score
from unpoison.influence._sketch import Sketcher, Sketches
from unpoison.tasks import Batch, ClassificationTask

TASK = ClassificationTask()
BATCH = 128


def network_of(name: str) -> torch.nn.Module:
    """A network with random weights and 10 classes."""
    torch.manual_seed(0)
    models = import_module("torchvision").models
    tiny = {"image_size": 224, "patch_size": 16, "num_layers": 12, "num_heads": 3, "hidden_dim": 192}
    make = partial(models.VisionTransformer, **tiny, mlp_dim=768) if name == "vit_tiny" else None
    made: torch.nn.Module = (make or getattr(models, name))(num_classes=10).eval()
    return made


def images_of(count: int) -> TrainingSet:
    """Random images of 224 pixels."""
    randomness = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, 224, 224), dtype=torch.uint8, generator=randomness)
    return TrainingSet(images, torch.arange(count) % 10, tuple(map(str, range(10))))


def point(network: str, images: int, memory: str) -> dict[str, Any]:
    """Seconds and peak memory of one network, in this process."""
    model, train = network_of(network), images_of(images)
    batch = max(1, images // 4)
    some = train.batch(0, batch)[0].contiguous(memory_format=torch.channels_last)
    stamps: dict[str, list[float]] = {}

    def told(stage: str, done: int, total: int, /, **_: Any) -> None:
        stamps.setdefault(stage, []).append(time.process_time())

    def forward() -> float:
        with torch.no_grad():
            return min(timed(lambda: model(some), time.process_time)[0] for _ in range(3)) * images / batch

    once, before = forward(), peak_bytes()
    with tempfile.TemporaryDirectory() as folder, limited(memory):
        factors = fit_factors(model, train, TASK, seed=0, batch_size=batch, progress=told)
        once = min(once, forward())
        peak = peak_bytes()
        index = InfluenceIndex.build(
            Path(folder, "index"),
            model,
            train,
            factors=factors,
            numbers=images,  # few gradients of large networks would be kept whole
            batch_size=batch,
            shard_examples=batch,
            progress=told,
        )
        options: dict[str, Any] = {"dimensions": index.settings["sketch"], "seed": 0}
        with Sketcher(model, factors, RelativeDamping(), TASK.measurement, **options) as sketcher:
            parts = [part.split for part in sketcher._visitor.parts]
        shares = [one.basis.shape[2] / one.basis.shape[1] for one in parts if one is not None]
        spent, _ = timed(lambda: index.influence(index.queries(model, train.batch(0, 1))), time.process_time)
        once = min(once, forward())

        def pace(stage: str) -> float:
            first, *_, last = stamps[stage]
            return (last - first) / (len(stamps[stage]) - 1) * images / batch / once

        passes = {stage: pace(stage) for stage in ("covariance", "eigenvalues", "basis", "index")}
        factor_passes = passes["covariance"] + passes["eigenvalues"]
        return {
            "network": network,
            "images": images,
            "seconds of a forward pass": once,
            **passes,
            "all": factor_passes + passes["basis"],
            "with factors of a tenth": 0.1 * factor_passes + passes["basis"],
            "layers that are rotated in part": len(shares),
            "of these": sum(shares) / max(1, len(shares)),
            "trace": spent,
            "numbers": index.settings["numbers"],
            "sketch": index.settings["sketch"],
            "disk": sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()),
            "GB before": before / 1e9,
            "GB of factors": peak / 1e9,
            "peak GB": peak_bytes() / 1e9,
        }


@contextmanager
def stood_in_for(computed: int) -> Iterator[None]:
    """Within the block a `Sketcher` computes so many gradients, and gives random numbers after these.

    Factors have unit vectors.
    """
    known, seen = Sketcher.batch, dict[int, int]()

    def batch(self: Sketcher, given: Batch, count: int) -> Sketches:
        done = seen.setdefault(id(self), 0)
        seen[id(self)] += count
        own = min(count, max(0, computed - done))
        rows = torch.zeros(count, self.dimensions)
        if own:
            rows[:own] = known(self, tuple(part[:own] for part in given), own).rows
        rows[own:].normal_()
        lengths = rows.norm(dim=1).double()
        return Sketches(rows, lengths, lengths, torch.zeros(count))

    def unit_vectors(_: Any, pair: tuple[torch.Tensor, torch.Tensor], *__: Any) -> None:
        for one in pair:
            one.copy_(torch.eye(one.shape[-1]))

    with (
        patch.object(Sketcher, "batch", batch),
        patch("unpoison.influence._factors.eigenbases_", unit_vectors),
    ):
        yield


def memory_point(network: str, images: int, memory: str, of: int) -> dict[str, Any]:
    """Peak memory of one network on `of` images, in this process."""
    model, train = network_of(network), images_of(of)
    before, peaks = peak_bytes(), {}

    def told(stage: str, done: int, total: int, /, **_: Any) -> None:
        peaks[stage] = peak_bytes() / 1e9

    with tempfile.TemporaryDirectory() as folder:
        with stood_in_for(images):
            index = InfluenceIndex.build(
                Path(folder, "index"),
                model,
                train,
                covariance_examples=images,
                eigenvalue_examples=images,
                memory=memory,
                progress=told,
            )
        built = peak_bytes()
        with limited(memory):
            index.influence(index.queries(model, train.batch(0, 1)))
            asked = precondition(model, index.factors, train.batch(0, 2), TASK)
            score(model, asked, train.subset(torch.arange(images)), TASK, gradient_norms=True)
        return {
            "network": network,
            "images": of,
            "gradients computed": images,
            "memory": memory,
            "numbers": index.settings["numbers"],
            "sketch": index.settings["sketch"],
            "GB before": before / 1e9,
            **{f"GB until {stage}": value for stage, value in peaks.items()},
            "GB of the index": built / 1e9,
            "peak GB": peak_bytes() / 1e9,
        }


def main() -> None:
    """Measure every network in a process of its own, and keep what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vit_tiny"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--of", type=int, help="measure the memory for so many images")
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--out", type=Path, default=RESULTS / "index_networks.json")
    arguments = parser.parse_args()
    given = f"{arguments.images}, {arguments.memory!r}"
    kind = "networks" if arguments.of is None else "memory"
    same = ("network",) if arguments.of is None else ("network", "images", "gradients computed")
    for name in arguments.networks:
        point_ = "point" if arguments.of is None else "memory_point"
        more = "" if arguments.of is None else f", {arguments.of}"
        call = f"print(json.dumps({point_}({name!r}, {given}{more})))"
        program = f"import json; from recipes.index_networks import {point_}; {call}"
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        say(json.dumps(found))
        stored = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
        rows = [row for row in stored.get(kind, []) if any(row[key] != found[key] for key in same)]
        record = {
            **stored,
            kind: [*rows, found],
            **provenance("index_networks", torch.get_num_threads()),
            "command": f"python -m recipes.index_networks --images {arguments.images}",
            "machine": machine(torch.get_num_threads()),
        }
        arguments.out.write_text(encoded(record), encoding="utf-8")


if __name__ == "__main__":
    main()
