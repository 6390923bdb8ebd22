"""What an index gains over the version before it: ten traces by that version, and ten by this one.

    git worktree add --detach BEFORE f2be205
    unpoison bench recipes/verdict-sample.toml --out STORE
    python -m recipes.version_before STORE --before BEFORE [--networks 2] [--traces 3]
    unpoison bench recipes/verdict-cifar10.toml --out STORE2
    python -m recipes.version_before STORE2 --before BEFORE --networks 1
        --data cifar10-train-2.parquet cifar10-test.parquet --held-out 400 2400

Version 0.1 reads the training set anew for every suspect, twice for the factors and once for the scores. Each
version runs in a process of its own, on the same poisoned networks, suspects (half triggered, half natural
errors) and labelled held-out images, by its own defaults. Processor seconds, of one thread and without
imports:

- version 0.1: of each of the first `--traces` suspects;
- this version, without an index: of the first trace, its calibration included, and of each further one;
- with an index: of making it, with its factors, of its calibration, and of ten traces.

Writes benchmarks/results/version_before.json; a set that has been measured is measured anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, Final

import torch

ROOT: Final = Path(__file__).parents[1]
SUSPECTS: Final = 10
BEFORE: Final = "version 0.1"


def poisoned(store: Path) -> list[tuple[Path, Path]]:
    """Model and poison of every poisoned network of a store."""
    found = []
    for file in sorted(store.glob("artefacts/*/*/stage.json")):
        stage = json.loads(file.read_text(encoding="utf-8"))
        key = stage["inputs"].get("poison")
        if stage["kind"] == "train" and key:
            found.append((file.parent / "model", store / "artefacts" / key[:2] / key / "poison"))
    return found


def seconds_of(work: Callable[[], Any]) -> float:
    """Processor seconds of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The seconds of the version that is imported here."""
    from unpoison import data, detectors
    from unpoison.detectors import Observation
    from unpoison.threats import PoisonSet
    from unpoison.training import Trained, predict

    splits = data.load(options.data[0], test=options.data[1]) if options.data else data.sample()
    test = splits.test
    assert test is not None
    traced, reference = test.subset(range(400)), test.subset(range(*options.held_out))
    model_at, poison_at = poisoned(options.store)[options.network]
    poison, model = PoisonSet.load(poison_at), Trained.load(model_at).model
    train = poison.apply(splits.train)
    images, _ = poison.goal.victims(traced)
    answers, own = predict(model, images).argmax(1), predict(model, traced.images).argmax(1)
    hit = poison.goal.achieved(answers).nonzero()[: SUSPECTS // 2, 0]
    wrong = (own != traced.labels).nonzero()[: SUSPECTS - len(hit), 0]
    inputs = torch.cat([images[hit], traced.images[wrong]])
    suspects = [
        Observation(image, int(label))
        for image, label in zip(inputs, torch.cat([answers[hit], own[wrong]]), strict=True)
    ]
    if not hasattr(detectors, "Calibrated"):
        before: Any = detectors.get("delta-influence", preset="calibrated")
        each = [
            seconds_of(lambda one=one: before.find(model, train, one, reference=reference))  # type: ignore[misc]
            for one in suspects[: options.traces]
        ]
        return {"attack": poison.attack, "examples": len(train), "traces": each}
    from unpoison.influence import InfluenceIndex

    detector, known = detectors.Calibrated(), {}

    def calibrate(**how: Any) -> None:
        known["calibration"] = detector.calibrate(model, train, reference, **how)

    def trace(suspect: Observation, **how: Any) -> Any:
        return detector.find(model, train, suspect, reference=reference, **known, **how)

    found = {"first": seconds_of(calibrate) + seconds_of(lambda: trace(suspects[0]))}
    found["further"] = mean(seconds_of(lambda one=one: trace(one)) for one in suspects[1:4])  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index")
        found["index"] = seconds_of(lambda: known.update(index=InfluenceIndex.build(path, model, train)))
        index: Any = known.pop("index")
        found["index calibration"] = seconds_of(lambda: calibrate(index=index))
        each = [seconds_of(lambda one=one: trace(one, index=index)) for one in suspects]  # type: ignore[misc]
        disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"parameters": index.factors.num_parameters, "disk": disk, **found, "traces": each}


def compared(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Seconds of this version, and of the one before."""
    old, further = mean(before["traces"]), mean(now["traces"])
    ready = now["index"] + now["index calibration"]
    return {
        "a first trace": (now["first"], old),
        "a first trace, with its index": (ready + further, old),
        "a further trace": (now["further"], old),
        "a further trace, with an index": (further, old),
        "ten traces, with their index": (ready + 10 * further, 10 * old),
    }


def record_of(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the networks of each set, in the shape of the benchmarks."""
    seconds: dict[str, Any] = {}
    for data in sorted({trial["data"] for trial in trials}):
        own = [compared(one["before"], one["now"]) for one in trials if one["data"] == data]
        for what in own[0]:
            ours, theirs = zip(*(one[what] for one in own), strict=True)
            seconds[f"{what}, {data}"] = {
                side: {"minimum": mean(values), "median": mean(values), "n": len(values)}
                for side, values in (("unpoison", ours), (BEFORE, theirs))
            }
    ratios = {
        f"{what}, {BEFORE}": sides[BEFORE]["minimum"] / sides["unpoison"]["minimum"]
        for what, sides in seconds.items()
    }
    differs = {
        what: f"its null; {'rows of an index' if 'index' in what else 'its passes'}" for what in seconds
    }
    parts = {part: {} for part in ("agreement", "peak_bytes", "rates")}
    return {"ratios": ratios, "seconds": seconds, "differs": differs, **parts}


def child(tree: Path, arguments: list[str]) -> dict[str, Any]:
    """What a version measures, in a process of its own."""
    environment = {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), *arguments, "--one"]
    told = subprocess.run(command, env=environment, cwd=tree, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure both versions on some networks, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store", type=lambda text: Path(text).resolve())
    parser.add_argument("--before", type=Path)
    parser.add_argument("--networks", type=int, default=2)
    parser.add_argument("--traces", type=int, default=3, help="by the version before")
    parser.add_argument("--data", nargs=2, type=lambda text: str(Path(text).resolve()))
    parser.add_argument("--held-out", type=int, nargs=2, default=[400, 1000])
    parser.add_argument("--network", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure(options)))
        return
    from benchmarks._harness import RESULTS, encoded, provenance, say

    given = [str(options.store), "--traces", str(options.traces)]
    given += ["--data", *options.data] if options.data else []
    given += ["--held-out", *map(str, options.held_out)]
    name = Path(options.data[0]).name if options.data else "sample"
    out = RESULTS / "version_before.json"
    stored = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"trials": []}
    trials = [trial for trial in stored["trials"] if trial["data"] != name]
    for number in range(options.networks):
        arguments = [*given, "--network", str(number)]
        before, now = child(options.before.resolve(), arguments), child(ROOT, arguments)
        trials.append({"data": name, "before": before, "now": now})
        record = record_of(trials)
        say(json.dumps(record["ratios"]))
        record |= {**provenance("version_before", 1), "trials": trials}
        record["command"] = "python -m recipes.version_before STORE --before BEFORE, and again with STORE2"
        out.write_text(encoded(record), encoding="utf-8")


if __name__ == "__main__":
    main()
