"""What is known of every method, declared on its class and found by its name.

A method is one file. The declaration on its class is the only place that describes it::

    @final
    @register(
        name="deep-knn",
        title="Deep k-NN",
        summary="Flags the examples whose nearest neighbours are mostly labelled otherwise.",
        paper="Peri et al. 2020, arXiv 1909.13374",
        cost="one forward pass, and the distances of all pairs",
        presets=("original",),
    )
    @dataclass(frozen=True, kw_only=True)
    class DeepKNN(Detector):
        PRESETS: ClassVar[Presets] = {"original": {}}

`register` comes from the package of the kind (`unpoison.attacks`, `defenses`, `detectors`, `input_detectors`,
`unlearners`), which has a `Registry`. The command's help, the schema of recipes, the tables of the
documentation and the conformance tests all read the registries, so nothing else has to be edited.

Declarations of the package's own methods are read from the source text, because importing the files would
import torch and make `unpoison --help` slow; a declaration therefore holds literals only. Methods of other
people are registered when they are imported. The modules that the environment variable `UNPOISON_PLUGINS`
names, separated by commas, are imported before the first look-up, also in the worker processes of
`unpoison bench`. This module does not import torch.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar, final

from unpoison.errors import InputError, nearest

Kind = Literal["attack", "defense", "detector", "input detector", "unlearner"]
Presets = Mapping[str, Mapping[str, Any]]
"""The constructor arguments of each preset, by its name."""
T = TypeVar("T")
PLUGINS: Final = "UNPOISON_PLUGINS"
"""The environment variable that names other people's modules."""
_DECLARATION: Final = re.compile(r"^@register\(\n(.*?)^\)", re.MULTILINE | re.DOTALL)


@final
@dataclass(frozen=True, kw_only=True)
class Method:
    """What a person should know before choosing a method.

    Arguments:
        kind: attack, defense, detector, input detector or unlearner.
        name: what it is called in commands, recipes and artefacts.
        title: what the literature calls it.
        summary: what it does, in one sentence.
        paper: authors, year and where to find it; "ours" for what is not published elsewhere.
        cost: what it costs, in passes or trainings.
        presets: the names of its settings; `get(name)` gives the first one.
        extra: the optional dependency that it needs.
        labels: of an attack: whether poisons are mislabelled ("dirty") or keep their labels ("clean").
        goals: of an attack: the kinds of goal that it serves.
        knowledge: of an attack: what the adversary needs to know or to hold.
        surrogates: of an attack: on how many networks of the adversary's own it crafts by default; they are
            trained when none are given.
        accepts_surrogates: of an attack: whether it makes use of networks that it is given.
        resumes: of an attack: whether a craft that was stopped goes on from its `checkpoints`.
        makes_trigger: of an attack: whether it makes its trigger itself, whatever the goal has.
        needs_observation: of a detector: whether it starts from a wrong prediction (`trace`) or from the
            training set alone (`scan`).
        can_find_nothing: of a detector: whether it may flag no example of a clean set; the others flag a
            share of any set.
        uses_reference: of a detector or an unlearner: whether it makes use of held-out examples that are
            known to be clean.
        calibrates: of a detector: whether what it learns of the model before the first answer is a
            `Calibration`, which can be kept for further ones.
        uses_index: of a detector: whether it can read influences from an `InfluenceIndex`.
        changes_pixels: of an input detector: whether it changes pixels, and so works on images alone.
        drops_examples: of a defense: whether it drops examples in rounds, which a control can copy.
        copies_drops: of a defense: whether it is such a control.
        reads_forget_set: of an unlearner: whether it looks at the examples to forget, or at the rest alone.
        needs_findings: of an unlearner: whether it has to be told which examples to forget.
        certifies: of a defense: whether it trains a vote whose predictions have certificates.
    """

    kind: Kind
    name: str
    title: str
    summary: str
    paper: str
    cost: str
    presets: tuple[str, ...] = ("default",)
    extra: str | None = None
    labels: Literal["clean", "dirty"] | None = None
    goals: tuple[str, ...] = ()
    knowledge: str = ""
    surrogates: int = 0
    accepts_surrogates: bool = False
    resumes: bool = False
    makes_trigger: bool = False
    needs_observation: bool = False
    can_find_nothing: bool = False
    uses_reference: bool = False
    calibrates: bool = False
    uses_index: bool = False
    changes_pixels: bool = False
    drops_examples: bool = False
    copies_drops: bool = False
    reads_forget_set: bool = False
    needs_findings: bool = True
    certifies: bool = False

    @property
    def takes_trigger(self) -> bool:
        """Whether the trigger of the goal matters to the attack."""
        return "backdoor" in self.goals and not self.makes_trigger

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what applies to its kind."""
        unused = {one.name: one.default for one in fields(self)}
        return {key: value for key, value in asdict(self).items() if value != unused[key] or key == "presets"}


@final
class Registry(Generic[T]):
    """The methods of one kind.

    Arguments:
        kind: of its methods.
        package: where the files of the project's own methods lie.

    >>> from unpoison import detectors
    >>> detectors.describe("deep-knn").presets
    ('original',)
    """

    def __init__(self, kind: Kind, package: str) -> None:
        self.kind, self.package = kind, package
        self._classes: dict[str, type[T]] = {}
        self._methods: dict[str, Method] = {}

    def register(self, **declaration: Any) -> Callable[[type[T]], type[T]]:
        """Declare what is known of the class below; the arguments are those of `Method`, as literals.

        Raises:
            TypeError: an argument is missing or unknown, the presets are not those of `PRESETS`, or another
                class has the name.
        """
        method = Method(kind=self.kind, **declaration)

        def declare(cls: type[T]) -> type[T]:
            presets = tuple(getattr(cls, "PRESETS", {"default": {}}))
            if presets != method.presets:
                raise TypeError(
                    f"{cls.__name__}: declares the presets {method.presets}, PRESETS has {presets}"
                )
            known = self._classes.get(method.name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise TypeError(f"{cls.__name__}: {known.__name__} is registered as {method.name!r} already")
            self._classes[method.name] = cls
            self._methods[method.name] = method
            cls.method = method  # type: ignore[attr-defined]
            return cls

        return declare

    def names(self) -> tuple[str, ...]:
        """The names of all methods, sorted."""
        _import_plugins()
        return tuple(sorted({*self._modules, *self._methods}))

    def describe(self, name: str) -> Method:
        """What is known of the method.

        Raises:
            InputError: there is no such method.
        """
        _import_plugins()
        if name in self._methods:
            return self._methods[name]
        if name not in self._modules:
            raise InputError(f"there is no {self.kind} {name!r}; {nearest(name, self.names())}")
        return self._modules[name][0]

    def implementation(self, name: str) -> type[T]:
        """The class of the method; errors as `describe`."""
        self.describe(name)
        if name not in self._classes:
            importlib.import_module(self._modules[name][1])
        return self._classes[name]

    def get(self, name: str, *, preset: str | None = None, **options: Any) -> T:
        """The method with the settings of a preset, and some of them changed.

        Arguments:
            name: one of `names()`.
            preset: one of `describe(name).presets`; the first of them when None.
            **options: fields of its class to set otherwise; a list stands for a tuple.

        Raises:
            InputError: there is no such method, preset or option, or an option is out of range.
        """
        method = self.describe(name)
        preset = method.presets[0] if preset is None else preset
        if preset not in method.presets:
            raise InputError(f"{name}: there is no preset {preset!r}; {nearest(preset, method.presets)}")
        cls: Any = self.implementation(name)
        known = [one.name for one in fields(cls) if one.init]
        for option in options:
            if option not in known:
                raise InputError(f"{name}: there is no option {option!r}; {nearest(option, known)}")
        changed = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        settings = {**getattr(cls, "PRESETS", {}).get(preset, {}), **changed}
        try:
            made: T = cls(**settings)
        except TypeError as error:
            raise InputError(f"{name}: an option cannot have such a value: {error}") from None
        return made

    def module(self, name: str) -> str:
        """The module of the class of the method; one of the project's own is not imported."""
        self.describe(name)
        return self._modules[name][1] if name in self._modules else self._classes[name].__module__

    @cached_property
    def _modules(self) -> Mapping[str, tuple[Method, str]]:
        """The declarations in the package's files, each with its module."""
        root = Path(__file__).parent.joinpath(*self.package.split(".")[1:])
        found = {}
        for path in sorted(root.rglob("*.py")):
            module = ".".join((self.package, *path.relative_to(root).with_suffix("").parts))
            for body in _DECLARATION.findall(path.read_text(encoding="utf-8")):
                method = Method(kind=self.kind, **_literals(body, path))
                found[method.name] = method, module
        return found


def _literals(body: str, path: Path) -> dict[str, Any]:
    """The keyword arguments between the parentheses of a declaration."""
    [statement] = ast.parse(f"register({body})").body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Call)
    try:
        return {str(one.arg): ast.literal_eval(one.value) for one in statement.value.keywords}
    except ValueError as error:
        raise TypeError(f"{path}: the arguments of register must be literals ({error})") from None


@cache
def _import_plugins() -> None:
    """Import the modules of other people that register methods, once in a process."""
    for name in filter(None, os.environ.get(PLUGINS, "").split(",")):
        try:
            importlib.import_module(name.strip())
        except ImportError as error:
            raise InputError(f"{PLUGINS}: {name.strip()} cannot be imported ({error})") from None
