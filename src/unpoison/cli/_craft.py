"""`unpoison craft`: a training set in, a poison set out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from torch import nn

from unpoison import attacks
from unpoison._seeds import derive_seed
from unpoison.cli._console import Console
from unpoison.cli._inputs import (
    changes_of,
    index_of_test_image,
    label_of,
    load_data,
    load_model,
    recipe_of,
    trigger_of,
)
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._measuring import epochs
from unpoison.cli._options import Craft, ModelOptions
from unpoison.cli._session import session
from unpoison.data import Splits, TrainingSet
from unpoison.errors import InputError
from unpoison.registry import Method
from unpoison.threats import Backdoor, Budget, Goal, Mistakes, TargetedMisclassification
from unpoison.training import train

_DEFAULT_SHARE = 0.01
_DEFAULT_TRIGGER = "white-corner"


def craft(options: Craft, console: Console, interrupts: Interrupts) -> int:
    """Poison `--data` and save the poison set; nothing else is changed."""
    if options.budget is not None and options.budget_count is not None:
        raise InputError("--budget and --budget-count: give one of the two")
    card = attacks.describe(options.attack)
    attack = _attack(options)
    _check_surrogates(options, card)
    _check_unused(options, card)
    if options.trigger is None and card.takes_trigger:
        options = replace(options, trigger=_DEFAULT_TRIGGER)
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"):
            splits = load_data(options.data, options.test_data, run.device)
            goal, source, target = _goal(options, card, splits)
        networks = []
        if card.surrogates:
            with run.stage("surrogates"):
                networks = list(_surrogates(options, card, splits.train, console))
        with run.stage("craft"):
            budget = (
                Budget(count=options.budget_count)
                if options.budget_count is not None
                else Budget(share=_DEFAULT_SHARE if options.budget is None else options.budget)
            )
            poison = attack.craft(
                goal, splits.train, budget=budget, surrogate=networks or None, seed=options.run.seed
            )
            poison.save(run.artefact("poison", "poison"))
        names = splits.train.class_names
        run.results.update(
            attack=poison.attack,
            poisons=len(poison),
            share=len(poison) / len(splits.train),
            source=None if source is None else names[source],
            target=names[target],
            linf_max=float(poison.linf.max()),
            l2_mean=float(poison.l2.mean()),
            fingerprint=poison.fingerprint,
            **({"surrogates": len(networks)} if networks else {}),
        )
    aim = "any other class" if source is None else names[source]
    if options.target_image is not None:
        aim = f"{options.target_image} ({aim})"
    console.show(
        f"{len(poison)} of {len(splits.train)} examples poisoned by {poison.attack}: "
        f"{aim} -> {names[target]}",
        f"the poison set is {options.out / 'poison'}",
    )
    return 0


def _attack(options: Craft) -> attacks.Attack:
    return attacks.get(options.attack, **changes_of(options.option, "--option"))


def _check_surrogates(options: Craft, card: Method) -> None:
    if not card.surrogates and (options.surrogate or options.surrogates is not None):
        raise InputError(f"--surrogate and --surrogates: {card.name} crafts without a network")
    if options.surrogate and options.surrogates is not None:
        raise InputError("--surrogate and --surrogates: name the networks, or say how many to train")
    if options.surrogates is not None and options.surrogates < 1:
        raise InputError(f"--surrogates {options.surrogates}: must be at least 1")


def _check_unused(options: Craft, card: Method) -> None:
    """That no option is given which this attack would pass over in silence."""
    if options.trigger is not None and not card.takes_trigger:
        why = "it makes its own" if card.makes_trigger else "it is no backdoor"
        raise InputError(f"--trigger: {card.name} takes no trigger; {why}")
    if not card.surrogates:
        training = {one.name: getattr(options.training, one.name) for one in fields(options.training)}
        for name, value in {**training, "model": options.model, "width": options.width}.items():
            if value is not None:
                raise InputError(
                    f"--{name.replace('_', '-')}: {card.name} makes no use of it; it is for attacks that "
                    "have surrogates trained"
                )


def _goal(options: Craft, card: Method, splits: Splits) -> tuple[Goal, int | None, int]:
    """What the attack is to achieve, with source and target class."""
    names = splits.train.class_names
    source = None if options.source is None else label_of(options.source, names, "--source")
    target = label_of(options.target, names, "--target")
    if options.target_image is None:
        if "mistakes" in card.goals:
            if source is None:
                raise InputError(f"--source: {card.name} needs the class whose labels are to be wrong")
            return Mistakes(source, target), source, target
        if "backdoor" not in card.goals:
            raise InputError(f"--target-image: {card.name} is about one test image; name it as test:INDEX")
        trigger = trigger_of(options.trigger or _DEFAULT_TRIGGER)
        return Backdoor(trigger, source, target), source, target
    if "targeted-misclassification" not in card.goals:
        raise InputError(f"--target-image: {card.name} serves {', '.join(card.goals)} only")
    index = index_of_test_image(options.target_image, splits, "--target-image")
    assert splits.test is not None
    goal = TargetedMisclassification.of(splits.test, index, target=target)
    own = int(splits.test.labels[index])
    if source is not None and source != own:
        raise InputError(f"--source {options.source}: {options.target_image} is of class {names[own]}")
    return goal, own, target


def _surrogates(
    options: Craft, card: Method, training_set: TrainingSet, console: Console
) -> Iterator[nn.Module]:
    """The networks to craft on: those named, or as many trained on the clean set."""
    for place in options.surrogate:
        yield load_model(str(place), ModelOptions(), training_set).module
    if options.surrogate:
        return
    recipe = recipe_of(options.training, model=options.model, width=options.width)
    for number in range(card.surrogates if options.surrogates is None else options.surrogates):
        with epochs(console, f"training surrogate {number + 1}", recipe) as on_epoch:
            seed = derive_seed(options.run.seed, "surrogate", number)
            yield train(training_set, recipe, seed=seed, on_epoch=on_epoch).model
