"""`unpoison train`: a training set, poisoned or not, in; a model out, defended or not."""

from __future__ import annotations

from typing import Any

from unpoison import defenses
from unpoison.cli._console import Console
from unpoison.cli._inputs import changes_of, load_data, load_poison, recipe_of
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._measuring import epochs, measured, per_cent
from unpoison.cli._options import Train
from unpoison.cli._session import session
from unpoison.errors import InputError
from unpoison.threats import PoisonSet
from unpoison.training import Defense, Trained
from unpoison.training import train as train_model


def train(options: Train, console: Console, interrupts: Interrupts) -> int:
    """Train on `--data` with the poison of `--poison` in it, save the model, measure it."""
    defense = _defense(options)
    recipe = recipe_of(options.training, model=options.model, width=options.width)
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"):
            splits = load_data(options.data, options.test_data, run.device)
            poison = load_poison(options.poison)
            training_set = splits.train if poison is None else poison.apply(splits.train)
        with run.stage("train"), epochs(console, f"training {recipe.model}", recipe) as on_epoch:
            trained = train_model(
                training_set,
                recipe,
                seed=options.run.seed,
                defense=defense,
                checkpoints=options.checkpoints,
                on_epoch=on_epoch,
            )
            trained.save(run.artefact("model", "model"))
        with run.stage("measure"):
            measurement = measured(trained, splits.test, poison)
        run.rate("clean_accuracy", None if measurement is None else measurement.clean_accuracy)
        run.rate("attack_success", None if measurement is None else measurement.attack_success)
        run.results.update(
            recipe=recipe.to_dict(),
            examples=len(training_set),
            poisons=0 if poison is None else len(poison),
            training_loss=trained.history[-1].loss,
            fingerprint=trained.training_fingerprint,
            **_defended(trained, poison, len(training_set)),
        )
    clean, success = run.results["clean_accuracy"], run.results["attack_success"]
    console.show(
        f"trained {recipe.model} on {len(training_set)} examples"
        + ("" if poison is None else f", {len(poison)} of them poison"),
        *([] if defense is None else [_words(run.results)]),
        *([] if clean is None else [f"clean accuracy {per_cent(clean)}"]),
        *([] if success is None else [f"attack success {per_cent(success)}"]),
        f"the model is {options.out / 'model'}",
    )
    return 0


def _defense(options: Train) -> Defense | None:
    changes = changes_of(options.defense_option, "--defense-option")
    if options.defense is None:
        if changes or options.defense_preset is not None:
            raise InputError("--defense-preset and --defense-option: name the --defense that they are for")
        return None
    for key, instead in (("seed", "--seed"), ("preset", "--defense-preset"), ("name", "--defense")):
        if key in changes:
            raise InputError(f"--defense-option {key}: is given by {instead}")
    return defenses.get(options.defense, preset=options.defense_preset, **changes)


def _defended(trained: Trained, poison: PoisonSet | None, examples: int) -> dict[str, Any]:
    """What the defense did, for run.json; nothing where there was none."""
    if trained.defense is None:
        return {}
    caught = None if poison is None else int(poison.membership(examples)[trained.dropped].sum())
    return {"defense": dict(trained.defense), "dropped": len(trained.dropped), "dropped_poisons": caught}


def _words(results: dict[str, Any]) -> str:
    words = f"{results['defense']['name']} dropped {results['dropped']} of {results['examples']} examples"
    caught = results["dropped_poisons"]
    return words if caught is None else f"{words}, {caught} of them poison"
