"""How faithful an index of influences is: scores, verdicts and flags with one beside those without.

    unpoison bench recipes/verdict-sample.toml --out STORE
    unpoison bench recipes/index-cifar10.toml --out STORE2
    python -m recipes.index_study STORE [--suspects 5] [--sizes 512 1024 2048] [--most 20]
    python -m recipes.index_study STORE2 --data cifar10-train-0.parquet cifar10-test.parquet
        --held-out 400 2400
    unpoison bench recipes/delta-influence-matching-held-out.toml --out STORE3
    python -m recipes.index_study STORE3 --data cifar10-train cifar10-test.parquet --rows 20000 22500
        --held-out 2000 4000

For every poisoned network of the store: an index of the default size and of each other, and the exact engine,
with the same factors.

1. scores     of all training examples for inputs with the trigger and for natural errors (renormalised
              influence on the answer): Spearman correlation, and how many of the first 100 are the same;
2. verdicts   of `calibrated` for the same inputs, with a null that is made through the index: found or not;
              average precision, and the flags with `refine`;
3. seconds    of the processor: of a trace with its own calibration, of one through the index, and of
              further ones.

Answers are traced from the first 400 test images, the null is made of the others, as in the recipes. Writes
benchmarks/results/index.json after each network, and goes on from it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch
from benchmarks._harness import (
    RESULTS,
    encoded,
    machine,
    peak_bytes,
    pooled,
    provenance,
    reset_peak,
    say,
    tally,
)
from torch import Tensor

from unpoison import data
from unpoison.data import TrainingSet
from unpoison.detectors import Calibrated, Calibration, Findings, Observation
from unpoison.influence import InfluenceIndex, RelativeDamping, fit_factors, precondition, score
from unpoison.tasks import ClassificationTask
from unpoison.threats import PoisonSet
from unpoison.training import Trained, predict

TASK: Final = ClassificationTask()
DEFAULT: Final = "default"


def victims(store: Path) -> list[tuple[str, Path, Path]]:
    """Key, model and poison of every poisoned network of a store, in the order of their keys."""
    found = []
    for file in sorted(store.glob("artefacts/*/*/stage.json")):
        stage = json.loads(file.read_text(encoding="utf-8"))
        key = stage["inputs"].get("poison")
        if stage["kind"] == "train" and key:
            found.append(
                (file.parent.name, file.parent / "model", store / "artefacts" / key[:2] / key / "poison")
            )
    return found


def ranks(values: Tensor) -> Tensor:
    """The ranks of Float[n]."""
    return values.argsort().argsort().double()


def compared(exact: Tensor, found: Tensor) -> dict[str, float]:
    """Means over Float[q n] scores of q inputs."""
    correlations, shared = [], []
    for one, other in zip(exact, found, strict=True):
        correlations.append(float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1]))
        first = set(one.topk(100).indices.tolist())
        shared.append(len(first & set(other.topk(100).indices.tolist())) / 100)
    return {
        "spearman": sum(correlations) / len(correlations),
        "spearman_least": min(correlations),
        "first_100": sum(shared) / len(shared),
    }


def verdict(found: Findings, poison: PoisonSet) -> dict[str, Any]:
    """What is compared of findings."""
    return {
        "found": found.poison_found,
        "p": found.p_value,
        "precision": found.judge(poison).average_precision,
        "flags": sorted(found.flagged.tolist()),
    }


def study(
    model: torch.nn.Module,
    poison: PoisonSet,
    sets: tuple[TrainingSet, TrainingSet, TrainingSet],
    suspects: int,
    numbers: list[int],
) -> dict[str, Any]:
    """All of it for one network; `sets` are for training, to trace from, and for the null."""
    train, traced, reference = sets
    images, _ = poison.goal.victims(traced)
    answers, own = predict(model, images).argmax(1), predict(model, traced.images).argmax(1)
    hit = poison.goal.achieved(answers).nonzero()[:suspects, 0]
    wrong = (own != traced.labels).nonzero()[:suspects, 0]
    inputs = torch.cat([images[hit], traced.images[wrong]])
    labels = torch.cat([answers[hit], own[wrong]])
    detector, batch = Calibrated(), (inputs.float() / 255, labels)
    reset_peak()
    clock, seconds = time.process_time(), {}

    def lap(name: str) -> None:
        nonlocal clock
        now = time.process_time()
        seconds[name], clock = now - clock, now

    factors = fit_factors(model, train, TASK, seed=0)
    lap("factors")
    exact = detector.calibrate(model, train, reference, factors=factors)
    lap("calibration")

    def verdicts(calibration: Calibration, **more: Any) -> list[dict[str, Any]]:
        return [
            verdict(
                detector.find(
                    model,
                    train,
                    Observation(image, int(label)),
                    reference=reference,
                    calibration=calibration,
                    **more,
                ),
                poison,
            )
            for image, label in zip(inputs, labels, strict=True)
        ]

    without = verdicts(exact)
    lap("traces")
    peak = {"without": peak_bytes()}
    scores = score(
        model,
        precondition(model, factors, batch, TASK, damping=RelativeDamping()),
        train,
        TASK,
        gradient="measurement",
        gradient_norms=True,
    )
    assert scores.gradient_norms is not None
    norms, sizes = scores.gradient_norms.double(), {}
    for kept in [*numbers, None]:
        with tempfile.TemporaryDirectory() as folder:
            reset_peak()
            clock = time.process_time()
            index = InfluenceIndex.build(Path(folder, "index"), model, train, factors=factors, numbers=kept)
            lap("index")
            peak["index"] = peak_bytes()
            found = index.influence(index.queries(model, batch))
            sizes[str(kept or DEFAULT)] = row = compared(scores.values.double() / norms, found / norms)
            clock = time.process_time()
            calibration = detector.calibrate(model, train, reference, index=index)
            lap("calibration through the index")
            through = verdicts(calibration, index=index, refine=0)
            lap("traces through the index")
            refined = verdicts(calibration, index=index)
            lap("traces, refined")
            row["captured"], row["numbers"] = float(index.captured().mean()), index.numbers
        row["verdicts"] = tally(a["found"] == b["found"] for a, b in zip(without, through, strict=True))
        both = [
            (a, b, c) for a, b, c in zip(without, through, refined, strict=True) if a["found"] and b["found"]
        ]
        row["precision_difference"] = max(
            (abs(a["precision"] - b["precision"]) for a, b, _ in both), default=0
        )
        row["precision_difference_refined"] = max(
            (abs(a["precision"] - c["precision"]) for a, _, c in both), default=0
        )
        row["flags"] = tally(a["flags"] == b["flags"] for a, b, _ in both)
        row["flags_refined"] = tally(a["flags"] == c["flags"] for a, _, c in both)
        row["seconds"] = dict(seconds)
    return {
        "poisons": len(poison),
        "triggered": len(hit),
        "errors": len(wrong),
        "found": sum(one["found"] for one in without),
        "sizes": sizes,
        "peak_bytes": peak,
    }


def ratios_of(seconds: dict[str, float], count: float) -> dict[str, float]:
    """Ten traces without an index over ten with one; a first trace over a further one, and without over with.

    Arguments:
        seconds: of one network; those of traces are of `count` inputs.
        count: how many inputs were traced.
    """
    first = sum(seconds[name] for name in ("factors", "index", "calibration through the index"))
    further = seconds["traces through the index"] / count
    today = seconds["factors"] + seconds["calibration"] + seconds["traces"] / count
    return {
        "ten suspects": 10 * today / (first + 10 * further),
        "first suspect": today / (first + further),
        "further suspect": (first + further) / further,
    }


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, and rates over all inputs, by data and size; ratios and memory of the default size."""
    agreement: dict[str, float] = {}
    rates: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for name in sorted({trial["data"] for trial in trials}):
        own = [trial for trial in trials if trial["data"] == name]
        for size in sorted(
            {size for trial in own for size in trial["sizes"]}, key=lambda key: (len(key), key)
        ):
            rows = [trial["sizes"][size] for trial in own if size in trial["sizes"]]
            key = f"{name}, {size}"
            for what in ("spearman", "first_100", "captured"):
                agreement[f"{what}, {key}"] = sum(row[what] for row in rows) / len(rows)
            agreement[f"spearman_least, {key}"] = min(row["spearman_least"] for row in rows)
            for what in ("precision_difference", "precision_difference_refined"):
                agreement[f"{what}, {key}"] = max(row[what] for row in rows)
            for what in ("verdicts", "flags", "flags_refined"):
                rates[f"{what}, {key}"] = pooled([row[what] for row in rows])
        parts = [trial["sizes"][DEFAULT]["seconds"] for trial in own]
        seconds = {part: sum(one[part] for one in parts) / len(parts) for part in parts[0]}
        count = sum(trial["triggered"] + trial["errors"] for trial in own) / len(own)
        ratios |= {f"{what}, {name}": value for what, value in ratios_of(seconds, count).items()}
    peaks = {part: max(trial["peak_bytes"][part] for trial in trials) for part in ("without", "index")}
    return {
        "ratios": ratios,
        "agreement": agreement,
        "seconds": {},
        "peak_bytes": peaks,
        "rates": rates,
    }


def main() -> None:
    """Study every network that has not been, and keep what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--suspects", type=int, default=5, help="of either kind, of each network")
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1024, 2048], help="numbers an example")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most", type=int, default=20, help="networks")
    parser.add_argument("--data", nargs=2, help="files of training and test images, not those of the sample")
    parser.add_argument("--held-out", type=int, nargs=2, default=[400, 1000], help="test images for the null")
    parser.add_argument("--rows", type=int, nargs=2, help="of the training images")
    parser.add_argument("--out", type=Path, default=RESULTS / "index.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stored = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    trials: list[dict[str, Any]] = [one for one in stored.get("trials", []) if "data" in one]
    splits = data.load(arguments.data[0], test=arguments.data[1]) if arguments.data else data.sample()
    assert splits.test is not None
    train, test = splits.train, splits.test
    if arguments.rows:
        train = train.subset(range(*arguments.rows))
    traced, reference = test.subset(range(400)), test.subset(range(*arguments.held_out))
    for key, model, poison in victims(arguments.store)[: arguments.most]:
        if any(trial["network"] == key for trial in trials):
            continue
        crafted = PoisonSet.load(poison)
        sets = crafted.apply(train), traced, reference
        trials.append(
            {
                "network": key,
                "attack": crafted.attack,
                "data": Path(splits.train.name).name,
                **study(Trained.load(model).model, crafted, sets, arguments.suspects, arguments.sizes),
            }
        )
        say(json.dumps(trials[-1]))
        command = f"python -m recipes.index_study STORE --suspects {arguments.suspects}"
        record = {
            **summary(trials),
            **provenance("index", arguments.threads),
            "command": command,
            "machine": machine(arguments.threads),
            "trials": trials,
        }
        arguments.out.write_text(encoded(record), encoding="utf-8")


if __name__ == "__main__":
    main()
