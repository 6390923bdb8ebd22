"""Unlearners beside retraining.

    python -m benchmarks.unlearning [--json] [--seeds 0 1] [--methods retrain ...]

Which of them heal as well as retraining, and in what part of its time? On the bundled sample, with BadNets
(75 of 5,000 images with a white corner) and the recipe `sample`. A seed is one victim; source and target
classes change with it. What is given as the examples to forget:

- exact: the poison;
- half: every second poison, as if the rest had not been found;
- mixed: the poison and as many clean examples of the target class.

Every unlearner is measured with its defaults and in the form it was compared in; where a method's own
learning rate does nothing here, also with one chosen on kept examples. Rates are over all victims. Seconds
are of the process, with one thread, so that other work on the machine does not count; the ratio is to
retraining on the same victim. Trials are stored one by one.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks._harness import Bench, counts, main, pooled
from benchmarks._tables import Record, percent, table
from unpoison import data, unlearners, workflow
from unpoison.data import TrainingSet
from unpoison.errors import UnpoisonError
from unpoison.threats import Backdoor, Budget, PatchTrigger, PoisonSet
from unpoison.training import Recipe, Trained
from unpoison.unlearners import BestOf, Unlearner

PAIRS = (("Sneaker", "Pullover"), ("Bag", "Sandal"), ("Trouser", "Shirt"))
RATES = SUCCESS, ACCURACY = ("attack success", "clean accuracy")
OURS, VICTIM = "relabel (ours)", "victim"


def chosen(name: str, *rates: float) -> Unlearner:
    """The learning rate that does best on kept examples."""
    return BestOf(candidates=tuple(unlearners.get(name, learning_rate=rate) for rate in rates))


METHODS: dict[str, Callable[[], Unlearner]] = {
    "retrain": lambda: unlearners.get("retrain"),
    "fine-tune": lambda: unlearners.get("fine-tune"),
    "fine-tune, as compared": lambda: unlearners.get("fine-tune", preset="published"),
    OURS: lambda: unlearners.get("relabel"),
    "potion": lambda: unlearners.get("potion"),
    "potion, as published": lambda: unlearners.get("potion", preset="published"),
    "ssd": lambda: unlearners.get("ssd"),
    "ssd, chosen on kept examples": lambda: unlearners.get("ssd", selection=None),
    "ssd, as compared": lambda: unlearners.get("ssd", preset="published"),
    "scrub": lambda: unlearners.get("scrub"),
    "scrub, small scale": lambda: unlearners.get("scrub", preset="small-scale"),
    "scrub, learning rate chosen": lambda: chosen("scrub", 5e-4, 1e-3, 2e-3, 4e-3),
    "scrub, as compared": lambda: unlearners.get("scrub", preset="published"),
    "bad-teaching": lambda: unlearners.get("bad-teaching"),
    "bad-teaching, learning rate chosen": lambda: chosen("bad-teaching", 1e-4, 3e-4, 6e-4, 1e-3),
    "bad-teaching, as compared": lambda: unlearners.get("bad-teaching", preset="published"),
}
PARTLY = ("retrain", "fine-tune", OURS, "potion")
IN_CONDITION = {"exact": (VICTIM, *METHODS), "half": PARTLY, "mixed": PARTLY}


def to_forget(condition: str, poison: PoisonSet, poisoned: TrainingSet, target: int) -> torch.Tensor:
    """The examples that are given as those to forget."""
    if condition == "half":
        return poison.indices[::2]
    if condition == "mixed":
        of_target = (poisoned.labels == target).nonzero()[:, 0]
        clean = of_target[~torch.isin(of_target, poison.indices)]
        return torch.cat([poison.indices, clean[: len(poison)]])
    return poison.indices


@functools.cache
def attacked(seed: int) -> tuple[Backdoor, PoisonSet, TrainingSet]:
    """The goal, the poison and the poisoned sample."""
    clean = data.sample().train
    source, target = (clean.class_names.index(name) for name in PAIRS[seed % len(PAIRS)])
    goal = Backdoor(PatchTrigger.white_corner(), source, target)
    poison = workflow.craft("badnets", goal, clean, budget=Budget(count=75), seed=seed)
    return goal, poison, poison.apply(clean)


@functools.cache
def victim(seed: int) -> tuple[Trained, float]:
    """The network to heal, and the seconds of its training."""
    started = time.process_time()
    model = workflow.train(attacked(seed)[2], Recipe.preset("sample"), seed=seed)
    return model, time.process_time() - started


def trial(seed: int, condition: str, method: str) -> dict[str, Any]:
    """One victim, healed by one method."""
    goal, poison, poisoned = attacked(seed)
    model, spent = victim(seed)
    if method != VICTIM:
        forget = to_forget(condition, poison, poisoned, goal.target)
        started = time.process_time()
        try:
            model = workflow.heal(model, poisoned, forget, method=METHODS[method](), seed=seed + 1000)
        except UnpoisonError as error:
            return {"failed": str(error)}
        spent = time.process_time() - started
    test = data.sample().test
    assert test is not None
    found = workflow.measure(model, test, goal)
    assert found.attack_success is not None
    rates = {SUCCESS: counts(found.attack_success), ACCURACY: counts(found.clean_accuracy)}
    return {"attack": " → ".join(PAIRS[seed % len(PAIRS)]), "rates": rates, "seconds": spent}


def measure(bench: Bench) -> None:
    """The trials that are missing: of each seed a victim, healed by every method."""
    for seed in bench.options.seeds[:1] if bench.options.quick else bench.options.seeds:
        for condition in bench.options.conditions:
            for method in IN_CONDITION[condition]:
                if method in (VICTIM, *bench.options.methods):
                    key = {"seed": seed, "condition": condition, "method": method}
                    bench.trial(key, functools.partial(trial, **key))
    for line in lines(bench.trials):
        what = f"{line['condition']}, {line['method']}"
        bench.rates |= {f"{what}: {name}": line["rates"][name] for name in RATES}
        bench.ratios[f"retraining, {what}"] = 1 / line["part"]
        bench.seconds[what] = line["seconds"]


def lines(trials: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line a method and condition: pooled rates, mean seconds, and what they are beside retraining."""
    by_key = {(one["condition"], one["method"], one["seed"]): one for one in trials if "rates" in one}
    for condition, methods in IN_CONDITION.items():
        for method in methods:
            pairs = [
                (one, by_key[condition, "retrain", seed])
                for (*key, seed), one in by_key.items()
                if key == [condition, method] and (condition, "retrain", seed) in by_key
            ]
            if not pairs:
                continue
            worse, better = (
                statistics.fmean(rate(one, name) - rate(other, name) for one, other in pairs)
                for name in RATES
            )
            part = statistics.fmean(one["seconds"] / other["seconds"] for one, other in pairs)
            yield {
                "condition": condition,
                "method": method,
                "victims": len(pairs),
                "rates": {name: pooled([one["rates"][name] for one, _ in pairs]) for name in RATES},
                "seconds": statistics.fmean(one["seconds"] for one, _ in pairs),
                "part": part,
                "as good in a fifth": worse <= 0.01 and better >= -0.01 and part <= 0.2,
            }


def rate(trial: Record, name: str) -> float:
    """A rate of a trial or a line."""
    return float(trial["rates"][name]["successes"] / trial["rates"][name]["trials"])


def tables(record: Record) -> Iterator[str]:
    """Every unlearner in every condition, beside retraining."""
    rows = []
    for line in lines(record["trials"]):
        rows.append([line["condition"], line["method"], str(line["victims"])])
        rows[-1] += [percent(rate(line, name)) for name in RATES]
        rows[-1] += [
            f"{line['seconds']:.1f}",
            f"{line['part']:.2f}",
            "yes" if line["as good in a fifth"] else "",
        ]
    header = ("to forget", "unlearner", "victims", *RATES, "seconds", "part of retraining")
    yield table((*header, "within a point in a fifth"), rows)


def beside_retraining(record: Record) -> str:
    """Attack success and accuracy after our unlearner, and its part of the time of retraining."""
    found = {line["method"]: line for line in lines(record["trials"]) if line["condition"] == "exact"}
    ours, retrained = (
        f"success {percent(rate(found[method], SUCCESS))}, accuracy {percent(rate(found[method], ACCURACY))}"
        for method in (OURS, "retrain")
    )
    part, count = found[OURS]["part"], found[OURS]["victims"]
    return f"{ours}, in {part:.2f} of the time; retraining: {retrained} (means of {count} victims)"


if __name__ == "__main__":
    main(measure, threads=1, seeds=[0, 1, 2], methods=list(METHODS), conditions=list(IN_CONDITION))
