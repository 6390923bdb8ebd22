"""`unpoison train`: a training set, poisoned or not, in; a model out."""

from __future__ import annotations

from unpoison.cli._console import Console
from unpoison.cli._inputs import load_data, load_poison, recipe_of
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._measuring import epochs, measured, per_cent
from unpoison.cli._options import Train
from unpoison.cli._session import session
from unpoison.training import train as train_model


def train(options: Train, console: Console, interrupts: Interrupts) -> int:
    """Train on `--data` with the poison of `--poison` in it, save the model, measure it."""
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
        )
    clean, success = run.results["clean_accuracy"], run.results["attack_success"]
    console.show(
        f"trained {recipe.model} on {len(training_set)} examples"
        + ("" if poison is None else f", {len(poison)} of them poison"),
        *([] if clean is None else [f"clean accuracy {per_cent(clean)}"]),
        *([] if success is None else [f"attack success {per_cent(success)}"]),
        f"the model is {options.out / 'model'}",
    )
    return 0
