"""The sections of a recipe, as frozen dataclasses that check themselves; `Experiment` puts them together.

Which methods and presets there are is read from the registries. This module does not import torch.
"""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, final

from unpoison import attacks, defenses, detectors, input_detectors, unlearners
from unpoison.errors import InputError, nearest
from unpoison.registry import Method, Registry

ANSWERS: Final = ("attack", "errors", "right")
"""The answers that a detector may be asked about."""
PARTS: Final = ("detected", "undetected", "random poison", "first half", "last half", "random half")
"""The parts of the poison, seen by a detector, that healing can be tried without."""
ANY: Final = "*"
"""The source of a pair that stands for all classes but the target."""
FOR_ALL: Final = ("all-to-all", "availability")
"""The kinds of goal that are of all classes and name none; their pair is (ANY, ANY)."""
MOST_SEED: Final = 2**62
Options = Mapping[str, Any]
ClassName = str | int
Rows = tuple[int, int]
"""[first, end)"""


@final
@dataclass(frozen=True, kw_only=True)
class Data:
    """What victims are trained and measured on.

    Arguments:
        source: as `unpoison.data.load` takes it; a path is relative to the recipe's folder.
        test: where the test set lies, if not in `source`.
        rows: [first, end) of the training examples that are used; all when not given.
        per_class: of these, how many of each class are used, the first ones; all when not given. The base
            images of a published set-up are always among them.
        test_rows: [first, end) of the test set; places in the test set are counted from the first.
        reference_rows: [first, end) of the test set that detectors may use as a reference. They should not
            overlap with `test_rows`.
        groups: a regular expression; training images whose file names (in parquet files, `path`) agree in
            what it matches are near-duplicates, such as the frames of a film, for detectors that calibrate.
    """

    source: str
    test: str | None = None
    rows: Rows | None = None
    per_class: int | None = None
    test_rows: Rows | None = None
    reference_rows: Rows | None = None
    groups: str | None = None

    def __post_init__(self) -> None:
        _check_rows(self, "rows", "test_rows", "reference_rows")
        check_ranges(self, per_class=(1, 10**9))
        if self.groups is not None:
            try:
                re.compile(self.groups)
            except re.error as error:
                raise InputError(f"groups: not a regular expression ({error})") from None


@final
@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A clean network from which victims and surrogates are fine-tuned, and on which attacks may craft.

    There is one for every architecture among the victims, for all seeds. Where its classes are not those of
    the recipe's data, victims get a new last layer.

    Arguments:
        source: what it is trained on; the recipe's own data when not given.
        rows: [first, end) of the examples that are used; all when not given.
        training: where it is trained otherwise than victims are: fields of the training recipe, or another
            `preset` with changes. The architecture is always the victims'.
        freeze: train a new last layer alone, on the features of the network in eval mode.
        seed: of the training.
    """

    source: str | None = None
    rows: Rows | None = None
    training: Options = field(default_factory=dict)
    freeze: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rows(self, "rows")
        check_ranges(self, seed=(0, MOST_SEED))
        for key in ("model", "width"):
            if key in self.training:
                raise InputError(f"training: {key}: the architecture is that of the victims; leave it out")


@dataclass(frozen=True, kw_only=True)
class MethodChoice(ABC):
    """A method, with its settings.

    Arguments:
        name: one of the names in the registry of its kind.
        preset: one of its presets; the first when not given.
        options: its own, in place of what the preset says.
    """

    METHODS: ClassVar[Registry[Any]]

    name: str
    preset: str | None = None
    options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choices(self, preset=self.method.presets)

    @property
    def method(self) -> Method:
        """What is known of it."""
        return self.METHODS.describe(self.name)

    @property
    def label(self) -> str:
        """What it is called in tables."""
        return label(self.name, self.preset, self.options)

    def described(self, **options: Any) -> dict[str, Any]:
        """As JSON values; `options` are used where the recipe has none of that name.

        Raises:
            InputError: an option does not exist or is out of range.
        """
        options |= self.options
        preset = self.preset or self.method.presets[0]
        self.METHODS.get(self.name, preset=preset, **options)
        return {"name": self.name, "preset": preset, "options": options}


@final
@dataclass(frozen=True, kw_only=True)
class AttackChoice(MethodChoice):
    """An attack and its strength.

    Arguments:
        budget: shares of the training set in (0, 1]; one or several.
        budget_count: counts of examples, in place of `budget`.
        goal: one of the kinds of goal that the attack serves; when not given, "backdoor" where it serves
            that, then "label-noise", then "targeted-misclassification".
        trigger: the name of a trigger (white-corner, four-pixels, four-white-pixels) or an image file, for
            attacks that do not make their own.
        surrogates: on how many clean networks the adversary crafts; the attack's own number when not given.
            Each seed has its own, and they share none with the victims.
        surrogate: where they are trained otherwise than victims are: fields of the training recipe, or
            another `preset` with changes. An attack with an option `recipe`, which trains surrogates itself,
            is given it too, unless its preset or its options have one.
        known: shares of the poison that are known and put right before anything is trained; one or several.
    """

    METHODS: ClassVar[Registry[Any]] = attacks.METHODS

    budget: tuple[float, ...] = ()
    budget_count: tuple[int, ...] = ()
    goal: str | None = None
    trigger: str = "white-corner"
    surrogates: int | None = None
    surrogate: Options = field(default_factory=dict)
    known: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.surrogates is not None or self.surrogate) and not self.method.accepts_surrogates:
            raise InputError(f"{self.name} crafts without a network; leave out 'surrogates'")
        check_choices(self, goal=self.method.goals)
        if self.trigger != type(self).trigger and not self.method.takes_trigger:
            raise InputError(f"{self.name} takes no trigger; leave out 'trigger'")
        if bool(self.budget) == bool(self.budget_count):
            raise InputError("give either 'budget' (shares of the training set) or 'budget_count'")
        check_ranges(
            self, budget=(1e-9, 1.0), budget_count=(1, 10**9), surrogates=(0, 1000), known=(0.0, 0.999)
        )

    @property
    def goal_kind(self) -> str:
        """The kind of goal that it is crafted for."""
        if self.goal is not None:
            return self.goal
        preferred = ("backdoor", "label-noise", "targeted-misclassification")
        served = self.method.goals
        return next((kind for kind in preferred if kind in served), served[0])

    @property
    def surrogate_count(self) -> int:
        """How many surrogates are trained for it."""
        return self.method.surrogates if self.surrogates is None else self.surrogates


@final
@dataclass(frozen=True, kw_only=True)
class TargetImage:
    """One test image, or several that make one goal, which are to be predicted as another class.

    Arguments:
        test_index: the places in the test set, one or several of one class.
        target: the class as which they are to be predicted.
        source: their own class, by which they are checked; may be left out.
    """

    test_index: tuple[int, ...]
    target: ClassName
    source: ClassName | None = None

    def __post_init__(self) -> None:
        if not self.test_index:
            raise InputError("test_index: needs at least one")
        check_ranges(self, test_index=(0, 10**9))


@final
@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the attacks aim at: one of `pairs`, `images` and `setups`.

    Arguments:
        pairs: (source class, target class), by name or number; the source "*" is all classes but the target.
            The pair ("*", "*") is for the goals "all-to-all" and "availability", which are of all classes;
            every attack is crafted for the pairs that its goal can have.
        images: test images, each with the class as which it is to be predicted.
        correct: with `pairs`, how many test images of each source class become `images`: the first ones that
            clean networks predict correctly; `choose_targets` finds them.
        networks: how many clean networks, with seeds of their own, must predict them correctly; when not
            given, the clean victims of all seeds, so that the control "no attack" can only miss.
        setups: a JSON file of published set-ups in the poisoning benchmark's layout; a path relative to the
            recipe's folder. Each names one test image, its class (the source), the class as which it is to be
            predicted (the target) and the training images that may be changed.
        first: the first set-up to use.
        count: how many set-ups to use; all when not given.
    """

    pairs: tuple[tuple[ClassName, ClassName], ...] = ()
    images: tuple[TargetImage, ...] = ()
    correct: int | None = None
    networks: int | None = None
    setups: str | None = None
    first: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        if bool(self.pairs) + bool(self.images) + (self.setups is not None) != 1:
            raise InputError("give either 'pairs' of classes, test 'images' or a file of published 'setups'")
        if self.setups is None and (self.first or self.count is not None):
            raise InputError("first and count: choose among 'setups'; give their file")
        if self.correct is not None and not self.pairs:
            raise InputError("correct: chooses test images of 'pairs' of classes; give some")
        if self.correct is not None and any(source == ANY for source, _ in self.pairs):
            raise InputError(
                f"correct: chooses test images of one class; name it in 'pairs' instead of {ANY!r}"
            )
        if self.networks is not None and self.correct is None:
            raise InputError("networks: choose test images; give 'correct', how many")
        most = 10**6
        check_ranges(self, correct=(1, most), networks=(1, most), first=(0, most), count=(1, most))
        for source, target in self.pairs:
            if source == target != ANY:
                raise InputError(f"pairs: source and target are the same class {source!r}")


@final
@dataclass(frozen=True, kw_only=True)
class VictimChoice:
    """A kind of victim: how it is trained, where that differs from [training], and how many there are.

    Arguments:
        name: what it is called in tables.
        training: fields of the training recipe, or another `preset` with changes.
        count: victims of this kind for each poison, each with a seed of its own.
    """

    name: str = "default"
    training: Options = field(default_factory=dict)
    count: int = 1

    def __post_init__(self) -> None:
        check_ranges(self, count=(1, 10**6))


@final
@dataclass(frozen=True, kw_only=True)
class DetectorChoice(MethodChoice):
    """A detector and what it is asked.

    Arguments:
        answers: which answers of the victim it traces: those that the adversary wants ("attack"), wrong
            answers to clean test images that the adversary does not want ("errors"), or correct ones
            ("right"). A detector that scans the training set needs none.
        observations: how many observations are traced, each in a trial of its own.
        inputs: how many inputs, answered alike, make up one observation.
        random_filter: whether a control removes as many examples at random.
        parts: parts of the poison that healing is tried without in further trials: what the detector
            flagged ("detected"), what it did not ("undetected"), as much poison as it flagged drawn at random
            ("random poison"), the half of the poison that it ranks first or last ("first half", "last half")
            or a random one ("random half").
    """

    METHODS: ClassVar[Registry[Any]] = detectors.METHODS

    answers: str = "attack"
    observations: int = 1
    inputs: int = 1
    random_filter: bool = True
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, answers=ANSWERS, parts=PARTS)
        check_ranges(self, observations=(1, 10**6), inputs=(1, 10**4))
        asked = (self.answers, self.observations, self.inputs)
        if not self.method.needs_observation and asked != ("attack", 1, 1):
            raise InputError(
                f"{self.name} scans the training set; leave out answers, observations and inputs"
            )

    @property
    def label(self) -> str:
        """What it is called in tables."""
        asked = {} if self.answers == "attack" else {"answers": self.answers}
        asked |= {} if self.inputs == 1 else {"inputs": str(self.inputs)}
        return label(self.name, self.preset, {**self.options, **asked})


@final
@dataclass(frozen=True, kw_only=True)
class InputDetectorChoice(MethodChoice):
    """A test-time detector. It screens the victim's clean test images, and those with the trigger that are
    answered as the adversary wants; it is calibrated on the rows that `data.reference_rows` names.

    Arguments:
        clean: how many clean test images are screened, the first ones.
        triggered: how many of the adversary's inputs at most, the first ones.
    """

    METHODS: ClassVar[Registry[Any]] = input_detectors.METHODS

    clean: int = 500
    triggered: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, clean=(1, 10**7), triggered=(1, 10**7))


@final
@dataclass(frozen=True, kw_only=True)
class UnlearnerChoice(MethodChoice):
    """An unlearner, and how often it is used.

    Arguments:
        rounds: how often at most a victim is healed, as by `unpoison.repair`: the healed model is traced,
            and healed of what is found there too, until a trace finds nothing. When not given, victims are
            healed once of what the detector flagged, as with filters in either case.
    """

    METHODS: ClassVar[Registry[Any]] = unlearners.METHODS

    rounds: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, rounds=(1, 100))

    @property
    def label(self) -> str:
        """What it is called in tables."""
        asked = {} if self.rounds is None else {"rounds": self.rounds}
        return label(self.name, self.preset, {**self.options, **asked})


@final
@dataclass(frozen=True, kw_only=True)
class DefenseChoice(MethodChoice):
    """A defense during training.

    Arguments:
        like: for the controls that copy drops: another defense of the recipe, by name or as it is called in
            tables; in every trial the control drops as many examples, before the same epochs.
    """

    METHODS: ClassVar[Registry[Any]] = defenses.METHODS

    like: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.like is not None and not self.method.copies_drops:
            raise InputError(
                f"like: {self.name} drops what it chooses; it is for {defenses_that('copies_drops')}"
            )
        if self.like is not None and "sizes" in self.options:
            raise InputError("like: says how much is dropped; leave out the option 'sizes'")

    @property
    def label(self) -> str:
        """What it is called in tables."""
        return super().label if self.like is None else f"{super().label}, as many as {self.like}"


def defenses_that(what: str) -> str:
    """The names of the defenses of which the registry says so, for messages."""
    return ", ".join(name for name in defenses.names() if getattr(defenses.describe(name), what))


def check_choices(section: Any, **known: Sequence[str]) -> None:
    """Raise an `InputError` unless what these fields hold, if anything, is known."""
    for key, names in known.items():
        for value in _entries(section, key):
            if value not in names:
                raise InputError(f"{key}: there is no {value!r}; {nearest(value, names)}")


def check_ranges(section: Any, **bounds: tuple[float, float]) -> None:
    """Raise an `InputError` unless the numbers in these fields, if any, are within bounds."""
    for key, (least, most) in bounds.items():
        for value in _entries(section, key):
            if not least <= value <= most:
                limit = most if value > most else least
                raise InputError(
                    f"{key}: {value:g} is outside {least:g}..{most:g}; the nearest allowed is {limit:g}"
                )


def _entries(section: Any, key: str) -> tuple[Any, ...]:
    value = getattr(section, key)
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _check_rows(section: Any, *keys: str) -> None:
    for key in keys:
        rows = getattr(section, key)
        if rows is not None and not 0 <= rows[0] < rows[1]:
            raise InputError(f"{key}: give [first, end] with 0 <= first < end, found {list(rows)}")


def label(name: str, preset: str | None, options: Options) -> str:
    """What a method is called in tables: its name, preset and options."""
    words = [preset] if preset else []
    words += [f"{key} {value}" for key, value in sorted(options.items())]
    return f"{name} ({', '.join(words)})" if words else name
