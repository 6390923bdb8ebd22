"""`Experiment`: a whole benchmark as one TOML file, read into frozen dataclasses. This module does not
import torch.

    name = "badnets-sample"
    seeds = [0, 1, 2]

    [data]
    source = "sample"

    [[attacks]]
    name = "badnets"
    budget = [0.005, 0.015]

    [targets]
    pairs = [["Sandal", "Bag"], ["Coat", "Shirt"]]

    [training]
    preset = "sample"
    epochs = 5

    [[detectors]]
    name = "delta-influence"

    [[unlearners]]
    name = "retrain"

Every attack is crafted for every pair, budget and seed; every defense trains a victim of its own; every
detector traces the undefended victim, every unlearner heals what every detector flagged. The controls (no
attack, no defense, a random filter as large as each detector's, a perfect filter) are added without being
asked for.

An unknown key or a value out of range is an error in one line that names the place, and suggests the nearest.
"""

from __future__ import annotations

import json
import os
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypeVar, Union, final, get_args, get_origin, get_type_hints

from unpoison import attacks as attack_room
from unpoison import defenses as defense_room
from unpoison import unlearners as unlearner_room
from unpoison.errors import InputError, nearest
from unpoison.training import Recipe

DETECTORS = {
    "delta-influence": ("calibrated", "published", "published-smooth", "published-matching"),
    "ek-fac": ("default", "published"),
    "trak": ("original",),
    "activation-clustering": ("original", "relative-size", "smaller-cluster", "comparison"),
    "spectral-signatures": ("original", "comparison"),
    "spectre": ("original",),
    "statistical-contamination": ("original",),
    "deep-knn": ("original",),
    "frequency": ("quick", "original", "comparison"),
}
"""The detectors and their presets, the default first."""
CONTROLS = ("loss-drop", "random-drop")
"""The defenses that can do what another one did, without its reasons."""
DROPPING = ("epic", "feature-squeezing", "isolation", "loss-drop", "random-drop")
"""The defenses that drop examples in rounds, which a control can do as they did."""
Section = TypeVar("Section")
TRIGGERS = ("white-corner", "four-pixels")


@final
@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained and measured on.

    Arguments:
        source: as `unpoison.data.load` takes it; a path is relative to the recipe's folder.
        test: where the test set lies, if not in `source`.
        rows: [first, end] of the training examples that are used; all when not given.
        test_rows: likewise of the test set; places in the test set are counted from the first.
    """

    source: str
    test: str | None = None
    rows: tuple[int, int] | None = None
    test_rows: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for key, rows in (("rows", self.rows), ("test_rows", self.test_rows)):
            _check_rows(key, rows)


@final
@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A clean network that everybody starts from: victims and surrogates are fine-tuned from it, and attacks
    craft on it too.

    Arguments:
        source: what it is trained on, with the classes of the recipe's own data; that data when not given.
        rows: [first, end] of the examples that are used; all when not given.
        training: how, where that is otherwise than the victims are: fields of the recipe, or another `preset`
            and what is changed in it. The network itself must be theirs.
        seed: of the training; there is one network for all trials.
    """

    source: str | None = None
    rows: tuple[int, int] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rows("rows", self.rows)
        _within("seed", self.seed, 0, 2**62)


@final
@dataclass(frozen=True, kw_only=True)
class AttackChoice:
    """An attack and its strength.

    Arguments:
        name: one of `unpoison.attacks.names()`.
        budget: shares of the training set in (0, 1]; one or several.
        budget_count: counts of examples, in place of `budget`.
        trigger: white-corner, four-pixels or an image file, for backdoors that do not make their own.
        options: the attack's own.
        surrogates: on how many clean networks the adversary crafts, for attacks that need them; the attack's
            own number when not given. Each seed has its own, and they share none with the victim.
        surrogate: how they are trained where that is otherwise than the victims are: fields of the recipe,
            or another `preset` and what is changed in it.
    """

    name: str
    budget: tuple[float, ...] = ()
    budget_count: tuple[int, ...] = ()
    trigger: str = "white-corner"
    options: Mapping[str, Any] = field(default_factory=dict)
    surrogates: int | None = None
    surrogate: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("name", self.name, attack_room.names())
        if self.surrogates is not None or self.surrogate:
            if not attack_room.describe(self.name).surrogates:
                raise InputError(f"{self.name} crafts without a network; leave out 'surrogates'")
            _within("surrogates", 1 if self.surrogates is None else self.surrogates, 1, 1000)
        if self.trigger != type(self).trigger and not attack_room.describe(self.name).takes_trigger:
            raise InputError(f"{self.name} takes no trigger; leave out 'trigger'")
        if bool(self.budget) == bool(self.budget_count):
            raise InputError("give either 'budget' (shares of the training set) or 'budget_count'")
        for share in self.budget:
            _within("budget", share, 1e-9, 1.0)
        for count in self.budget_count:
            _within("budget_count", count, 1, 10**9)

    @property
    def surrogate_count(self) -> int:
        """How many surrogates it is crafted on."""
        own = attack_room.describe(self.name).surrogates
        return own if self.surrogates is None else self.surrogates


@final
@dataclass(frozen=True, kw_only=True)
class TargetImage:
    """A test image that is to be taken for another class.

    Arguments:
        test_index: its place in the test set.
        target: the class that it is to be taken for.
        source: its own class, by which it is checked; may be left out.
    """

    test_index: int
    target: str | int
    source: str | int | None = None

    def __post_init__(self) -> None:
        _within("test_index", self.test_index, 0, 10**9)


@final
@dataclass(frozen=True, kw_only=True)
class Targets:
    """Whom the attacks are about: one of `pairs`, `images` and `setups`.

    Arguments:
        pairs: (source class, target class), by name or number.
        images: test images, each with the class that it is to be taken for.
        correct: with `pairs`, how many test images of each source class to take as `images`: the first ones
            that the clean network of every seed answers rightly; `choose_targets` finds them.
        setups: a JSON file of published set-ups (the poisoning benchmark's "target class", "target index",
            "base class", "base indices"); a path relative to the recipe's folder. Each names one test image,
            its class (the source) and the class it is to be taken for (the target).
        first: the first set-up to use.
        count: how many set-ups to use; all when not given.
    """

    pairs: tuple[tuple[str | int, str | int], ...] = ()
    images: tuple[TargetImage, ...] = ()
    correct: int | None = None
    setups: str | None = None
    first: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        if bool(self.pairs) + bool(self.images) + (self.setups is not None) != 1:
            raise InputError("give either 'pairs' of classes, test 'images' or a file of published 'setups'")
        if self.setups is None and (self.first or self.count is not None):
            raise InputError("first and count: choose among 'setups'; give their file")
        if self.correct is not None:
            if not self.pairs:
                raise InputError("correct: chooses test images of 'pairs' of classes; give some")
            _within("correct", self.correct, 1, 10**6)
        _within("first", self.first, 0, 10**6)
        if self.count is not None:
            _within("count", self.count, 1, 10**6)
        for source, target in self.pairs:
            if source == target:
                raise InputError(f"pairs: source and target are the same class {source!r}")

    def each(self, folder: Path) -> tuple[Target, ...]:
        """All targets, those of a file of set-ups read from it.

        Raises:
            InputError: the file cannot be read, or has too few set-ups; or images that are answered
                rightly are yet to be chosen.
        """
        if self.correct is not None:
            raise InputError("targets.correct: the images are to be chosen by `choose_targets` first")
        if self.setups is None:
            return (
                *(Target(source, target) for source, target in self.pairs),
                *(Target(one.source, one.target, one.test_index) for one in self.images),
            )
        path = folder / self.setups
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            chosen = listed[self.first :][: self.count]
            found = tuple(
                Target(
                    one["target class"], one["base class"], one["target index"], tuple(one["base indices"])
                )
                for one in chosen
            )
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: not a list of published set-ups ({type(error).__name__}: {error})"
            ) from None
        if not found or (self.count is not None and len(found) < self.count):
            raise InputError(f"{path}: has {len(listed)} set-ups; first = {self.first} leaves {len(found)}")
        return found


@final
@dataclass(frozen=True)
class Target:
    """One set-up: source and target class, and what a published one fixes beside them.

    The source is None where it is the class of the test image, whichever that is.
    """

    source: str | int | None
    target: str | int
    test_index: int | None = None
    bases: tuple[int, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class DetectorChoice:
    """A detector: name, preset and what is changed in it."""

    name: str
    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("name", self.name, DETECTORS)
        if self.preset is None:
            object.__setattr__(self, "preset", DETECTORS[self.name][0])
        assert self.preset is not None
        _one_of("preset", self.preset, DETECTORS[self.name])

    @property
    def label(self) -> str:
        """What it is called in tables."""
        return _label(self.name, "" if self.preset == "default" else str(self.preset), self.options)


@final
@dataclass(frozen=True, kw_only=True)
class UnlearnerChoice:
    """An unlearner: name and its own options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("name", self.name, unlearner_room.names())

    @property
    def label(self) -> str:
        """What it is called in tables."""
        return _label(self.name, "", self.options)


@final
@dataclass(frozen=True, kw_only=True)
class DefenseChoice:
    """A defense during training: name, preset and what is changed in it.

    Arguments:
        name: one of `unpoison.defenses.names()`.
        preset: one of its presets; its default when not given.
        options: its own.
        like: for the controls random-drop and loss-drop: another defense of the recipe, by name or as it is
            called in tables; in every trial they drop as many as it does, in the same epochs.
    """

    name: str
    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    like: str | None = None

    def __post_init__(self) -> None:
        _one_of("name", self.name, defense_room.names())
        if self.preset is not None:
            _one_of("preset", self.preset, defense_room.describe(self.name).presets)
        if self.like is not None and self.name not in CONTROLS:
            raise InputError(f"like: {self.name} decides itself; it is for {', '.join(CONTROLS)}")

    @property
    def label(self) -> str:
        """What it is called in tables."""
        own = _label(self.name, self.preset or "", self.options)
        return own if self.like is None else f"{own}, as many as {self.like}"


@final
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides a sweep.

    Arguments:
        name: of the recipe; what its results are called.
        seeds: one trial each; everything random in it is derived from its seed.
        data: the training and test set.
        attacks: at least one.
        targets: whom they are about.
        training: the recipe of victims and of healed models: a `preset` and what is changed in it.
        pretraining: what victims are fine-tuned from; they are trained from scratch when not given.
        defenses: how else victims are trained; the undefended one is there without being asked for.
        detectors: who traces.
        unlearners: who heals.
        description: for the reader of the results.
        threads: processor threads of every stage. They are part of the recipe because the last digits of a
            training depend on them: with the same number the table is the same on one worker, on many and on
            a cluster.
        folder: where relative paths begin.
    """

    name: str
    seeds: tuple[int, ...]
    data: Data
    attacks: tuple[AttackChoice, ...]
    targets: Targets
    training: Mapping[str, Any]
    pretraining: Pretraining | None = None
    defenses: tuple[DefenseChoice, ...] = ()
    detectors: tuple[DetectorChoice, ...] = ()
    unlearners: tuple[UnlearnerChoice, ...] = ()
    description: str = ""
    threads: int = 1
    folder: str = "."

    def __post_init__(self) -> None:
        if not self.name or not all(letter.isalnum() or letter in "-_." for letter in self.name):
            raise InputError(f"name: use letters, digits, '-', '_' and '.', found {self.name!r}")
        _within("threads", self.threads, 1, 1024)
        for what, entries in (
            ("seeds", self.seeds),
            ("defenses", [one.label for one in self.defenses]),
            ("detectors", [one.label for one in self.detectors]),
            ("unlearners", [one.label for one in self.unlearners]),
        ):
            twice = [entry for place, entry in enumerate(entries) if entry in list(entries)[:place]]
            if twice:
                raise InputError(f"{what}: {twice[0]!r} stands there twice")
        if not self.seeds:
            raise InputError("seeds: needs at least one")
        for seed in self.seeds:
            _within("seeds", seed, 0, 2**62)
        if not self.attacks:
            raise InputError("attacks: needs at least one")
        if self.unlearners and not self.detectors:
            raise InputError("unlearners: heal what detectors flag, so the recipe needs one of those")
        _ = self.recipe
        if self.pretraining is not None:
            first = self.pretraining_recipe(self.pretraining)
            if (first.model, first.width) != (self.recipe.model, self.recipe.width):
                raise InputError("pretraining: its network must be the one of 'training', model and width")
        for attack in self.attacks:
            self.surrogate_recipe(attack)
        for defense in self.defenses:
            self.likeness(defense)

    @property
    def recipe(self) -> Recipe:
        """How victims and healed models are trained."""
        return _recipe(self.training)

    def likeness(self, defense: DefenseChoice) -> DefenseChoice | None:
        """The defense that a control is like; None where it is like none.

        Raises:
            InputError: the recipe has no such defense, or several; or it drops nothing in rounds.
        """
        if defense.like is None:
            return None
        others = [one for one in self.defenses if one.like is None and one is not defense]
        named = [one for one in others if one.label == defense.like]
        named = named or [one for one in others if one.name == defense.like]
        if len(named) != 1:
            said = nearest(defense.like, [one.label for one in named or others])
            raise InputError(f"defenses: like = {defense.like!r} must name one other defense; {said}")
        if named[0].name not in DROPPING:
            raise InputError(
                f"defenses: like = {defense.like!r}: {named[0].name} drops nothing in rounds; only "
                f"{', '.join(DROPPING)} do"
            )
        return named[0]

    def surrogate_recipe(self, attack: AttackChoice) -> Recipe:
        """How the surrogates of an attack are trained.

        Raises:
            InputError: its changes do not make a recipe.
        """
        anew = "preset" in attack.surrogate
        return _recipe(attack.surrogate if anew else {**self.training, **attack.surrogate})

    def attack_label(self, choice: AttackChoice) -> str:
        """What an attack is called in tables: its name, and how it differs from others of that name."""
        rivals = [_settings(one) for one in self.attacks if one.name == choice.name]
        own = {
            key: value
            for key, value in _settings(choice).items()
            if any(rival.get(key) != value for rival in rivals)
        }
        return _label(choice.name, "", own)

    def pretraining_recipe(self, pretraining: Pretraining) -> Recipe:
        """How the network that everybody starts from is trained.

        Raises:
            InputError: its changes do not make a recipe.
        """
        anew = "preset" in pretraining.training
        return _recipe(pretraining.training if anew else {**self.training, **pretraining.training})

    def path(self, spec: str) -> str:
        """A path of the recipe, as seen from here; words that `data.load` knows stay as they are."""
        return spec if spec == "sample" or os.path.isabs(spec) else os.path.join(self.folder, spec)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all but the folder, which is of the machine and not of the experiment."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The experiment in a TOML file.

        Raises:
            InputError: no such file, not TOML, an unknown key, a missing one, a value of the wrong type or
            out of
                range; one line names the place.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not TOML ({error})") from None
        if "folder" in values:
            raise InputError(f"{path}: unknown key 'folder'")
        return cls.from_dict({**values, "folder": str(Path(path).parent)}, str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], place: str = "recipe") -> Self:
        """The experiment from plain values; errors as `read`."""
        return _read(cls, values, place)


def _recipe(changes: Mapping[str, Any]) -> Recipe:
    others = {key: value for key, value in changes.items() if key != "preset"}
    preset = changes.get("preset")
    return Recipe.from_dict(others) if preset is None else Recipe.preset(preset, **others)


def _settings(choice: AttackChoice) -> dict[str, Any]:
    """All of an attack but its budget, which has a column of its own."""
    settings: dict[str, Any] = {**choice.options, "trigger": choice.trigger}
    settings |= {f"surrogate {key}": value for key, value in choice.surrogate.items()}
    if choice.surrogates is not None:
        settings["surrogates"] = choice.surrogates
    return settings


def _check_rows(key: str, rows: tuple[int, int] | None) -> None:
    if rows is not None and not 0 <= rows[0] < rows[1]:
        raise InputError(f"{key}: give [first, end] with 0 <= first < end, found {list(rows)}")


def _one_of(key: str, value: str, known: Iterable[str]) -> None:
    if value not in (names := list(known)):
        raise InputError(f"{key}: there is no {value!r}; {nearest(value, names)}")


def _within(key: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        limit = least if not value > most else most
        raise InputError(f"{key}: {value:g} is outside {least:g}..{most:g}; the nearest allowed is {limit:g}")


def _label(name: str, preset: str, options: Mapping[str, Any]) -> str:
    words = [preset] if preset else []
    words += [f"{key} {value}" for key, value in sorted(options.items())]
    return f"{name} ({', '.join(words)})" if words else name


def _read(cls: type[Section], values: Mapping[str, Any], place: str) -> Section:
    """A dataclass from a TOML table."""
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise InputError(
                f"{place}: unknown key {key!r}; {nearest(key, (k for k in hints if k != 'folder'))}"
            )
    required = [one.name for one in fields(cls) if _is_required(one)]  # type: ignore[arg-type]
    for key in required:
        if key not in values:
            raise InputError(f"{place}: the key {key!r} is missing")
    given = {key: _value(hints[key], value, f"{place}: {key}") for key, value in values.items()}
    try:
        return cls(**given)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _is_required(one: Any) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _value(hint: Any, value: Any, place: str) -> Any:
    """A value of the type that the annotation asks for."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:  # not in TOML, but in what `to_dict` gives
            return None
        for option in inner:
            try:
                return _value(option, value, place)
            except _WrongTypeError:
                continue
        raise _WrongTypeError(
            place, " or ".join(_name(option) for option in inner if option is not type(None)), value
        )
    if origin is tuple:
        if inner[-1] is Ellipsis:
            # One value stands for a list of one.
            entries = value if isinstance(value, list | tuple) else [value]
            return tuple(
                _value(inner[0], entry, f"{place}[{number}]") for number, entry in enumerate(entries)
            )
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            raise _WrongTypeError(place, f"a list of {len(inner)}", value)
        return tuple(_value(kind, entry, place) for kind, entry in zip(inner, value, strict=True))
    if origin is not None:  # a mapping of the method's own options, which the method checks
        if not isinstance(value, Mapping):
            raise _WrongTypeError(place, "a table", value)
        return dict(value)
    if isinstance(hint, type) and issubclass(hint, str | int | float):
        fits = isinstance(value, int | float if hint is float else hint)
        if not fits or isinstance(value, bool):
            raise _WrongTypeError(place, _name(hint), value)
        return hint(value)
    if not isinstance(value, Mapping):
        raise _WrongTypeError(place, "a table", value)
    return _read(hint, value, place)


def _name(hint: Any) -> str:
    return {str: "text", int: "a whole number", float: "a number"}.get(hint, "another type")


@final
class _WrongTypeError(InputError):
    def __init__(self, place: str, wanted: str, value: Any) -> None:
        super().__init__(f"{place}: must be {wanted}, found {value!r}")
