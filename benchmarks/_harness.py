"""The one way a benchmark is run: options, warm-up, repeats, peak memory and the stored record.

A benchmark is a module with a function `measure(bench)`, which fills a `Bench`, and ends with

    if __name__ == "__main__":
        main(measure)

`main` reads the options, calls `measure`, prints the record and writes benchmarks/results/NAME.json:

    ratios       theirs over ours, so above 1 ours is ahead; of the least seconds of each side
    agreement    how well the results of the two sides agree
    seconds      {what: {side: {"minimum", "median", "n"}}}, or a number for what has no peer
    peak_bytes   {what: {side: bytes}}, the largest resident set of the process while that side ran
    rates        {what: {"successes", "trials"}}
    differs      {what: how the algorithms differ}; what is not named here is equal work
    work, machine, date, command, commit
    trials       what the benchmark notes of each, a line of the file each

Both sides of a comparison are treated alike: each runs once unmeasured, then equally often, in an order that
is reversed from one round to the next.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch

from unpoison._code import commit
from unpoison._statistics import Proportion
from unpoison.data import TrainingSet

RESULTS: Final = Path(__file__).parent / "results"
CLOCKS: Final = {"wall": time.perf_counter, "processor": time.process_time}
PARTS: Final = ("ratios", "agreement", "seconds", "peak_bytes", "rates", "differs", "work", "trials")


@final
@dataclass(frozen=True)
class Timed:
    """What a side returns that times itself, in another process or without its set-up."""

    seconds: float
    result: Any = None


@final
class Bench:
    """What one run of a benchmark has measured so far.

    Arguments:
        options: `repeats`, `threads`, `clock` and `quick`, and the benchmark's own.
        trials: those that an earlier run has stored; see `trial`.
        keep: stores the record as it stands; called after each trial.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        trials: list[dict[str, Any]] | None = None,
        keep: Callable[[Bench], None] = lambda bench: None,
    ) -> None:
        self.options, self.trials, self._keep = options, trials or [], keep
        self.ratios: dict[str, float] = {}
        self.agreement: dict[str, Any] = {}
        self.seconds: dict[str, Any] = {}
        self.peak_bytes: dict[str, Any] = {}
        self.rates: dict[str, dict[str, int]] = {}
        self.differs: dict[str, str] = {}
        self.work: dict[str, Any] = {}

    def compare(
        self,
        what: str,
        sides: Mapping[str, Callable[[], Any]],
        *,
        differs: str = "",
        warm: bool = False,
        repeats: int | None = None,
    ) -> dict[str, Any]:
        """Run every side; note seconds, peak memory and ratios; give what each side returned last.

        Arguments:
            what: the work, as the tables name it.
            sides: by name; the first is ours. A side that returns a `Timed` is taken at its word.
            differs: how the peers' algorithm differs from ours; "" for equal work.
            warm: every side has run before, so that the run without measurement is left out.
            repeats: measured runs of each side; None is the option `--repeats`.
        """
        order, results = list(sides), dict.fromkeys(sides)
        runs: dict[str, list[float]] = {side: [] for side in order}
        peaks = dict.fromkeys(order, 0)
        for turn in range(0 if warm else -1, 1 if self.options.quick else repeats or self.options.repeats):
            for side in order if turn % 2 else order[::-1]:
                if turn < 0:
                    release_memory()
                reset_peak()
                spent, result = timed(sides[side], CLOCKS[self.options.clock])
                if turn < 0 or warm:
                    peaks[side] = max(peaks[side], peak_bytes())
                if isinstance(result, Timed):
                    spent, result = result.seconds, result.result
                results[side] = result
                if turn >= 0:
                    runs[side].append(spent)
        self.peak_bytes[what] = peaks
        self.seconds[what] = {
            side: {"minimum": min(times), "median": statistics.median(times), "n": len(times)}
            for side, times in runs.items()
        }
        self.ratios |= {f"{what}, {peer}": min(runs[peer]) / min(runs[order[0]]) for peer in order[1:]}
        self.differs |= {what: differs} if differs else {}
        say(f"{what}: " + ", ".join(f"{side} {min(times):.3g} s" for side, times in runs.items()))
        return results

    def apart(self, call: str) -> Any:
        """What `package.module.function(...)`, in a process of its own, prints as JSON."""
        module = call.partition("(")[0].rpartition(".")[0]
        code = f"import torch, {module}; torch.set_num_threads({self.options.threads}); {call}"
        command = [sys.executable, "-c", code]
        threads = {**os.environ, "OMP_NUM_THREADS": str(self.options.threads)}
        made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=threads)
        return json.loads(made.stdout)

    def trial(self, key: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]) -> None:
        """A trial of a benchmark that takes long: stored when done, so that a stopped run goes on.

        Arguments:
            key: what identifies the trial.
            work: gives what is to be stored of it.
        """
        if not any(key.items() <= trial.items() for trial in self.trials):
            self.trials.append({**key, **work()})
            say(str(self.trials[-1]))
            self._keep(self)

    def record(self) -> dict[str, Any]:
        """All that was measured; the last three parts only where there is something."""
        found = {name: getattr(self, name) for name in PARTS}
        return {name: value for name, value in found.items() if value or name in PARTS[:5]}


def main(measure: Callable[[Bench], None], *, threads: int = 2, **own: Any) -> None:
    """Run a benchmark from the command line.

    Arguments:
        measure: fills the `Bench` it is given.
        threads: for torch, unless the command line says otherwise.
        **own: the benchmark's own options and their defaults; a list takes several values.
    """
    name, doc = Path(sys.argv[0]).stem, sys.modules[measure.__module__].__doc__
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the whole record, not the ratios alone")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results as it is")
    parser.add_argument("--quick", action="store_true", help="less work, once; never written")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="processor: where the machine is not idle"
    )
    for option, value in {"repeats": 3, "threads": threads, **own}.items():
        several = isinstance(value, list)
        kind = type(value[0] if several else value)
        parser.add_argument(f"--{option}", type=kind, default=value, nargs="+" if several else None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of the peers
    stem, writes = getattr(options, "store", "") or name, not (options.no_write or options.quick)
    path = RESULTS / f"{stem}.json"

    def record(bench: Bench) -> dict[str, Any]:
        return {**bench.record(), **provenance(name, options.threads)}

    def write(bench: Bench) -> None:
        if writes:
            path.write_text(encoded(record(bench)), encoding="utf-8")

    stored = json.loads(path.read_text(encoding="utf-8")) if writes and path.exists() else {}
    bench = Bench(options, stored.get("trials"), write)
    measure(bench)
    bench.work |= {"clock": options.clock} if bench.ratios else {}
    write(bench)
    print(json.dumps(record(bench) if options.json else bench.ratios or bench.rates))


def encoded(record: Mapping[str, Any]) -> str:
    """A record as JSON, indented, with each trial on a line of its own."""
    rest = {name: value for name, value in record.items() if name != "trials"}
    text = json.dumps(rest, indent=1, ensure_ascii=False).removesuffix("\n}")
    trials = ",\n  ".join(json.dumps(trial, ensure_ascii=False) for trial in record.get("trials", ()))
    return text + (f',\n "trials": [\n  {trials}\n ]\n}}\n' if trials else "\n}\n")


def provenance(name: str, threads: int) -> dict[str, Any]:
    """Machine, date, command and commit."""
    return {
        "machine": machine(threads),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "commit": commit(),
    }


def machine(threads: int) -> dict[str, Any]:
    """What the numbers are measured on."""
    cpu, processor = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    for line in cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else ():
        processor = line.split(":", 1)[1].strip() if line.startswith("model name") else processor
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    device = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": processor, "cores": os.cpu_count(), "threads": threads, **versions, **device}


def fastest(candidates: list[int], work: Callable[[int], Any]) -> int:
    """Of several settings the one with which `work` is quickest, each tried once."""
    return min(candidates, key=lambda one: timed(lambda: work(one))[0])


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """Seconds of one run, and what it gave."""
    started = clock()
    result = work()
    return clock() - started, result


def release_memory() -> None:
    """Return freed memory to the system, so that one side's does not count as the other's."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # not in every libc
        trim(0)


def reset_peak() -> None:
    """Begin to measure peak memory anew, where the system lets a process do so."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The largest resident set of this process since `reset_peak`, or of its life."""
    path = Path("/proc/self/status")
    for line in path.read_text(encoding="ascii").splitlines() if path.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def counts(rate: Proportion) -> dict[str, int]:
    """A proportion as it is stored."""
    return {"successes": rate.successes, "trials": rate.trials}


def tally(outcomes: Iterable[bool]) -> dict[str, int]:
    """How many of the outcomes are true, as a rate is stored."""
    found = list(outcomes)
    return {"successes": sum(found), "trials": len(found)}


def pooled(rates: list[dict[str, int]]) -> dict[str, int]:
    """The rate over the trials of several."""
    return {part: sum(rate[part] for rate in rates) for part in ("successes", "trials")}


def say(text: str) -> None:
    """A line of progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def random_images(count: int, generator: torch.Generator) -> TrainingSet:
    """Smooth noise of CIFAR's shape with random labels; speed does not depend on what is shown."""
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, 32, mode="bilinear").mul(255).to(torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return TrainingSet(images, labels, tuple(str(label) for label in range(10)))
