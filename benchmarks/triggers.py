"""Trigger attacks at their published rates, on the bundled sample: does each of them work here?

    OMP_NUM_THREADS=1 python -m benchmarks.triggers [--limit 5] --json

A trial crafts the poison, trains a victim on it by the recipe `sample`, and counts on the 1,000 test images
how often stamped images are answered with the target (attack success), how often clean ones are answered
rightly (clean accuracy), and both again for a control of the same seed that was trained without poison. Three
trials of each attack: the targets are the classes 0, 1 and 2, from all other classes; hidden-trigger and
Sleeper Agent name one source each, as their papers do. Surrogates are trained on the same clean set as the
victim, from another seed.

Trials are kept in benchmarks/results/triggers.json one by one, so a run that is stopped, or given `--limit`,
goes on where it was. Half a minute a trial on one core, five for Sleeper Agent, which trains its surrogate
four times.

Published figures are those of CIFAR-10 and ResNet-18, so they stand beside ours and not against them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unpoison import attacks, data
from unpoison._statistics import Proportion
from unpoison.attacks import Attack
from unpoison.threats import Backdoor, Budget, PatchTrigger, RandomPatchTrigger, Trigger
from unpoison.training import Recipe, Trained, accuracy, train

RESULTS = Path(__file__).parent / "results" / "triggers.json"
SEEDS = (0, 1, 2)
SOURCES = (6, 3, 4)  # of the attacks with one source: shirt to t-shirt, dress to trouser, coat to pullover


@dataclasses.dataclass(frozen=True)
class Case:
    """One attack as it was published."""

    attack: Callable[[], Attack]
    budget: Budget
    trigger: Callable[[], Trigger] = PatchTrigger.white_corner
    one_source: bool = False
    surrogate: str = ""
    published: str = ""
    note: str = ""


CASES = {
    "badnets": Case(attacks.BadNets, Budget(share=0.1), note="10 % of the set, 3x3 white corner"),
    "blended": Case(attacks.Blended, Budget(share=0.1), note="10 % of the set, noise, alpha 0.2"),
    "smooth-trigger": Case(
        attacks.SmoothTrigger, Budget(share=0.1), surrogate="clean", note="10 % of the set, reach 0.2"
    ),
    "wanet": Case(
        attacks.WaNet, Budget(share=0.3), note="10 % poisons and 20 % covers, a field of 4x4, strength 0.5"
    ),
    "sig": Case(attacks.Sig, Budget(share=0.01), note="1 % of the set, which is 10 % of the class"),
    "sig, 4 %": Case(attacks.Sig, Budget(share=0.04), note="4 % of the set, which is 40 % of the class"),
    "label-consistent": Case(
        attacks.LabelConsistent,
        Budget(share=0.01),
        trigger=functools.partial(PatchTrigger.white_corner, size=5),
        surrogate="adversarial",
        note="1 % of the set, eps 8, 5x5 patch of full strength",
    ),
    "label-consistent, benchmark": Case(
        attacks.LabelConsistent.benchmark,
        Budget(share=0.01),
        trigger=functools.partial(PatchTrigger.white_corner, size=5),
        surrogate="adversarial",
        published="0 % (poisoning benchmark, from scratch)",
        note="1 % of the set, everything within eps 8",
    ),
    "hidden-trigger": Case(
        lambda: attacks.HiddenTrigger(steps=1000),
        Budget(share=0.01),
        trigger=functools.partial(RandomPatchTrigger.coloured, 8, channels=1, seed=0),
        one_source=True,
        surrogate="clean",
        published="0 % (poisoning benchmark, from scratch)",
        note="1 % of the set, eps 16, 8x8 patch anywhere, 1,000 steps instead of 5,000",
    ),
    "sleeper-agent": Case(
        lambda: attacks.SleeperAgent(recipe="sample", augmentation="crop", shift=1),
        Budget(share=0.01),
        trigger=functools.partial(RandomPatchTrigger.coloured, 8, channels=1, seed=0),
        one_source=True,
        surrogate="clean",
        published="85.27 % (mean over pairs of classes)",
        note="1 % of the set, eps 16, 8x8 patch anywhere, 4 retrainings",
    ),
}


class Bench:
    """The sample, its recipe, and the networks that several trials share."""

    def __init__(self) -> None:
        splits = data.sample()
        assert splits.test is not None
        self.clean, self.test = splits.train, splits.test
        self.recipe = Recipe.preset("sample")
        self.made: dict[tuple[str, int], torch.nn.Module] = {}

    def network(self, kind: str, seed: int) -> torch.nn.Module:
        """A control, a clean surrogate (of another seed) or an adversarially trained one."""
        if (kind, seed) not in self.made:
            if kind == "adversarial":
                start = self.network("clean", seed)
                network = attacks.adversarially_trained(start, self.clean, epochs=3, seed=seed)
            else:
                trained: Trained = train(self.clean, self.recipe, seed=seed + 100 * (kind == "clean"))
                network = trained.model
            self.made[kind, seed] = network
        return self.made[kind, seed]

    def trial(self, name: str, seed: int) -> dict[str, Any]:
        """One attack, one victim, one control."""
        case = CASES[name]
        source = SOURCES[seed] if case.one_source else None
        goal = Backdoor(case.trigger(), source, seed)
        surrogate = self.network(case.surrogate, seed) if case.surrogate else None
        control = self.network("control", seed)
        started = time.perf_counter()
        poison = case.attack().craft(goal, self.clean, budget=case.budget, surrogate=surrogate, seed=seed)
        crafted = time.perf_counter()
        victim = train(poison.apply(self.clean), self.recipe, seed=seed).model
        return {
            "attack": name,
            "seed": seed,
            "source": source,
            "target": seed,
            "poisons": len(poison),
            "linf": float(poison.linf.max()),
            "success": poison.goal.success(victim, self.test).to_dict(),
            "control_success": poison.goal.success(control, self.test).to_dict(),
            "clean_accuracy": accuracy(victim, self.test).to_dict(),
            "control_accuracy": accuracy(control, self.test).to_dict(),
            "seconds": {"craft": crafted - started, "train": time.perf_counter() - crafted},
        }


def pooled(trials: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """The rate over all test images of all trials."""
    parts = [trial[what] for trial in trials]
    return Proportion(sum(one["successes"] for one in parts), sum(one["trials"] for one in parts)).to_dict()


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """For each attack the rates over its trials, and the least and greatest of them."""
    rows = {}
    for name, case in CASES.items():
        own = [trial for trial in trials if trial["attack"] == name]
        if not own:
            continue
        rates = [trial["success"]["rate"] for trial in own]
        rows[name] = {
            "labels": attacks.describe(name.partition(",")[0]).labels,
            "setting": case.note,
            "trials": len(own),
            **{
                what: pooled(own, what)
                for what in ("success", "control_success", "clean_accuracy", "control_accuracy")
            },
            "success_of_each_trial": rates,
            "published": case.published or None,
        }
    return rows


def main() -> None:
    """Run the trials that are missing, and keep each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    parser.add_argument("--limit", type=int, default=None, help="how many trials to run now")
    parser.add_argument("--anew", action="store_true", help="forget the trials that are kept")
    parser.add_argument("--only", nargs="*", default=list(CASES), help="these attacks")
    options = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.anew else {}
    trials: list[dict[str, Any]] = kept.get("trials", [])
    done = {(trial["attack"], trial["seed"]) for trial in trials}
    # Seed by seed, so that networks are shared and every attack has a trial early.
    missing = [(name, seed) for seed in SEEDS for name in CASES if name in options.only]
    missing = [one for one in missing if one not in done][: options.limit]
    bench = Bench()
    for name, seed in missing:
        trial = bench.trial(name, seed)
        trials.append(trial)
        if not options.json:
            print(f"{name:28s} seed {seed}: success {100 * trial['success']['rate']:5.1f} %", file=sys.stderr)
        write(trials)
    print(json.dumps(write(trials)))


def write(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Keep what there is."""
    trials.sort(key=lambda trial: (list(CASES).index(trial["attack"]), trial["seed"]))
    result = {
        "name": "triggers",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.triggers --json",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "ratios": {},
        "agreement": {},
        "seconds": {
            f"{trial['attack']}, seed {trial['seed']}: {what}": seconds
            for trial in trials
            for what, seconds in trial["seconds"].items()
        },
        "peak_bytes": {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024},
        "attacks": summary(trials),
        "trials": trials,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
