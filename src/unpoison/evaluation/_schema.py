"""`Experiment`: everything that decides a benchmark, read from one TOML file as those in `recipes/`.

Every attack is crafted for every pair, budget and seed; every kind of victim is trained on every poison,
undefended and with each defense; every detector traces the undefended victim, and every unlearner heals it of
what every detector flagged. The controls (no attack, no defense, a random filter as large as each detector's,
a perfect filter) need not be asked for. A recipe without attacks trains clean victims and counts what
detectors find in them.

Which methods and presets there are is read from the registries. An unknown key or a value out of range is an
error in one line that names the place and the nearest allowed value.

This module does not import torch.
"""

from __future__ import annotations

import os
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self, final

from unpoison import defenses
from unpoison.errors import InputError, nearest
from unpoison.evaluation._reader import structured
from unpoison.evaluation._sections import (
    ANSWERS,
    MOST_SEED,
    AttackChoice,
    Data,
    DefenseChoice,
    DetectorChoice,
    InputDetectorChoice,
    Options,
    Pretraining,
    Targets,
    UnlearnerChoice,
    VictimChoice,
    check_choices,
    check_ranges,
    defenses_that,
    label,
)
from unpoison.training import Recipe

PROBES: Final = ("logits", "gradients", "norms")
"""What can be noted of a victim before each epoch."""


@final
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides a sweep.

    Arguments:
        name: of the recipe, and of its results.
        seeds: one trial each; everything random in it is derived from its seed.
        data: the training and test set.
        training: how victims and healed models are trained: fields of the training recipe, or a `preset`
            with changes.
        attacks: none for a recipe of clean victims.
        targets: what the attacks aim at.
        victims: kinds of victims; one kind, trained by `training`, when not given.
        pretraining: what victims are fine-tuned from; they are trained from scratch when not given.
        defenses: how else victims are trained; the undefended one is always there.
        detectors: what searches for the poison.
        input_detectors: what says of single inputs whether they bear a trigger.
        unlearners: what heals. Those that need no findings heal every victim once, by the reference rows.
        discovered: shares of the poison, drawn at random, that unlearners are told of in further trials.
        probe: what is noted of every victim before each epoch: "logits" of the adversary's inputs,
            "gradients" (where poisons lie among the logit gradients of their class), "norms" of the mean
            gradient over all parameters with and without what a defense dropped.
        description: for readers of the results.
        threads: processor threads of every stage. They are part of the recipe because the last digits of a
            training depend on them: with the same number the table is the same on one worker, on many and on
            a cluster.
        folder: where relative paths begin.
    """

    name: str
    seeds: tuple[int, ...]
    data: Data
    training: Options
    attacks: tuple[AttackChoice, ...] = ()
    targets: Targets | None = None
    victims: tuple[VictimChoice, ...] = field(default_factory=lambda: (VictimChoice(),))
    pretraining: Pretraining | None = None
    defenses: tuple[DefenseChoice, ...] = ()
    detectors: tuple[DetectorChoice, ...] = ()
    input_detectors: tuple[InputDetectorChoice, ...] = ()
    unlearners: tuple[UnlearnerChoice, ...] = ()
    discovered: tuple[float, ...] = ()
    probe: tuple[str, ...] = ()
    description: str = ""
    threads: int = 1
    folder: str = field(default=".", metadata={"hidden": True})

    def __post_init__(self) -> None:
        if not self.name or not all(letter.isalnum() or letter in "-_." for letter in self.name):
            raise InputError(f"name: use letters, digits, '-', '_' and '.', found {self.name!r}")
        for what in ("seeds", "victims"):
            if not getattr(self, what):
                raise InputError(f"{what}: needs at least one")
        check_ranges(self, threads=(1, 1024), seeds=(0, MOST_SEED))
        check_choices(self, probe=PROBES)
        for what, entries in (
            ("seeds", self.seeds),
            ("victims", [one.name for one in self.victims]),
            ("defenses", [one.label for one in self.defenses]),
            ("detectors", [one.label for one in self.detectors]),
            ("input_detectors", [one.label for one in self.input_detectors]),
            ("unlearners", [one.label for one in self.unlearners]),
        ):
            entry, count = Counter[Any](entries).most_common(1)[0] if entries else (None, 0)
            if count > 1:
                raise InputError(f"{what}: {entry!r} stands there twice")
        if bool(self.attacks) != (self.targets is not None):
            raise InputError("attacks and targets: give both, or neither for a recipe of clean victims")
        if self.input_detectors and self.data.reference_rows is None:
            raise InputError(
                "input_detectors: are calibrated on clean examples; say by data.reference_rows on which"
            )
        told = [one.label for one in self.unlearners if one.method.needs_findings]
        if told and not self.detectors and not self.discovered:
            raise InputError(
                f"unlearners: {told[0]} heals what detectors flag, so the recipe needs one of those, or "
                "'discovered' shares of the poison"
            )
        check_ranges(self, discovered=(1e-9, 1.0))
        if self.discovered and not (told and self.attacks):
            raise InputError("discovered: what unlearners are told of the poison of attacks; it has not both")
        for one in self.unlearners:
            if one.method.uses_reference and self.data.reference_rows is None:
                raise InputError(f"unlearners: {one.label} needs clean examples; give data.reference_rows")
        scanning = [one.label for one in self.detectors if not one.method.needs_observation]
        if scanning and any(one.rounds for one in self.unlearners):
            raise InputError(
                f"unlearners: rounds: {scanning[0]} scans the training set, and there is no answer to trace "
                "again; leave out 'rounds'"
            )
        if not self.attacks:
            self._check_clean()
        # Each of these raises for what makes no recipe.
        for victim in self.victims:
            self.recipe(victim)
            if self.pretraining is not None:
                self.pretraining_recipe(victim)
        for attack in self.attacks:
            self.surrogate_recipe(attack)
        for defense in self.defenses:
            self.likeness(defense)

    def _check_clean(self) -> None:
        if self.probe:
            raise InputError("probe: is about the adversary's inputs, and the recipe has no attacks")
        for detector in self.detectors:
            if detector.method.needs_observation and detector.answers == "attack":
                others = " or ".join(map(repr, ANSWERS[1:]))
                raise InputError(
                    f"detectors: {detector.label}: the recipe has no attacks; give answers = {others}"
                )

    @property
    def chooses_targets(self) -> bool:
        """Whether its target images are yet to be chosen by `choose_targets`."""
        return self.targets is not None and self.targets.correct is not None

    def recipe(self, victim: VictimChoice | None = None) -> Recipe:
        """How victims of a kind, by default of the first one, and the models healed from them are trained."""
        return _recipe(self.training, (victim or self.victims[0]).training)

    def surrogate_recipe(self, attack: AttackChoice) -> Recipe:
        """How the surrogates of an attack are trained."""
        return _recipe(self.training, attack.surrogate)

    def pretraining_recipe(self, victim: VictimChoice | None = None) -> Recipe:
        """How the network that victims of a kind start from is trained."""
        assert self.pretraining is not None
        own = self.recipe(victim)
        return replace(_recipe(self.training, self.pretraining.training), model=own.model, width=own.width)

    def likeness(self, defense: DefenseChoice) -> DefenseChoice | None:
        """The defense that a control copies; None where it copies none.

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
        if not defenses.describe(named[0].name).drops_examples:
            raise InputError(
                f"defenses: like = {defense.like!r}: {named[0].name} drops nothing in rounds; only "
                f"{defenses_that('drops_examples')} do"
            )
        return named[0]

    def attack_label(self, choice: AttackChoice) -> str:
        """What an attack is called in tables: its name, and how it differs from others of that name."""
        rivals = [_settings(one) for one in self.attacks if one.name == choice.name]
        settings = _settings(choice).items()
        own = {key: value for key, value in settings if any(one.get(key) != value for one in rivals)}
        return label(choice.name, own.pop("preset", None), own)

    def path(self, spec: str) -> str:
        """A path of the recipe, absolute; the word that `data.load` knows stays as it is."""
        return spec if spec == "sample" else os.path.abspath(os.path.join(self.folder, spec))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all but the folder, which is of the machine and not of the experiment."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The experiment in a TOML file.

        Raises:
            InputError: there is no such file, it is not TOML, a key is unknown or missing, or a value is of
                the wrong type or out of range; one line names the place.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            found = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
            raise InputError(
                f"{path}: {found}; give a recipe, a .toml file as docs/benchmarking.md describes it"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: not TOML ({error}); give a recipe as docs/benchmarking.md describes it"
            ) from None
        if "folder" in values:
            raise InputError(f"{path}: unknown key 'folder'")
        return cls.from_dict({**values, "folder": str(Path(path).parent)}, str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], place: str = "recipe") -> Self:
        """The experiment from plain values; errors as `read`."""
        return structured(cls, values, place)


def _recipe(training: Options, changes: Options) -> Recipe:
    """The training recipe with changes, or the preset that these name with the others."""
    merged = dict(changes) if "preset" in changes else {**training, **changes}
    preset = merged.pop("preset", None)
    return Recipe.from_dict(merged) if preset is None else Recipe.preset(preset, **merged)


def _settings(choice: AttackChoice) -> dict[str, Any]:
    """All of an attack but its budget and what is known of it, which have columns of their own."""
    settings = {**choice.options, "trigger": choice.trigger, "goal": choice.goal_kind}
    settings |= {f"surrogate {key}": value for key, value in choice.surrogate.items()}
    settings |= {"preset": choice.preset, "surrogates": choice.surrogates}
    return {key: value for key, value in settings.items() if value is not None}
