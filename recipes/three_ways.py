"""Run a recipe three ways and keep what it gave: once through, killed three times and resumed, and on Ray.

    python -m recipes.three_ways recipes/badnets-sample.toml [--workers 2] [--seed 0] [--no-ray] [--no-write]

The three tables must be the same to the last digit; the command ends with status 1 if they are not. The
moments of the three `kill -9` are drawn from --seed, within the time that the first run took. Writes
recipes/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from recipes.keep import keep


def bench(recipe: str, out: Path, workers: int, *more: str) -> subprocess.Popen[bytes]:
    """Start `unpoison bench`, as a shell would."""
    command = [sys.executable, "-m", "unpoison", "bench", recipe, "--out", str(out)]
    return subprocess.Popen(
        [*command, "--workers", str(workers), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(process: subprocess.Popen[bytes], out: Path, started: float) -> dict[str, Any]:
    """Wait for a run; what it found, and its seconds."""
    status = process.wait()
    if status not in (0, 1):
        raise SystemExit(f"{out.name}: unpoison bench ended with status {status}; see {out / 'bench.log'}")
    results = json.loads((out / "run.json").read_text(encoding="utf-8"))["results"]
    found = {key: results[key] for key in ("table", "trials", "planned")}
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def main() -> int:
    """Run the three ways, compare, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--no-write", action="store_true", help="leave recipes/results alone")
    arguments = parser.parse_args()
    name = Path(arguments.recipe).stem
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        through, killed, cluster = (Path(folder, way) for way in ("through", "killed", "ray"))
        began = time.perf_counter()
        runs["once through"] = finish(bench(arguments.recipe, through, arguments.workers), through, began)

        moments = random.Random(arguments.seed)
        began, after = time.perf_counter(), []
        for _ in range(3):
            process = bench(arguments.recipe, killed, arguments.workers)
            # A third of the way at most each, so that there is something left to kill.
            wait = moments.uniform(5.0, runs["once through"]["seconds"] / 3)
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                after.append(round(wait, 1))
        resumed = finish(bench(arguments.recipe, killed, arguments.workers), killed, began)
        runs["killed and resumed"] = {**resumed, "killed_after_seconds": after}

        if not arguments.no_ray:
            began = time.perf_counter()
            process = bench(arguments.recipe, cluster, arguments.workers, "--executor", "ray")
            runs["Ray"] = finish(process, cluster, began)

        identical = len({run["table"] for run in runs.values()}) == 1
        print(json.dumps({"identical": identical, "workers": arguments.workers, "runs": runs}, indent=1))
        if not arguments.no_write:
            keep(through, f"python -m recipes.three_ways recipes/{name}.toml", identical=identical, runs=runs)
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
