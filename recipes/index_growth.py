"""How an index grows with the number of examples, and whether it survives being killed.

    python -m recipes.index_growth [--sizes 12800 64000] [--kills 2] [--out index_growth.json]

Synthetic images of 3 x 32 x 32, made when they are read, through a small convolutional network. Each index
is made by a process of its own: seconds of the processor for factors and shards, peak memory, seconds of one
query (its gradient and the products with all rows). The smallest is made once more by processes that are
ended by `kill -9` at random moments, and must have the same digest. Writes recipes/results/index_growth.json.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import torch
from benchmarks._harness import encoded, peak_bytes, provenance, say
from torch import Tensor, nn

from unpoison.influence import InfluenceIndex

BLOCK = 128


@final
class Synthetic:
    """`Examples` that are made when they are read: the pixels of example j depend on j alone."""

    name, ids, class_names, num_classes = "synthetic images", None, tuple(map(str, range(10))), 10
    input_shape, device = (3, 32, 32), torch.device("cpu")

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.labels = rows, rows % 10
        self.fingerprint = f"synthetic {len(rows)}"

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Examples `start` to `stop`."""
        return self.at(torch.arange(start, stop))

    def at(self, indices: Any) -> tuple[Tensor, Tensor]:
        """The examples at `indices`."""
        rows = self.rows[torch.as_tensor(indices)]
        base = torch.arange(3 * 32 * 32, dtype=torch.float64).view(3, 32, 32)
        phase = (rows.double()[:, None, None, None] * 12.9898 + base * 78.233).sin() * 43758.5453
        return phase.frac().abs().float(), rows % 10

    def in_batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of at most `size`."""
        rows = torch.arange(len(self)) if order is None else order
        return (self.at(part) for part in torch.split(rows, size))

    def subset(self, indices: Any) -> Synthetic:
        """The examples at `indices`."""
        return Synthetic(self.rows[torch.as_tensor(indices)])


def network() -> nn.Module:
    """About 9,000 parameters."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 10)).eval()


def point(count: int, folder: str) -> None:
    """Make one index, in this process, and print what it took."""
    torch.set_num_threads(1)
    stages: dict[str, float] = {}
    last = time.process_time()

    def told(stage: str, done: int, total: int, /, **_: float) -> None:
        nonlocal last
        now = time.process_time()
        stages[stage] = stages.get(stage, 0.0) + now - last
        last = now

    model, examples = network(), Synthetic(torch.arange(count))
    index = InfluenceIndex.build(folder, model, examples, numbers=512, progress=told)
    peak, began = peak_bytes(), time.process_time()
    index.influence(index.queries(model, examples.batch(0, 1))).topk(10)
    spent = time.process_time() - began
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    print(
        json.dumps(
            {"seconds": {**stages, "a query": spent}, "peak": peak, "disk": size, "digest": index.digest}
        )
    )


def started(count: int, folder: Path) -> subprocess.Popen[str]:
    """`point` in a process of its own."""
    code = f"from recipes.index_growth import point; point({count}, {str(folder)!r})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def main() -> None:
    """Every size, then the kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[12_800, 64_000])
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "index_growth.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.sizes:
            began = time.perf_counter()
            out = started(count, Path(folder, str(count))).communicate()[0]
            found[f"{count:,} examples"] = {**json.loads(out), "wall": time.perf_counter() - began}
            say(f"{count}: {out}")
        smallest, wall = arguments.sizes[0], found[f"{arguments.sizes[0]:,} examples"]["wall"]
        randomness, killed = random.Random(0), Path(folder, "killed")
        for _ in range(arguments.kills):
            process = started(smallest, killed)
            try:
                process.wait(randomness.uniform(0.3, 0.8) * wall)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                say(f"killed with {len(list(killed.rglob('shards/*')))} shards")
        out = started(smallest, killed).communicate()[0]
        same = json.loads(out)["digest"] == found[f"{smallest:,} examples"]["digest"]
        say(f"killed {arguments.kills} times: {'the same digest' if same else 'ANOTHER DIGEST'}")
    record = {"growth": found, "same_digest_after_kills": same, **provenance("index_growth", 1)}
    arguments.out.write_text(
        encoded({**record, "command": "python -m recipes.index_growth"}), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
