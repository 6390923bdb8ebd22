"""From the words on the command line to data, models, recipes, poison and findings.

Every error names the option or the file, what is wrong with it, and what to do.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn

from unpoison import data, detectors, workflow
from unpoison._artefacts import read_json
from unpoison._memory import is_allocation_failure
from unpoison._progress import Progress
from unpoison.cli._imported import imported, made, names_function
from unpoison.cli._networks import network_of_library
from unpoison.cli._options import (
    Craft,
    ModelOptions,
    OfModel,
    RecipeOptions,
    Train,
)
from unpoison.data import Examples, Splits, TrainingSet
from unpoison.detectors import Findings
from unpoison.errors import InputError
from unpoison.models import Normalized, load_weights
from unpoison.tasks import ClassificationTask
from unpoison.threats import PoisonSet
from unpoison.training import Recipe, Trained
from unpoison.unlearners import Unlearner

# Tables of image files and tar shards; their images are prepared as those of folders are.
_OF_FILES = (".csv", ".tsv", ".tar")
_MOST_WORKERS: Final = 8
_POINTED = re.compile(r"[+-]?([0-9]+\.|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


def load_set(
    options: OfModel, device: torch.device, *, like: str | None = None, progress: Progress | None = None
) -> tuple[Splits[Examples], Examples, PoisonSet | None]:
    """The data that a verb names, the training set with the poison in it, and the poison if there is any.

    Arguments:
        options: of the verb.
        device: where images that are held in memory are to lie.
        like: the fingerprint of findings; the set is then read as it was for them, in memory or not.
        progress: told of what is read before anything else.
    """
    if options.poison is None:
        splits = read_examples(options, options.data, options.test_data, like=like, progress=progress)
        splits = splits.to(device)
        return splits, splits.train, None
    if options.reading.transform is not None:
        raise InputError(
            "--poison: is put into 8-bit images in memory, which --transform does not give; leave one out"
        )
    held, training_set, poison = load_training_set(options, device)
    return held, training_set, poison


def load_training_set(
    options: Train | OfModel, device: torch.device
) -> tuple[Splits[TrainingSet], TrainingSet, PoisonSet | None]:
    """As `load_set`, in memory."""
    splits = read_data(options).to(device)
    poison = None
    if options.poison is not None:
        poison = PoisonSet.load(_part(options.poison, "poison", "poison.json", "--poison"))
    return splits, splits.train if poison is None else poison.apply(splits.train), poison


def read_data(options: Craft | Train | OfModel) -> Splits[TrainingSet]:
    """The data that a verb names, in memory, before any poison."""
    images, parts = options.images, [options.data, options.test_data]
    if not any(part is not None and names_function(part) for part in parts):
        return data.load(options.data, test=options.test_data, size=images.size, orient=images.orient)

    def read(spec: str) -> Splits[TrainingSet]:
        if not names_function(spec):
            return data.load(spec, size=images.size, orient=images.orient)
        train, *more = map(data.as_training_set, _own_sets(spec))
        return Splits(train, more[0] if more else None)

    splits = read(options.data)
    if options.test_data is None:
        return splits
    more = read(options.test_data)
    return Splits(splits.train, more.train, (*splits.notes, *more.notes))


def read_examples(
    options: OfModel,
    spec: str,
    test: str | None = None,
    *,
    like: str | None = None,
    progress: Progress | None = None,
) -> Splits[Examples]:
    """A data set as the options say: in memory where it fits, and else batch by batch.

    Arguments:
        options: of the verb.
        spec: the set: a path, or `package.module:function`, which gives a map-style dataset or two of them.
        test: where the test set lies, if it does not come with it.
        like: see `load_set`.
        progress: told of what is read before anything else.
    """
    reading, images = options.reading, options.images
    share = reading.held_share
    if like is not None and reading.transform is None:
        share = 0.0 if ":" in like else 1.0
    workers = min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) // 2))
    given: dict[str, Any] = {
        "workers": workers if reading.workers is None else reading.workers,
        "identity": "cheap" if reading.fingerprint == "files" else "content",
        "cache": reading.cache,
        "progress": progress,
    }
    if not names_function(spec) and (test is None or not names_function(test)):
        return data.load_examples(
            spec,
            test=test,
            size=images.size,
            orient=images.orient,
            transform=transform_of(options),
            held_share=share,
            **given,
        )
    if test is not None:
        splits = read_examples(options, spec, like=like, progress=progress)
        more = read_examples(options, test, like=like, progress=progress)
        return Splits(splits.train, more.train, (*splits.notes, *more.notes))
    held_bytes = {"held_bytes": 0} if share == 0 or reading.cache is not None else {}
    given["identity"] = None if reading.fingerprint == "files" else "content"
    own, *others = (data.as_examples(one, **held_bytes, **given) for one in _own_sets(spec))
    return Splits(own, others[0] if others else None)


def _own_sets(spec: str) -> list[Any]:
    """The dataset that `package.module:function` gives, or the two."""
    function = imported("--data", spec, known="expected package.module:function", makes="a dataset")
    found = made("--data", spec, function)
    if found is None:
        raise InputError(f"--data {spec}: the function returned nothing; let it return a map-style dataset")
    arrays = isinstance(found, tuple) and any(isinstance(one, Tensor | np.ndarray) for one in found)
    return list(found) if isinstance(found, tuple) and len(found) == 2 and not arrays else [found]


def transform_of(options: OfModel) -> Callable[[Any], Any] | None:
    """The function that `--transform` names."""
    spec = options.reading.transform
    if spec is None:
        return None
    return imported("--transform", spec, known="expected package.module:function", makes="inputs of pictures")


def reference_of(spec: str | None, options: OfModel, device: torch.device) -> Examples | None:
    """The data that `--reference` names, read as the training set is."""
    if spec is None:
        return None
    path = Path(spec)
    if path.is_dir() or path.suffix.lower() in _OF_FILES or options.reading.transform or names_function(spec):
        return read_examples(options, spec).to(device).train
    return data.load(spec).train.to(device)


def told_of(examples: Examples) -> dict[str, Any]:
    """What is noted of a training set: its size, its fingerprint and how it was read."""
    fingerprint = examples.fingerprint
    kind, colon, _ = fingerprint.partition(":")
    reading = examples.reading if isinstance(examples, data.DatasetExamples) else None
    return {
        "examples": len(examples),
        "fingerprint": fingerprint,
        "fingerprint_of": kind if colon else "content",
        "reading": None if reading is None else asdict(reading),
    }


def options_of(texts: Sequence[str], option: str = "--option") -> dict[str, Any]:
    """The KEY=VALUE words of an option; a value is read as TOML has it, and else as text.

    A number may begin or end with its point, which TOML does not allow.

    Raises:
        InputError: one of them is not of that form.

    >>> options_of(["eps=16", "flip=true", "milestones=[1, 2]", "mode=linear", "level=.05"])
    {'eps': 16, 'flip': True, 'milestones': [1, 2], 'mode': 'linear', 'level': 0.05}
    """
    changes: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key.isidentifier() or key in changes:
            raise InputError(f"{option} {text}: expected KEY=VALUE, each key once")
        try:
            changes[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key] = float(value) if _POINTED.fullmatch(value) else value
    return changes


def task_of(texts: Sequence[str]) -> ClassificationTask | None:
    """How the logits are read, as `--task` says; None where it says nothing.

    Raises:
        InputError: it says something else than output= and values=.

    >>> task_of(["output=1", "values=probabilities"])
    ClassificationTask(output=1, values='probabilities')
    """
    given = options_of(texts, "--task")
    for key, value in given.items():
        if key not in ("output", "values"):
            raise InputError(f"--task {key}=: expected output=KEY or values=probabilities (or logits)")
        if key == "output" and (isinstance(value, bool) or not isinstance(value, str | int)):
            raise InputError(f"--task output={value}: expected a key, an attribute or a place such as 0")
    try:
        return ClassificationTask(**given) if given else None
    except InputError as error:
        raise InputError(f"--task: {error}") from None


def indices_of(texts: Sequence[str], splits: Splits[TrainingSet], option: str) -> list[int]:
    """The INDEX of every test:INDEX.

    Raises:
        InputError: there is no test set, or no such image in it.
    """
    indices = []
    for text in texts:
        kind, _, number = text.partition(":")
        if splits.test is None:
            raise InputError(f"{option} {text}: there is no test set; name one with --test-data")
        numbered = number.isascii() and number.isdigit()
        last = len(splits.test) - 1
        if kind != "test" or not numbered or int(number) > last:
            raise InputError(f"{option} {text}: expected test:INDEX with an index 0..{last} of the test set")
        indices.append(int(number))
    return indices


def recipe_of(
    options: RecipeOptions, *, model: str | None = None, width: int | None = None, base: Recipe | None = None
) -> Recipe:
    """The preset with what else was given in its place.

    Arguments:
        options: the preset and the values.
        model: the network, when not the preset's.
        width: its width, when not the preset's.
        base: how the model at hand was trained: taken when no preset is named, and always for the network.

    Raises:
        InputError: there is no such preset, or a value is impossible.
    """
    if options.recipe is None and base is not None:
        recipe = base
    else:
        recipe = Recipe.preset(options.recipe or "sample")
    if base is not None:
        model, width = base.model, base.width
    given = {
        "model": model,
        "width": width,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "flip": False if options.no_flip else None,
    }
    values = {**recipe.to_dict(), **{name: value for name, value in given.items() if value is not None}}
    if options.epochs is not None:
        # A preset's own milestones and warm-up are made for its epochs; they keep their place in the whole.
        share = options.epochs / recipe.epochs
        milestones = {round(epoch * share) for epoch in recipe.milestones}
        values["milestones"] = sorted(epoch for epoch in milestones if 0 < epoch < options.epochs)
        values["warmup_epochs"] = recipe.warmup_epochs * share
    return Recipe.from_dict(values)


def healing_recipe(options: RecipeOptions, model: Trained | nn.Module) -> Recipe | None:
    """How to train a healed model; None for a network of the user's own where nothing is said."""
    if isinstance(model, Trained):
        return recipe_of(options, base=model.recipe)
    return recipe_of(options) if given_of(options) else None


def given_of(options: RecipeOptions) -> list[str]:
    """The names of the options that were given, as on the command line."""
    values = {one.name: getattr(options, one.name) for one in fields(options)}
    return [
        f"--{name.replace('_', '-')}"
        for name, value in values.items()
        if value is not None and value is not False
    ]


def groups_of(path: Path, count: int) -> list[str]:
    """The name of the group of each training example, from a text file of lines or a JSON list.

    Raises:
        InputError: it cannot be read, or there is not one name for each example.
    """
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"--groups {path}: cannot be read ({error})") from None
    if not isinstance(names, list) or len(names) != count:
        found = len(names) if isinstance(names, list) else type(names).__name__
        raise InputError(
            f"--groups {path}: expected one name for each of the {count} training examples, found {found}"
        )
    return [str(name) for name in names]


def load_findings(directory: Path, option: str = "--findings") -> Findings:
    """The findings of a run directory of trace (or demo), or of the findings/ in it."""
    return Findings.load(_part(directory, "findings", "findings.json", option))


def _part(directory: Path, name: str, file: str, option: str) -> Path:
    for folder in (directory / name, directory):
        if (folder / file).is_file():
            return folder
    if not directory.is_dir():
        raise InputError(f"{option} {directory}: no such directory")
    raise InputError(
        f"{option} {directory}: holds neither {name}/{file} nor {file}; give a run directory that has them"
    )


@final
@dataclass(frozen=True)
class Subject:
    """The model that `--model` names, in eval mode and on the device.

    Arguments:
        model: as trained.
        build: makes it anew, untrained, where it is not built by a recipe.
        task: how its logits are read, where `--task` says so.
    """

    model: Trained | nn.Module
    build: Callable[[], nn.Module] | None = None
    task: ClassificationTask | None = None

    def fresh(self, unlearner: Unlearner) -> nn.Module | None:
        """The untrained network for an unlearner that makes use of it."""
        return self.build() if self.build is not None and unlearner.uses_start else None

    @property
    def network(self) -> nn.Module:
        """The network as it returns logits."""
        return workflow.network_of(workflow.giving_logits(self.model, None, self.task))


def load_model(
    spec: str, options: ModelOptions, training_set: Examples, device: torch.device | None = None
) -> Subject:
    """The model, in eval mode; it is checked to fit the training set.

    Arguments:
        spec: a run directory, `timm:NAME`, `torchvision:NAME`, `transformers:FOLDER`, or
            `package.module:factory`, found from the current directory too.
        options: the weights of a factory's network, the normalisation that it expects, and where its logits
            are.
        training_set: what it was trained on.
        device: where to put it; where the training set lies when None.

    Raises:
        InputError: there is no such model, or it does not fit its weights or the training set.
    """
    folder, device = Path(spec), training_set.device if device is None else device
    if folder.is_dir():
        if options.weights is not None or options.normalization is not None or options.task:
            raise InputError(
                f"--model {spec}: a run directory has its own weights, normalization and task; leave the "
                "options out"
            )
        trained = _load_trained(_part(folder, "model", "trained.json", "--model"), device)
        _check_fit(spec, trained.model.eval(), training_set)
        return Subject(trained)
    shape = training_set.input_shape
    if isinstance(shape, Mapping):
        shape = ()
    known = network_of_library(spec, num_classes=training_set.num_classes, shape=shape)
    factory, trained_network = (_factory(spec), None) if known is None else known
    normalization = None if options.normalization is None else _normalization(options.normalization)
    module = _made(spec, factory) if trained_network is None else trained_network
    whole = module if normalization is None else Normalized(module, *normalization)
    if options.weights is not None:
        _load_weights(module, whole, options.weights)
    task = task_of(options.task)
    whole = whole.to(device).eval()
    _check_fit(spec, whole if task is None else task.adapted(whole), training_set)

    def build() -> nn.Module:
        fresh = _made(spec, factory)
        return fresh if normalization is None else Normalized(fresh, *normalization)

    return Subject(whole, build, task)


def _load_trained(folder: Path, device: torch.device) -> Trained:
    own = read_json(folder / "trained.json").get("own_model")
    if own is not None:
        raise InputError(
            f"--model {folder}: holds the weights of a network of your own ({own}) without its code; give "
            f"--model package.module:factory --weights {folder / 'model.safetensors'}"
        )
    return Trained.load(folder, device=device)


def _factory(spec: str) -> Callable[[], Any]:
    """The function that `package.module:factory` names."""
    known = (
        "neither a directory that is there nor timm:NAME, torchvision:NAME, transformers:FOLDER or "
        "package.module:factory"
    )
    return imported("--model", spec, known=known, makes="a network")


def _made(spec: str, factory: Callable[[], Any]) -> nn.Module:
    """The network that the factory makes; the global random state is left as it was."""
    module = made("--model", spec, factory, called="factory")
    if not isinstance(module, nn.Module):
        raise InputError(
            f"--model {spec}: the factory returned {type(module).__name__}, not a torch.nn.Module"
        )
    return module


def _load_weights(module: nn.Module, whole: nn.Module, path: Path) -> None:
    """Load into the network, or into it and its normalisation where the file holds both, as ours do."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    if path.is_file() and whole is not module:
        with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            names = set(file.keys())
    load_weights(whole if {"mean", "std"} <= names else module, path, where=f"--weights {path}")


def _normalization(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    parts = text.split(";")
    try:
        mean, std = (tuple(float(number) for number in part.split(",")) for part in parts)
    except ValueError:
        raise InputError(
            f"--normalization {text}: expected means;deviations, one number per channel, "
            f"such as '.5,.5,.5;.2,.2,.2'"
        ) from None
    return mean, std


def _check_fit(spec: str, module: nn.Module, training_set: Examples) -> None:
    try:
        # `batch` would start the processes that read the whole set ahead.
        logits = detectors.answers_of(module, training_set.at(range(min(2, len(training_set))))[0])
    except (RuntimeError, ValueError, TypeError) as error:
        if is_allocation_failure(error):
            raise
        raise InputError(
            f"--model {spec}: does not take inputs of shape {training_set.input_shape} ({error})"
        ) from error
    if logits.shape[1] < training_set.num_classes:
        raise InputError(
            f"--model {spec}: returns {logits.shape[1]} logits for an input, but {training_set.name} has "
            f"{training_set.num_classes} classes"
        )
