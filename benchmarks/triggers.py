"""Trigger attacks on the sample.

    python -m benchmarks.triggers [--json] [--only ATTACK ...]

At their published rates: does each of them work here? A trial crafts the poison, trains a victim on it by the
recipe `sample`, and counts on the 1,000 test images how often stamped images are answered with the target
(attack success) and clean ones rightly (clean accuracy), and both again for a control of the same seed that
was trained without poison. Three trials of each attack: the targets are the classes 0, 1 and 2, from all
other classes; hidden-trigger and Sleeper Agent name one source each, as their papers do. Surrogates are
trained on the same clean set as the victim, from another seed. Published figures are those of CIFAR-10 and
ResNet-18.

Trials are stored one by one. Half a minute each on one core, five for Sleeper Agent, which trains its
surrogate four times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, final

from torch import nn

from benchmarks._harness import Bench, counts, main, pooled, timed
from benchmarks._tables import Record, percent, proportion, table
from unpoison import attacks, data, workflow
from unpoison.threats import Backdoor, Budget, PatchTrigger, RandomPatchTrigger, Trigger
from unpoison.training import Recipe

SEEDS = (0, 1, 2)
SOURCES = (6, 3, 4)  # of the attacks with one source: shirt to t-shirt, dress to trouser, coat to pullover
RATES = ("attack success", "clean accuracy", "success on the control", "accuracy of the control")
SCRATCH = "0 % (poisoning benchmark, from scratch)"
FIVE_PIXELS = functools.partial(PatchTrigger.white_corner, size=5)
COLOURED = functools.partial(RandomPatchTrigger.coloured, 8, channels=1, seed=0)
SAMPLE = Recipe.preset("sample")


@final
@dataclass(frozen=True)
class Case:
    """One attack as it was published; its name, if it is not the case's, and its options."""

    share: float
    note: str
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    trigger: Callable[[], Trigger] = PatchTrigger.white_corner
    surrogate: str = ""
    published: str = ""
    one_source: bool = False


CASES = {
    "badnets": Case(0.1, "10 % of the set, 3x3 white corner"),
    "blended": Case(0.1, "10 % of the set, noise, alpha 0.2"),
    "smooth-trigger": Case(0.1, "10 % of the set, reach 0.2", surrogate="clean"),
    "wanet": Case(0.3, "10 % poisons and 20 % covers, a field of 4x4, strength 0.5"),
    "sig": Case(0.01, "1 % of the set, which is 10 % of the class"),
    "sig, 4 %": Case(0.04, "4 % of the set, which is 40 % of the class", "sig"),
    "label-consistent": Case(
        0.01,
        "1 % of the set, eps 8, 5x5 patch of full strength",
        trigger=FIVE_PIXELS,
        surrogate="adversarial",
    ),
    "label-consistent, benchmark": Case(
        0.01,
        "1 % of the set, everything within eps 8",
        "label-consistent",
        {"preset": "benchmark"},
        FIVE_PIXELS,
        "adversarial",
        SCRATCH,
    ),
    "hidden-trigger": Case(
        0.01,
        "1 % of the set, eps 16, 8x8 patch anywhere, 1,000 steps instead of 5,000",
        "hidden-trigger",
        {"steps": 1000},
        COLOURED,
        "clean",
        SCRATCH,
        one_source=True,
    ),
    "sleeper-agent": Case(
        0.01,
        "1 % of the set, eps 16, 8x8 patch anywhere, 4 retrainings",
        "sleeper-agent",
        {"recipe": "sample", "augmentation": "crop", "shift": 1},
        COLOURED,
        "clean",
        "85.27 % (mean over pairs of classes)",
        one_source=True,
    ),
}


@functools.cache
def network(kind: str, seed: int) -> nn.Module:
    """A control, a clean surrogate (of another seed) or an adversarially trained one."""
    clean = data.sample().train
    if kind == "adversarial":
        return attacks.adversarially_trained(network("clean", seed), clean, epochs=3, seed=seed)
    return workflow.train(clean, SAMPLE, seed=seed + 100 * (kind == "clean")).model


def trial(attack: str, seed: int) -> dict[str, Any]:
    """One attack, its victim and the control."""
    case, splits = CASES[attack], data.sample()
    assert splits.test is not None
    goal = Backdoor(case.trigger(), SOURCES[seed] if case.one_source else None, seed)
    method = attacks.get(case.name or attack, **case.options)
    given = {"surrogates": [network(case.surrogate, seed)]} if case.surrogate else {}
    budget, control = Budget(share=case.share), network("control", seed)
    crafting, poison = timed(
        lambda: workflow.craft(method, goal, splits.train, budget=budget, seed=seed, **given)
    )
    training, victim = timed(lambda: workflow.train(splits.train, SAMPLE, poison=poison, seed=seed))
    found = [workflow.measure(model, splits.test, poison.goal) for model in (victim, control)]
    rates = [rate for one in found for rate in (one.attack_success, one.clean_accuracy)]
    return {
        "poisons": len(poison),
        "linf": float(poison.linf.max()),
        "rates": {name: counts(rate) for name, rate in zip(RATES, rates, strict=True)},
        "seconds": {"craft": crafting, "train": training},
    }


def measure(bench: Bench) -> None:
    """The trials that are missing, seed by seed, so that networks are shared."""
    for seed in SEEDS[:1] if bench.options.quick else SEEDS:
        for attack in bench.options.only:
            bench.trial({"attack": attack, "seed": seed}, functools.partial(trial, attack, seed))
    for attack, rates in by_attack(bench.trials).items():
        bench.rates |= {f"{attack}: {name}": rate for name, rate in rates.items()}


def by_attack(trials: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """By attack the rates over all test images of all its trials."""
    found = {attack: [trial["rates"] for trial in trials if trial["attack"] == attack] for attack in CASES}
    return {
        attack: {name: pooled([rates[name] for rates in own]) for name in RATES}
        for attack, own in found.items()
        if own
    }


def tables(record: Record) -> Iterator[str]:
    """Every attack, and its success in each trial."""
    rows = []
    for attack, rates in by_attack(record["trials"]).items():
        case, own = CASES[attack], [trial for trial in record["trials"] if trial["attack"] == attack]
        each = [trial["rates"][RATES[0]] for trial in own]
        spent = [sum(trial["seconds"][part] for trial in own) / len(own) for part in ("craft", "train")]
        rows.append([attack, case.note, attacks.describe(case.name or attack).labels])
        rows[-1] += [proportion(rates[name], interval=name == RATES[0]) for name in RATES]
        rows[-1] += [", ".join(percent(one["successes"] / one["trials"]) for one in each), case.published]
        rows[-1] += [f"{taken:.1f}" for taken in spent]
    header = ("attack", "setting", "labels", *RATES, "success in each trial", "published")
    yield table((*header, "seconds to craft", "to train"), rows)


def least(record: Record) -> str:
    """Of the attacks that change labels at their published budget, the one that succeeds least often."""
    rates = {
        attack: found[RATES[0]]
        for attack, found in by_attack(record["trials"]).items()
        if attacks.describe(CASES[attack].name or attack).labels == "dirty"
    }
    name = min(rates, key=lambda attack: rates[attack]["successes"] / rates[attack]["trials"])
    return f"{proportion(rates[name], interval=False)}: {name}, of {len(rates)}"


if __name__ == "__main__":
    main(measure, threads=1, only=list(CASES))
