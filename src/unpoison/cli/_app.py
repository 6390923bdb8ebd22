"""`unpoison app`: run directories in, a page on this machine to work on them in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from unpoison.app import Case, serve
from unpoison.cli._console import Console
from unpoison.cli._inputs import load_model, load_training_set
from unpoison.cli._interrupts import Interrupts, Terminated
from unpoison.cli._options import App, ImageOptions, ModelOptions, OfModel, ReadingOptions
from unpoison.cli._session import session
from unpoison.errors import InputError
from unpoison.runs import RunRecord
from unpoison.training import Trained


def app(options: App, console: Console, interrupts: Interrupts) -> int:
    """Serve the page until Ctrl-C."""
    if not options.runs:
        raise InputError("app: name at least one run directory of train, trace, scan, heal, repair or demo")
    given, architecture = _named(options)
    first = options.runs[0]
    named = first if first.name not in ("", "..") else first.resolve()
    out = options.out or named.with_name(f"{named.name}-investigation")
    with session(options, None, console, interrupts) as run:
        splits, training_set, poison = load_training_set(given, run.device)
        for line in splits.notes:
            console.say(line)
        subject = load_model(given.model, architecture, training_set)
        model = subject.model
        if subject.task is not None and not isinstance(model, Trained):
            model = subject.task.adapted(model)
        case = Case(
            model=model,
            training_set=training_set,
            test_set=splits.test,
            poison=poison,
            runs=options.runs,
            out=out.absolute(),
            options=_words(given, architecture, options),
        )

        def ready(address: str) -> None:
            console.say(f"open {address}\nCtrl-C ends the server; decisions are kept in {out}")

        try:
            serve(case, host=options.host, port=options.port, token=options.token, ready=ready)
        except (KeyboardInterrupt, Terminated):
            console.say(f"stopped; decisions are in {out}")
    return 0


def _named(options: App) -> tuple[OfModel, ModelOptions]:
    """The model and the data: what is given, or what the runs were given."""
    found: dict[str, Any] = {}
    for folder in reversed(options.runs):
        found |= {key: value for key, value in _of_run(folder).items() if value is not None}
    for name in ("model", "data", "test_data", "poison"):
        if (value := getattr(options, name)) is not None:
            found[name] = value
    for name in ("model", "data"):
        if name not in found:
            raise InputError(f"app: {options.runs[0]} does not say which {name} it is about; give --{name}")
    images = options.images
    if images == ImageOptions():
        images = ImageOptions(size=found.get("size"), orient=bool(found.get("orient", False)))
    architecture = options.architecture
    if architecture == ModelOptions() and options.model is None:
        weights = found.get("weights")
        architecture = replace(
            architecture,
            weights=None if weights is None else Path(weights),
            normalization=found.get("normalization"),
            task=tuple(found.get("task") or ()),
        )
    poison = found.get("poison")
    given = OfModel(
        model=str(found["model"]),
        data=str(found["data"]),
        test_data=found.get("test_data"),
        images=images,
        reading=ReadingOptions(),
        poison=None if poison is None else Path(poison),
    )
    return given, architecture


def _of_run(folder: Path) -> dict[str, Any]:
    record = RunRecord.load(folder)
    wanted = ("model", "data", "test_data", "poison", "size", "orient", "weights", "normalization", "task")
    named = {name: record.configuration.get(name) for name in wanted}
    if record.verb == "train":
        named["model"] = str(folder)
    if record.verb == "demo":
        named |= {"model": str(folder), "data": "sample", "poison": str(folder)}
    return named


def _words(given: OfModel, architecture: ModelOptions, options: App) -> tuple[str, ...]:
    """The options of `given`, as on a command line."""
    values = {
        "model": given.model,
        "data": given.data,
        "test-data": given.test_data,
        "poison": given.poison,
        "size": given.images.size,
        "weights": architecture.weights,
        "normalization": architecture.normalization,
        "seed": options.run.seed,
        "device": options.run.device,
        "threads": options.run.threads,
    }
    words = [
        word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))
    ]
    if architecture.task:
        words += ["--task", *architecture.task]
    return (*words, *(["--orient"] if given.images.orient else []))
