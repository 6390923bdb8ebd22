"""How faithful an index of influences is: scores, verdicts and flags with one beside those without.

    unpoison bench recipes/verdict-sample.toml --out STORE
    python -m recipes.index_study STORE [--suspects 5] [--sizes 512 1024 2048] [--most 20]

For every poisoned network of the store: an index of each size and the exact engine, with the same factors.

1. scores     of all training examples for inputs with the trigger and for natural errors (renormalised
              influence on the answer): Spearman correlation, and how many of the first 100 are the same;
2. verdicts   of `calibrated` for the same inputs, with a null that is made through the index: found or not;
              average precision, and the flags with `refine`;
3. seconds    of the processor: of a trace with its own calibration, of one through the index, and of
              further ones.

The test set is split as in the recipe: answers are traced from its first 400 images, the null is made of the
others. Writes benchmarks/results/index.json after each network, and goes on from it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch
from benchmarks._harness import RESULTS, encoded, machine, peak_bytes, provenance, reset_peak, say, tally
from torch import Tensor

from unpoison import data
from unpoison.detectors import Calibrated, Calibration, Findings, Observation
from unpoison.influence import InfluenceIndex, RelativeDamping, fit_factors, precondition, score
from unpoison.tasks import ClassificationTask
from unpoison.threats import PoisonSet
from unpoison.training import Trained, predict

TASK: Final = ClassificationTask()


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


def study(model: torch.nn.Module, poison: PoisonSet, suspects: int, numbers: list[int]) -> dict[str, Any]:
    """All of it for one network."""
    sample = data.sample()
    assert sample.test is not None
    train, test = poison.apply(sample.train), sample.test
    traced, reference = test.subset(range(400)), test.subset(range(400, len(test)))
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
    for kept in numbers:
        with tempfile.TemporaryDirectory() as folder:
            reset_peak()
            clock = time.process_time()
            index = InfluenceIndex.build(Path(folder, "index"), model, train, factors=factors, numbers=kept)
            lap("index")
            peak["index"] = peak_bytes()
            found = index.influence(index.queries(model, batch))
            sizes[str(kept)] = row = compared(scores.values.double() / norms, found / norms)
            clock = time.process_time()
            calibration = detector.calibrate(model, train, reference, index=index)
            lap("calibration through the index")
            through = verdicts(calibration, index=index, refine=0)
            lap("traces through the index")
            refined = verdicts(calibration, index=index)
            lap("traces, refined")
            row["captured"] = float(index.captured().mean())
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
    """Ten traces without an index over ten with one, and a first trace over a further one.

    Arguments:
        seconds: of one network; those of traces are of `count` inputs.
        count: how many inputs were traced.
    """
    first = sum(seconds[name] for name in ("factors", "index", "calibration through the index"))
    further = seconds["traces through the index"] / count
    today = seconds["factors"] + seconds["calibration"] + seconds["traces"] / count
    return {
        "ten suspects": 10 * today / (first + 10 * further),
        "further suspect": (first + further) / further,
    }


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, and rates over all inputs, by size; ratios of the largest."""
    sizes = sorted(map(int, trials[0]["sizes"]))
    largest = str(sizes[-1])
    agreement: dict[str, Any] = {}
    rates: dict[str, Any] = {}
    for numbers in map(str, sizes):
        rows = [trial["sizes"][numbers] for trial in trials]
        for name in ("spearman", "first_100", "captured"):
            agreement[f"{name}, {numbers}"] = sum(row[name] for row in rows) / len(rows)
        agreement[f"spearman_least, {numbers}"] = min(row["spearman_least"] for row in rows)
        for name in ("precision_difference", "precision_difference_refined"):
            agreement[f"{name}, {numbers}"] = max(row[name] for row in rows)
        for name in ("verdicts", "flags", "flags_refined"):
            rates[f"{name}, {numbers}"] = {
                part: sum(row[name][part] for row in rows) for part in ("successes", "trials")
            }
    last = [row["seconds"] for trial in trials if "seconds" in (row := trial["sizes"][largest])]
    seconds = {name: sum(one[name] for one in last) / len(last) for name in (last[0] if last else ())}
    count = sum(trial["triggered"] + trial["errors"] for trial in trials) / len(trials)
    for name in ("spearman", "first_100"):
        agreement[name] = agreement[f"{name}, {largest}"]
    of_verdicts = rates[f"verdicts, {largest}"]
    agreement["verdicts"] = of_verdicts["successes"] / of_verdicts["trials"]
    return {
        "ratios": ratios_of(seconds, count) if last else {},
        "agreement": agreement,
        "seconds": seconds,
        "peak_bytes": {
            side: max(trial["peak_bytes"][side] for trial in trials) for side in ("without", "index")
        },
        "rates": rates,
    }


def main() -> None:
    """Study every network that has not been, and keep what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--suspects", type=int, default=5, help="of either kind, of each network")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most", type=int, default=20, help="networks")
    parser.add_argument("--out", type=Path, default=RESULTS / "index.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stored = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    trials: list[dict[str, Any]] = stored.get("trials", [])
    for key, model, poison in victims(arguments.store)[: arguments.most]:
        if any(trial["network"] == key for trial in trials):
            continue
        crafted = PoisonSet.load(poison)
        trials.append(
            {
                "network": key,
                "attack": crafted.attack,
                **study(Trained.load(model).model, crafted, arguments.suspects, arguments.sizes),
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
