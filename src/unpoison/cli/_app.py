"""`unpoison app`: runs, an index or findings in, a page on this machine to work on them in.

Model, data and how they are read are taken from the run.json of what is opened, and so is what a trace is
asked with: a trace that the page starts is the same as the command's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from unpoison import detectors
from unpoison.app import Case, Named, listen, serve
from unpoison.cli._console import Console
from unpoison.cli._inputs import load_model, load_set, transform_of
from unpoison.cli._interrupts import Interrupts, Terminated
from unpoison.cli._options import App, ImageOptions, ModelOptions, OfModel, ReadingOptions
from unpoison.cli._session import Session, session
from unpoison.cli._suspects import input_of_file
from unpoison.data import DatasetExamples, Examples, Inputs, TrainingSet
from unpoison.detectors import Findings
from unpoison.errors import InputError
from unpoison.influence import InfluenceIndex
from unpoison.runs import RECORD, RunRecord
from unpoison.training import Trained

_OWN: Final = ("model", "data", "test_data", "poison")
_ASKED: Final = ("preset", "option", "modules", "groups", "calibration")
"""Options of a trace that are for the detector that it was given with."""


def app(options: App, console: Console, interrupts: Interrupts) -> int:
    """Serve the page until Ctrl-C."""
    if not options.runs:
        raise InputError("app: name at least one run directory, or a directory of findings or of an index")
    runs = tuple(map(_run_of, options.runs))
    at = listen(options.host, options.port, options.token)
    first = options.runs[0]
    named = first if first.name not in ("", "..") else first.resolve()
    out = options.out or named.with_name(f"{named.name}-investigation")
    with at.socket, session(options, None, console, interrupts) as run:
        case = _case(options, runs, out, run)

        def ready(address: str) -> None:
            console.say(f"open {address}\nCtrl-C ends the server; decisions are kept in {out}")

        try:
            serve(case, at, ready=ready)
        except (KeyboardInterrupt, Terminated):
            console.say(f"stopped; decisions are in {out}")
    return 0


def _run_of(folder: Path) -> Path:
    """The run directory that a directory is, or is a part of; itself where there is none."""
    if (folder / RECORD).is_file() or not (folder / "findings.json").is_file():
        return folder
    around = folder.resolve().parent
    return around if folder.resolve().name == "findings" and (around / RECORD).is_file() else folder


def _case(options: App, runs: tuple[Path, ...], out: Path, run: Session) -> Case:
    """What the page is about."""
    found: dict[str, Any] = {}
    for folder in reversed(runs):
        found |= {key: value for key, value in _said_by(folder).items() if not _is_unset(value)}
    bare = next((Findings.load(one) for one in runs if (one / "findings.json").is_file()), None)
    shared: dict[str, Any] = {
        "runs": tuple(one for one in runs if not _is_index(one)),
        "out": out.absolute(),
    }
    given, architecture = _named(options, found)
    if given is None:
        missing = "model" if "model" not in found else "data"
        if bare is None or options.model is not None or options.data is not None:
            raise InputError(f"app: {runs[0]} does not say which {missing} it is about; give --{missing}")
        return Case(model=None, training_set=Named.of(bare), test_set=None, poison=None, **shared)
    like = next((_fingerprint(one) for one in runs if _fingerprint(one) is not None), None)
    with run.reading() as reading:
        splits, training_set, poison = load_set(given, run.device, like=like, progress=reading)
    for line in splits.notes:
        run.console.say(line)
    subject = load_model(given.model, architecture, training_set, run.device)
    model = subject.model
    if subject.task is not None and not isinstance(model, Trained):
        model = subject.task.adapted(model)
    index = None if found.get("index") is None else InfluenceIndex.open(found["index"])
    return Case(
        model=model,
        training_set=training_set,
        test_set=splits.test,
        poison=poison,
        index=index,
        options=_words(given, architecture, options),
        method=_method(found),
        tracing=partial(_asked, found),
        read_input=_reader(given, training_set),
        words=_tokenizer(given.model),
        **shared,
    )


def _is_index(folder: Path) -> bool:
    return (folder / "index.json").is_file()


def _fingerprint(folder: Path) -> str | None:
    """Of the training set that the findings in a directory are of."""
    places = [one for one in (folder, folder / "findings") if (one / "findings.json").is_file()]
    return Findings.load(places[0]).fingerprint if places else None


def _said_by(folder: Path) -> dict[str, Any]:
    """The options that a directory was made with, as far as they are of use here."""
    index = {"index": str(folder)} if _is_index(folder) else {}
    if not (folder / RECORD).is_file() and (index or (folder / "findings.json").is_file()):
        return index
    record = RunRecord.load(folder)
    if record.verb == "demo":
        return {"model": str(folder), "data": "sample", "poison": str(folder)}
    said = {**record.configuration, **index}
    if record.verb == "train":
        said["model"] = str(folder)
    if record.verb not in ("trace", "repair"):  # another verb's method is of another kind
        said = {key: value for key, value in said.items() if key not in ("method", *_ASKED)}
    return said


def _named(options: App, found: dict[str, Any]) -> tuple[OfModel | None, ModelOptions]:
    """The model and the data: what is given, or what the runs were given; no data where neither says."""
    own = {name: value for name in _OWN if (value := getattr(options, name)) is not None}
    given: dict[str, Any] = {name: found.get(name) for name in _OWN} | own
    architecture = options.architecture
    if architecture == ModelOptions() and options.model is None:
        architecture = _taken(architecture, found)
    images, reading = options.images, options.reading
    if images == ImageOptions():
        images = _taken(images, found)
    if reading == ReadingOptions() and options.data is None:
        reading = _taken(reading, found)
    if given["model"] is None or given["data"] is None:
        return None, architecture
    poison = given.pop("poison")
    named = OfModel(images=images, reading=reading, poison=None if poison is None else Path(poison), **given)
    return named, architecture


def _taken(options: Any, found: Mapping[str, Any]) -> Any:
    """The options with the values that a run was given, which its run.json has as JSON."""
    values: dict[str, Any] = {}
    for field in fields(options):
        if (value := found.get(field.name)) is not None:
            values[field.name] = tuple(value) if isinstance(value, list) else value
            if field.name in ("weights", "cache"):
                values[field.name] = Path(value)
    return replace(options, **values)


def _method(found: Mapping[str, Any]) -> str:
    """The detector that a run was traced by, if it is known here."""
    method = found.get("method")
    return method if method in detectors.names() else "calibrated"


def _asked(found: Mapping[str, Any], method: str) -> tuple[str, ...]:
    """The words that a trace by a detector takes besides those that name model and data."""
    names = ["reference"]
    if method == found.get("method"):
        names += _ASKED
    if detectors.describe(method).uses_index:
        names += ["index", "refine"]
    return _as_words({name: found.get(name) for name in names})


def _words(given: OfModel, architecture: ModelOptions, options: App) -> tuple[str, ...]:
    """The options of `given`, as on a command line."""
    parts = (given.images, given.reading, architecture)
    values = {name: getattr(given, name) for name in _OWN}
    for part in parts:
        default = type(part)()
        values |= {
            field.name: value
            for field in fields(part)
            if (value := getattr(part, field.name)) != getattr(default, field.name)
        }
    values |= {name: getattr(options.run, name) for name in ("seed", "device", "threads", "memory")}
    return _as_words(values)


def _as_words(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Options as on a command line; those that are None, empty or False are left out."""
    words: list[str] = []
    for name, value in values.items():
        if _is_unset(value):
            continue
        several = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, several)]
    return tuple(words)


def _is_unset(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, list | tuple) and not value)


def _reader(given: OfModel, training_set: Examples) -> Callable[[Path], Inputs] | None:
    """What makes an input of an image file; None where the inputs are no images."""
    if not isinstance(training_set, TrainingSet) and not (
        isinstance(training_set, DatasetExamples) and training_set.of_images
    ):
        return None
    transform = transform_of(given)
    return lambda path: input_of_file(str(path), training_set, given.images, transform)


def _tokenizer(model: str) -> Callable[[Sequence[int]], str] | None:
    """The text of token ids, where the folder of the model has a tokenizer and `tokenizers` is installed."""
    library, _, folder = model.partition(":")
    file = Path(folder) / "tokenizer.json"
    if library != "transformers" or not file.is_file():
        return None
    try:
        tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(file))
    except Exception:  # not installed, or of another version: token ids are shown
        return None
    return lambda numbers: str(tokenizer.decode(list(numbers), skip_special_tokens=False))
