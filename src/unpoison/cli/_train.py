"""`unpoison train`: a training set, poisoned or not, in; a model out, defended or not."""

from __future__ import annotations

from typing import Any

from unpoison import defenses, workflow
from unpoison.cli._console import Console, per_cent
from unpoison.cli._inputs import load_training_set, options_of, recipe_of
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Train
from unpoison.cli._session import session
from unpoison.cli._status import DONE
from unpoison.errors import InputError
from unpoison.threats import PoisonSet
from unpoison.training import Defense, Recipe, Trained


def train(options: Train, console: Console, interrupts: Interrupts) -> int:
    """Train on `--data` with the poison of `--poison` in it, save the model, measure it."""
    defense = _defense(options)
    recipe = recipe_of(options.training, model=options.model, width=options.width)
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"):
            splits, training_set, poison = load_training_set(options, run.device)
            run.note(splits)
        with run.stage("train"), console.progress(f"training {recipe.model}") as progress:
            trained = workflow.train(
                training_set,
                recipe,
                seed=options.run.seed,
                defense=defense,
                checkpoints=options.checkpoints,
                progress=progress,
            )
            trained.save(run.artefact("model", "model"))
        with run.stage("measure"):
            run.measure(trained, splits.test, poison)
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
        _augmentation(recipe),
        *([] if defense is None else [_dropped(run.results)]),
        *([] if clean is None else [f"clean accuracy {per_cent(clean)}"]),
        *([] if success is None else [f"attack success {per_cent(success)}"]),
        *_certified(run.results),
        f"the model is {options.out / 'model'}",
    )
    return DONE


def _certified(results: dict[str, Any]) -> list[str]:
    """The certified accuracy of a vote, at a few numbers of changed examples, in a line."""
    curve = results.get("certified", [])
    shown = [most for most in (1, 2, 5, 10, 20, 50) if most < len(curve)]
    told = [f"{per_cent(curve[most]['rate'])} against {most}" for most in shown]
    return [f"certified accuracy {', '.join(told)} changed examples"] if told else []


def _augmentation(recipe: Recipe) -> str:
    """How images were changed at random, in words."""
    parts = [
        *(["mirrored"] if recipe.flip else []),
        *([f"cropped after {recipe.crop_padding} pixels of padding"] if recipe.crop_padding else []),
        *([f"cut out by {recipe.cutout} pixels"] if recipe.cutout else []),
    ]
    return f"images were {', '.join(parts)} at random" if parts else "images were not changed at random"


def _defense(options: Train) -> Defense | None:
    changes = options_of(options.option)
    if options.defense is None:
        if changes or options.preset is not None:
            raise InputError("--preset and --option: name the --defense that they are for")
        return None
    return defenses.get(options.defense, preset=options.preset, **changes)


def _defended(trained: Trained, poison: PoisonSet | None, examples: int) -> dict[str, Any]:
    """What the defense did, for run.json; nothing where there was none."""
    if trained.defense is None:
        return {}
    poisons = None if poison is None else int(poison.membership(examples)[trained.dropped].sum())
    return {"defense": dict(trained.defense), "dropped": len(trained.dropped), "dropped_poisons": poisons}


def _dropped(results: dict[str, Any]) -> str:
    line = f"{results['defense']['name']} dropped {results['dropped']} of {results['examples']} examples"
    poisons = results["dropped_poisons"]
    return line if poisons is None else f"{line}, {poisons} of them poison"
