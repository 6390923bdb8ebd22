"""Stages that only log that they were done, plans of them, and an executor without processes.

Workers import this module by its name, so the folder is on the path (see conftest.py).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unpoison._executors import Done
from unpoison.evaluation import Executor, LocalExecutor, Plan, Stage, sweep, write_row


def work(
    configuration: Mapping[str, Any],
    inputs: Mapping[str, Path],
    surroundings: Mapping[str, Any],
    out: Path,
) -> None:
    """Note the name in the log, write the names of what was read; or die, or raise, when asked to."""
    name, log = configuration["name"], Path(surroundings["log"])
    time.sleep(surroundings.get("seconds", 0))
    with open(log, "a", encoding="utf-8") as lines:
        lines.write(f"{name}\n")
    if name in surroundings.get("broken", ()):
        raise ValueError("this stage | is <broken>")
    again = surroundings.get("always") or not log.with_suffix(".killed").exists()
    if name == surroundings.get("killer") and again:
        log.with_suffix(".killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    read = sorted((place / "text").read_text(encoding="utf-8") for place in inputs.values())
    (out / "text").write_text(f"{name}({','.join(read)})", encoding="utf-8")
    if configuration["row"] is not None:
        write_row(out, configuration["row"], {"seconds_train": time.perf_counter()})


def make_row(seed: int, detector: str = "none", **changes: Any) -> dict[str, Any]:
    """A row as `measure` writes it: of a control without detector, or of a detector that flags half."""
    row: dict[str, Any] = {
        "attack": "badnets",
        "budget": 0.02,
        "source": "left",
        "target": "right",
        "test_indices": [],
        "seed": seed,
        "victim": "default",
        "number": 0,
        "defense": "none",
        "detector": detector,
        "observation": 0,
        "unlearner": "none",
        "control": "no defense" if detector == "none" else "",
        "poisons": 10,
        "poison_share": 0.02,
        "clean_correct": 80 + seed,
        "clean_total": 100,
        "margin": 0.5,
        "attack_successes": 30,
        "attack_total": 40,
        "class_names": ["left", "right"],
        "class_correct": [50, 30 + seed],
        "class_total": [50, 50],
    }
    if detector != "none":
        row |= {
            "observed": True,
            "flagged": 9,
            "found": True,
            "true_positives": 5,
            "false_positives": 4,
            "clean_examples": 490,
            "average_precision": 0.5,
            "class_false_positives": [4, 0],
            "class_clean": [240, 250],
            "attack_successes": 4,
        }
    return {**row, **changes}


def make_plan(log: Path, trials: int = 3, name: str = "fake", **surroundings: Any) -> Plan:
    """A poison and a victim that all trials share, and for each trial a find and a measure stage."""
    around = {"log": str(log), **surroundings}

    def stage(kind: str, word: str, inputs: dict[str, str], row: Any = None) -> Stage:
        return Stage(kind, "fake_stages:work", {"name": word, "row": row}, inputs, around)

    poison = stage("craft", "poison", {})
    victim = stage("train", "victim", {"poison": poison.key})
    stages, rows = [poison, victim], []
    for trial in range(trials):
        stages.append(stage("find", f"find {trial}", {"victim": victim.key}))
        row = make_row(trial // 2, "none" if trial % 2 else "corner")
        stages.append(stage("measure", f"measure {trial}", {"findings": stages[-1].key}, row))
        rows.append(stages[-1].key)
    return Plan(name, {"description": "a <test>"}, tuple(stages), tuple(rows))


class InlineExecutor(Executor):
    """Does everything in this process, at once."""

    def __init__(self) -> None:
        self.workers = 1
        self.done: list[Done] = []

    def share(self, value: Any) -> None:
        """Nothing is."""

    def submit(self, key: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Do it."""
        self.done.append(Done(key, function(*arguments)))

    def wait(self) -> list[Done]:
        """What was done."""
        done, self.done = self.done, []
        return done

    def close(self) -> None:
        """Nothing to stop."""


if __name__ == "__main__":  # what a test kills: LOG STORE TRIALS SECONDS
    plan = make_plan(Path(sys.argv[1]), int(sys.argv[3]), seconds=float(sys.argv[4]))
    with LocalExecutor(2) as executor:
        sweep(plan, sys.argv[2], executor)
