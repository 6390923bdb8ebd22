"""`unpoison craft`: a training set in, a poison set out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from unpoison import attacks, workflow
from unpoison.cli._console import Console
from unpoison.cli._inputs import given_of, indices_of, load_model, options_of, read_data, recipe_of
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Craft, ModelOptions
from unpoison.cli._session import session
from unpoison.cli._status import DONE
from unpoison.data import Splits, TrainingSet
from unpoison.errors import InputError
from unpoison.registry import Method
from unpoison.threats import Budget, Goal, make_goal
from unpoison.training import Recipe

_DEFAULT_SHARE: Final = 0.01
_OPTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "kind": "--goal",
        "source": "--source",
        "target": "--target",
        "trigger": "--trigger",
        "test_indices": "--target-image",
    }
)


def craft(options: Craft, console: Console, interrupts: Interrupts) -> int:
    """Poison `--data` and save the poison set; nothing else is changed."""
    if options.budget is not None and options.budget_count is not None:
        raise InputError("--budget and --budget-count: give one of the two")
    method = attacks.describe(options.attack)
    attack = attacks.get(options.attack, preset=options.preset, **options_of(options.option))
    _check_surrogates(options, method)
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"):
            splits = read_data(options).to(run.device)
            run.note(splits)
            goal = _goal(options, method, splits)
            surrogates: Sequence[workflow.Model] | int | None = options.surrogates
            if options.surrogate:
                surrogates = [
                    load_model(str(place), ModelOptions(), splits.train).model for place in options.surrogate
                ]
        with run.stage("craft"), console.progress(f"crafting by {options.attack}") as progress:
            poison = workflow.craft(
                attack,
                goal,
                splits.train,
                budget=_budget(options),
                surrogates=surrogates,
                recipe=_recipe(options),
                seed=options.run.seed,
                checkpoints=options.checkpoints,
                progress=progress,
            )
            poison.save(run.artefact("poison", "poison"))
        names = splits.train.class_names
        source = _class_name(goal, names, "source", "true_label")
        target = _class_name(goal, names, "target")
        run.results.update(
            attack=poison.attack,
            goal=goal.kind,
            poisons=len(poison),
            share=len(poison) / len(splits.train),
            source=source,
            target=target,
            linf_max=float(poison.linf.max()),
            l2_mean=float(poison.l2.mean()),
            fingerprint=poison.fingerprint,
            **{key: poison.configuration[key] for key in ("surrogates",) if method.surrogates},
        )
    images = f"{', '.join(options.target_image)} of " if options.target_image else ""
    console.show(
        f"{len(poison)} of {len(splits.train)} examples poisoned by {poison.attack}: "
        f"{images}{source or 'any other class'} -> {target or 'any other class'}",
        f"the poison set is {options.out / 'poison'}",
    )
    return DONE


def _budget(options: Craft) -> Budget:
    if options.budget_count is not None:
        return Budget(count=options.budget_count)
    return Budget(share=_DEFAULT_SHARE if options.budget is None else options.budget)


def _goal(options: Craft, method: Method, splits: Splits[TrainingSet]) -> Goal:
    return make_goal(
        method.goals,
        options.goal,
        class_names=splits.train.class_names,
        source=options.source,
        target=options.target,
        trigger=_trigger(options, method),
        test_set=splits.test,
        test_indices=indices_of(options.target_image, splits, "--target-image"),
        options=_OPTIONS,
    )


def _trigger(options: Craft, method: Method) -> str | None:
    if options.trigger is not None and not method.takes_trigger:
        why = "it makes its own" if method.makes_trigger else "it is no backdoor"
        raise InputError(f"--trigger: {method.name} takes no trigger; {why}")
    return options.trigger


def _class_name(goal: Any, names: Sequence[str], *attributes: str) -> str | None:
    """The name of the class that a goal has under one of these names, if it has one."""
    labels = [label for name in attributes if (label := getattr(goal, name, None)) is not None]
    return names[labels[0]] if labels else None


def _check_surrogates(options: Craft, method: Method) -> None:
    """That no option is given that this attack does not use."""
    if options.checkpoints is not None and not method.resumes:
        raise InputError(f"--checkpoints: {method.name} keeps none; leave it out")
    if not method.accepts_surrogates and (options.surrogate or options.surrogates is not None):
        raise InputError(f"--surrogate and --surrogates: {method.name} crafts without a network")
    if options.surrogate and options.surrogates is not None:
        raise InputError("--surrogate and --surrogates: name the networks, or say how many to train")
    if options.surrogates is not None and options.surrogates < 1:
        raise InputError(f"--surrogates {options.surrogates}: must be at least 1")
    if options.surrogate or not (method.surrogates or options.surrogates):
        given = given_of(options.training)
        given += [f"--{name}" for name in ("model", "width") if getattr(options, name) is not None]
        if given:
            raise InputError(f"{given[0]}: {method.name} does not use it; it says how surrogates are trained")


def _recipe(options: Craft) -> Recipe:
    return recipe_of(options.training, model=options.model, width=options.width)
