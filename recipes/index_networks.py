"""What an index of a real network takes: time in forward passes, and peak memory.

    python -m recipes.index_networks [--networks resnet18 vit_tiny] [--images 16] [--memory 4GB]

Networks of torchvision, and a ViT-Tiny made of its blocks, with random weights on random images of 224
pixels, each in a process of its own. Processor seconds, in those of a forward pass of the same images: of the
two passes for the factors, without the eigenvectors, which take the same time for any number of images; of
the rows of the index; and of all three as reckoned with both factors of a tenth of the images
(`covariance_examples`, `eigenvalue_examples`). A trace is one query and its products with all rows. Goes into
benchmarks/results/index.json as "networks"; what is there of a network is measured anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from benchmarks._harness import RESULTS, encoded, peak_bytes, say, timed

from unpoison._memory import limited
from unpoison.data import TensorExamples
from unpoison.influence import InfluenceIndex, RelativeDamping, fit_factors
from unpoison.influence._sketch import Sketcher
from unpoison.tasks import ClassificationTask

TASK = ClassificationTask()


def point(network: str, images: int, memory: str) -> dict[str, Any]:
    """Seconds and peak memory of one network, in this process."""
    torch.manual_seed(0)
    models = import_module("torchvision").models
    tiny = {"image_size": 224, "patch_size": 16, "num_layers": 12, "num_heads": 3, "hidden_dim": 192}
    make = partial(models.VisionTransformer, **tiny, mlp_dim=768) if network == "vit_tiny" else None
    model = (make or getattr(models, network))(num_classes=10).eval()
    train = TensorExamples(torch.randn(images, 3, 224, 224), torch.arange(images) % 10)
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
        return {
            "network": network,
            "images": images,
            "seconds of a forward pass": once,
            **passes,
            "of a tenth": 0.1 * (passes["covariance"] + passes["eigenvalues"]) + passes["basis"],
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


def main() -> None:
    """Measure every network in a process of its own, and keep what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vit_tiny"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--out", type=Path, default=RESULTS / "index.json")
    arguments = parser.parse_args()
    for name in arguments.networks:
        call = f"print(json.dumps(point({name!r}, {arguments.images}, {arguments.memory!r})))"
        program = f"import json; from recipes.index_networks import point; {call}"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        say(json.dumps(found))
        stored = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
        rows = [row for row in stored.get("networks", []) if row["network"] != name]
        arguments.out.write_text(encoded({**stored, "networks": [*rows, found]}), encoding="utf-8")


if __name__ == "__main__":
    main()
