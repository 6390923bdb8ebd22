"""How much faster two workers make the shards of an index than one.

    python -m recipes.index_workers FOLDER [--examples 102400]

The synthetic images and the network of `recipes.index_growth`. Factors and basis are made once and copied, so
that the seconds are those of the shards alone: from the fifth shard of 1,024 rows, when all workers
have begun, to the last, for the rows between. By processes and by a local Ray cluster. Writes
rows a second, and whether every digest is the same, to benchmarks/results/index_workers.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks._harness import RESULTS, encoded, provenance, say

from recipes.index_growth import COVARIANCE_EXAMPLES, NUMBERS, Synthetic, network
from unpoison.evaluation import RayExecutor
from unpoison.influence import InfluenceIndex

SHARD = 1024
ROWS = 100_000
KINDS = ("processes", "workers of Ray")


def made(folder: Path, count: int, progress: Callable[..., None] | None = None, **how: Any) -> InfluenceIndex:
    """The index, or what is missing of it."""
    return InfluenceIndex.build(
        folder,
        network(folder.parent),
        Synthetic(torch.arange(count)),
        covariance_examples=COVARIANCE_EXAMPLES,
        numbers=NUMBERS,
        shard_examples=SHARD,
        progress=progress,
        **how,
    )


def measured(folder: Path, count: int, **how: Any) -> tuple[float, str]:
    """Rows a second, and the digest."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "whole", copy, ignore=shutil.ignore_patterns("shards"))
    stamps: list[tuple[float, int]] = []

    def told(stage: str, done: int, total: int, /, **_: float) -> None:
        if stage == "index":
            stamps.append((time.perf_counter(), done))

    index = made(copy, count, told, **how)
    (began, first), (ended, last) = stamps[4], stamps[-1]
    return (last - first) / (ended - began), index.digest


def main() -> None:
    """One and two workers, of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int, default=102_400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder, count = arguments.folder, arguments.examples
    digests, rates = {made(folder / "whole", count).digest}, {}
    for workers in (1, 2):
        rates[f"{workers} processes"], digest = measured(folder, count, processes=workers)
        digests.add(digest)
        with RayExecutor(workers) as executor:
            rates[f"{workers} workers of Ray"], digest = measured(folder, count, executor=executor)
        digests.add(digest)
        say(str(rates))
    seconds = {
        f"{ROWS:,} rows by two {kind}": {
            side: {"minimum": ROWS / rate, "median": ROWS / rate, "n": 1}
            for side, rate in (("two", rates[f"2 {kind}"]), ("one", rates[f"1 {kind}"]))
        }
        for kind in KINDS
    }
    ratios = {
        f"{what}, one": sides["one"]["minimum"] / sides["two"]["minimum"] for what, sides in seconds.items()
    }
    record = {
        "ratios": ratios,
        "agreement": {"one digest": float(len(digests) == 1)},
        "seconds": seconds,
        "differs": dict.fromkeys(seconds, "two workers, not one"),
        "peak_bytes": {},
        "rates": {},
        **provenance("index_workers", 1),
        "command": f"python -m recipes.index_workers FOLDER --examples {count}",
    }
    (RESULTS / "index_workers.json").write_text(encoded(record), encoding="utf-8")
    say(json.dumps(ratios))


if __name__ == "__main__":
    main()
