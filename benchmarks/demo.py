"""The demo.

    python -m benchmarks.demo [--json]

`make demo`: BadNets on the bundled sample is crafted, trained on, traced from one wrong answer, healed and
reported. The command runs in a process of its own; what its run record says is kept.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

from benchmarks._harness import Bench, main
from unpoison.runs import RunRecord

WHEN = {"before": "poisoned", "after": "healed", "control": "never poisoned"}


def measure(bench: Bench) -> None:
    """One run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "unpoison", "demo", "--out", folder, "--overwrite"]
        command += ["--threads", str(bench.options.threads)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        keep(bench, RunRecord.load(folder))


def keep(bench: Bench, run: RunRecord) -> None:
    """A run record of the demo in the shape of a benchmark."""
    for name, measured in run.results["measured"].items():
        words, _, when = name.rpartition("_")
        told = f"{words}, {WHEN[when]}" if when in WHEN else name
        bench.rates[told.replace("_", " ")] = {part: measured[part] for part in ("successes", "trials")}
    bench.seconds = dict(run.seconds)
    bench.peak_bytes = {"the demo": run.peak_memory_bytes}
    bench.work = {
        name.replace("_", " "): value
        for name, value in run.results.items()
        if name not in run.results["measured"] and isinstance(value, int | float | str)
    }


if __name__ == "__main__":
    main(measure)
