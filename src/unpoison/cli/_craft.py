"""`unpoison craft`: a training set in, a poison set out."""

from __future__ import annotations

from unpoison import attacks
from unpoison.cli._console import Console
from unpoison.cli._inputs import label_of, load_data, trigger_of
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Craft
from unpoison.cli._session import session
from unpoison.errors import InputError
from unpoison.threats import Backdoor, Budget

_DEFAULT_SHARE = 0.01


def craft(options: Craft, console: Console, interrupts: Interrupts) -> int:
    """Poison `--data` and save the poison set; nothing else is changed."""
    if options.budget is not None and options.budget_count is not None:
        raise InputError("--budget and --budget-count: give one of the two")
    attack = attacks.get(options.attack)()
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"):
            splits = load_data(options.data, options.test_data, run.device)
            names = splits.train.class_names
            source = None if options.source is None else label_of(options.source, names, "--source")
            goal = Backdoor(trigger_of(options.trigger), source, label_of(options.target, names, "--target"))
        with run.stage("craft"):
            budget = (
                Budget(count=options.budget_count)
                if options.budget_count is not None
                else Budget(share=_DEFAULT_SHARE if options.budget is None else options.budget)
            )
            poison = attack.craft(goal, splits.train, budget=budget, seed=options.run.seed)
            poison.save(run.artefact("poison", "poison"))
        run.results.update(
            attack=poison.attack,
            poisons=len(poison),
            share=len(poison) / len(splits.train),
            source=None if source is None else names[source],
            target=names[goal.target],
            linf_max=float(poison.linf.max()),
            l2_mean=float(poison.l2.mean()),
            fingerprint=poison.fingerprint,
        )
    console.show(
        f"{len(poison)} of {len(splits.train)} examples poisoned by {poison.attack}: "
        f"{'any other class' if source is None else names[source]} -> {names[goal.target]}",
        f"the poison set is {options.out / 'poison'}",
    )
    return 0
