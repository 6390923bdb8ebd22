"""How often does tracing find poison where there is none?

    python -m benchmarks.false_alarms [--errors 40] [--seed 0] --json

Trains an unpoisoned model on the bundled sample and traces its natural errors on the test images, one at a
time and in order, with the calibrated preset: every "poison found" is a false alarm. The stated level is 1 %.
Numbers go to benchmarks/results/false_alarms.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from unpoison import data, detectors, training
from unpoison._statistics import Proportion
from unpoison.detectors import NullDistribution, Observation
from unpoison.influence import ClassificationTask, fit_factors


def main() -> None:
    """Trace natural errors and count the alarms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--errors", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    splits = data.sample()
    assert splits.test is not None
    test = splits.test
    recipe = training.Recipe.preset("sample")
    start = time.perf_counter()
    trained = training.train(splits.train, recipe, seed=options.seed)
    detector = detectors.get("delta-influence", preset="calibrated", seed=options.seed)
    assert isinstance(detector.rule, NullDistribution)
    factors = fit_factors(trained.model, splits.train, ClassificationTask(), seed=options.seed)
    answers = training.predict(trained.model, test.images).argmax(1)
    wrong = (answers != test.labels).nonzero()[:, 0][: options.errors].tolist()
    p_values, alarms = [], 0
    for index in wrong:
        observation = Observation(test.images[index], int(answers[index]), int(test.labels[index]))
        findings = detector.find(trained.model, splits.train, observation, factors=factors)
        p_values.append(round(findings.p_value or 0.0, 4))
        alarms += findings.poison_found
        print(f"test image {index}: p = {findings.p_value:.3f}", file=sys.stderr, flush=True)
    rate = Proportion(alarms, len(wrong))
    result = {
        "name": "false_alarms",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": f"python -m benchmarks.false_alarms --errors {options.errors} --json",
        "machine": {"device": "CPU", "threads": torch.get_num_threads(), "torch": torch.__version__},
        "model": recipe.model,
        "clean_accuracy": training.accuracy(trained.model, test).to_dict(),
        "errors": rate.trials,
        "false_alarms": rate.successes,
        "interval": list(rate.interval()),
        "stated_level": detector.rule.false_alarm_level,
        "p_values": p_values,
        "seconds": {"total": time.perf_counter() - start},
    }
    if not options.no_write:
        path = Path(__file__).parent / "results" / "false_alarms.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
