"""What scanners find of poison without a suspect, and how often they raise a false alarm, on the same sets.

    unpoison bench recipes/verdict-null-sample.toml --out CLEAN
    unpoison bench recipes/verdict-sample-power.toml --out POISONED
    python -m recipes.scan_study CLEAN POISONED [--most 40] [--but KEY ...]

Networks of the stores, of each in turn; those without poison show false alarms alone. `--but` names those
that the level of `gradient-clusters` was chosen on. Scanners have default options, `gradient-clusters` makes
an index of its own. Of each network and scanner:

- average precision of the scores, where there is poison;
- poisons flagged, and other examples flagged, each of how many;
- labels without poison of which any example is flagged, of how many;
- for `gradient-clusters` the largest separation of a label with poison, and of one without.

Writes benchmarks/results/scan.json after each network, and goes on from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from benchmarks._harness import RESULTS, encoded, pooled, provenance, say, tally, timed

from unpoison import data
from unpoison.data import TrainingSet
from unpoison.detectors import Findings, get
from unpoison.threats import PoisonSet
from unpoison.training import Trained

SCANNERS: Final = (
    "gradient-clusters",
    "spectral-signatures",
    "activation-clustering",
    "spectre",
    "statistical-contamination",
)
NONE: Final = "no poison"
COUNTS: Final = ("poison flagged", "others flagged", "labels without poison flagged")


def networks(store: Path) -> Iterator[tuple[str, Path, PoisonSet | None]]:
    """Key, model and poison, if there is any, of every network of a store that was trained as a victim."""
    for file in sorted(store.glob("artefacts/*/*/stage.json")):
        stage = json.loads(file.read_text(encoding="utf-8"))
        if stage["kind"] == "train":
            key = stage["inputs"].get("poison")
            poison = PoisonSet.load(store / "artefacts" / key[:2] / key / "poison") if key else None
            yield file.parent.name, file.parent / "model", poison


def judged(found: Findings, train: TrainingSet, poison: PoisonSet | None, seconds: float) -> dict[str, Any]:
    """What is kept of the findings of one scanner."""
    truth, flagged = torch.zeros(len(train), dtype=torch.bool), found.mask()
    if poison is not None:
        truth[poison.indices] = True
    poisoned = set(train.labels[truth].tolist())
    clean = [label for label in range(train.num_classes) if label not in poisoned]
    alarmed = set(train.labels[flagged].tolist())
    separations = found.evidence.get("separation")

    def largest(labels: set[int]) -> float | None:
        if separations is None or not labels:
            return None
        return float(separations[torch.isin(train.labels, torch.tensor(sorted(labels)))].max())

    return {
        "average precision": None if poison is None else found.judge(poison).average_precision,
        "poison flagged": tally(flagged[truth].tolist()),
        "others flagged": tally(flagged[~truth].tolist()),
        "labels without poison flagged": tally(label in alarmed for label in clean),
        "separation with poison": largest(poisoned),
        "separation without": largest(set(clean)),
        "seconds": round(seconds, 2),
    }


def kind_of(poison: PoisonSet | None, examples: int) -> str:
    """Attack, which classes to one, and share; or that there is none."""
    if poison is None:
        return NONE
    source = getattr(poison.goal, "source", None)
    whose = "all classes to one" if source is None else "one class to one"
    return f"{poison.attack}, {whose}, {100 * len(poison) / examples:.1f} %"


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates of every scanner over all networks of a kind and over all poisoned ones, and mean precisions."""
    found = []
    poisoned = [trial for trial in trials if trial["poison"] != NONE]
    kinds = sorted({trial["poison"] for trial in trials})
    groups = [(kind, [trial for trial in trials if trial["poison"] == kind]) for kind in kinds]
    for (kind, group), name in itertools.product([*groups, ("any poison", poisoned)], SCANNERS):
        own = [trial for trial in group if trial["scanner"] == name]
        precisions = [trial["average precision"] for trial in own]
        row: dict[str, Any] = {"poison": kind, "networks": len(own), "scanner": name}
        if own and None not in precisions:
            row["average precision"] = sum(precisions) / len(own)
        row |= {what: pooled([trial[what] for trial in own]) for what in COUNTS}
        row["networks with false alarms"] = tally(trial["others flagged"]["successes"] > 0 for trial in own)
        found.append(row)
    without = [one["separation without"] for one in trials if one["separation without"] is not None]
    return {"scanners": found, "largest separation of a label without poison": max(without)}


def main() -> None:
    """Scan every network that has not been, and keep what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--most", type=int, default=40, help="networks")
    parser.add_argument("--but", nargs="*", default=[], help="how the keys of networks to leave out begin")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "scan.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stored = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    trials: list[dict[str, Any]] = stored.get("trials", [])
    clean = data.sample().train
    turns = itertools.zip_longest(*map(networks, arguments.stores))
    every = [one for turn in turns for one in turn if one and not one[0].startswith(tuple(arguments.but))]
    for key, model, poison in every[: arguments.most]:
        if any(trial["network"] == key[:8] for trial in trials):
            continue
        train = clean if poison is None else poison.apply(clean)
        network = Trained.load(model).model
        for name in SCANNERS:
            seconds, found = timed(lambda: get(name).find(network, train, seed=0), time.process_time)  # noqa: B023
            of = {"network": key[:8], "poison": kind_of(poison, len(train)), "scanner": name}
            trials.append({**of, **judged(found, train, poison, seconds)})
            say(json.dumps(trials[-1]))
        record = {
            **summary(trials),
            **provenance("scan", arguments.threads),
            "command": "python -m recipes.scan_study CLEAN POISONED --but 12dc6fda 358bb325",
            "trials": trials,
        }
        arguments.out.write_text(encoded(record), encoding="utf-8")


if __name__ == "__main__":
    main()
