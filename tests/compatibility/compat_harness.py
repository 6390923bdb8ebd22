"""Kinds of dataset and of network, what is expected of each verb, and what happens.

A `Kind` builds a tiny `Case` and says what each verb should do with it: give a result, or refuse in one line.
`run` tries one verb and catches everything. A result counts as right only if it agrees with a plain form of
the same case: the inputs as the network takes them, held in memory, and the network with tensor logits. For
scores that form is a `TrainingSet` of numbers and a network that looks the inputs up by number, so that
inputs of any shape and type have one; for healing and for changed inputs it is the same pixels as a
`TrainingSet`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import re
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torchvision_shim import without_cuda_operators

import unpoison
from unpoison import data
from unpoison.data import TrainingSet
from unpoison.errors import UnpoisonError

SECONDS: Final = 60
"""After which a verb counts as hung."""
FORGET: Final = (3, 4, 8)
RECIPE: Final = unpoison.Recipe(epochs=1, batch_size=16, learning_rate=0.01)
VERBS: Final[Mapping[str, str]] = {
    "trace": "`trace`, method `ek-fac`; the scores agree with those of the plain form",
    "variations": "`trace`, method `delta-influence`, which changes the observed input",
    "scan": "`scan`, method `spectral-signatures`; the scores agree with those of the plain form",
    "names": "the findings have the class names and name the examples (files, row keys)",
    "coverage": "the findings say which share of the parameters is not tracked",
    "retrain": "`heal`, method `retrain`, with a recipe and a freshly built network",
    "fine-tune": "`heal`, method `fine-tune`, with a recipe",
    "relabel": "`heal`, method `relabel`, without a recipe: optimiser and learning rate are found",
    "scrub": "`heal`, method `scrub`",
    "ssd": "`heal`, method `ssd`",
}
HEALING: Final = ("retrain", "fine-tune", "relabel", "scrub", "ssd")
DATASET_VERBS: Final = ("trace", "variations", "scan", "names", *HEALING)
NETWORK_VERBS: Final = ("trace", "variations", "scan", "coverage", *HEALING)


@final
@dataclass(frozen=True)
class Works:
    """A result that agrees with the plain form's.

    Arguments:
        within: the largest difference, as a share of the largest value.
    """

    within: float = 1e-3


@final
@dataclass(frozen=True)
class Refused:
    """One line that contains `words`, a regular expression."""

    words: str


Expected = Works | Refused | tuple[Works | Refused, ...]
WORKS: Final = Works()
EIGHT_BITS: Final = Refused(r"8[- ]bit|1/255|TrainingSet|\[0, 1\]")
"""What only works on images of 8 bits says so."""
ONLY_IMAGES: Final[Mapping[str, Expected]] = {
    "variations": Refused("variation|image|8[- ]bit|1/255"),
    "retrain": EIGHT_BITS,
}


@final
@dataclass(kw_only=True)
class Case:
    """One dataset and one network, as a user has them, and their plain form.

    Arguments:
        open: gives the dataset.
        model: the network.
        query: the input of the observation.
        inputs: what the network takes: tensors whose first dimension counts examples, one for each argument.
        labels: Int64[n].
        classes: how many logits the plain network gives.
        query_inputs: the query as the network takes it, a batch of one.
        fresh: builds the network anew, for retraining.
        plain: of a network of this kind, the same one with tensor logits, sharing its modules.
        training_set: the same pixels, where inputs are images of 8 bits.
        options: what `DatasetExamples` is told beside the dataset.
        arguments: further arguments of every verb.
        class_names: those that findings should have.
        ids: what findings should call the examples.
        wrapped: a context to call the verbs in.
    """

    open: Callable[[], Any]
    model: nn.Module
    query: Any
    inputs: tuple[Tensor, ...]
    labels: Tensor
    query_inputs: tuple[Tensor, ...]
    classes: int = 3
    fresh: Callable[[], nn.Module] | None = None
    plain: Callable[[nn.Module], nn.Module] = lambda network: network
    training_set: TrainingSet | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    class_names: Sequence[str] | None = None
    ids: Sequence[str] | None = None
    wrapped: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@final
@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of dataset or network.

    Arguments:
        name: in the table.
        build: makes the case, in an empty directory.
        needs: packages without which it is not tried.
        expected: by verb; what is not named is expected to work.
    """

    name: str
    build: Callable[[Path], Case]
    needs: tuple[str, ...] = ()
    expected: Mapping[str, Expected] = field(default_factory=dict)

    def absent(self) -> str | None:
        """The first package that is needed and not installed."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), None)


@final
@dataclass(frozen=True)
class Outcome:
    """What a verb did: "works", "refused" or "fails", the words, and where it failed."""

    outcome: str
    words: str = ""
    where: str = ""

    def meets(self, expected: Expected) -> bool:
        """Whether it is what was expected."""
        wanted = expected if isinstance(expected, tuple) else (expected,)
        return any(
            self.outcome == "works"
            if isinstance(one, Works)
            else self.outcome == "refused" and re.search(one.words, self.words, re.IGNORECASE) is not None
            for one in wanted
        )


def table(
    *registries: list[Kind],
) -> Callable[..., Callable[[Callable[[Path], Case]], Callable[[Path], Case]]]:
    """A decorator that puts a builder into a list: `@kind("name", needs=(...), verb=expected, ...)`."""
    (kinds,) = registries

    def kind(
        name: str, *, needs: Sequence[str] = (), every: Expected | None = None, **expected: Expected
    ) -> Callable[[Callable[[Path], Case]], Callable[[Path], Case]]:
        def put(build: Callable[[Path], Case]) -> Callable[[Path], Case]:
            told = {verb.replace("_", "-"): one for verb, one in expected.items()}
            all_verbs = {} if every is None else dict.fromkeys(VERBS, every)
            kinds.append(Kind(name=name, build=build, needs=tuple(needs), expected={**all_verbs, **told}))
            return build

        return put

    return kind


def run(kind: Kind, verb: str) -> Outcome:
    """Build the case anew, try the verb, and classify what happens."""
    expected = kind.expected.get(verb, WORKS)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    within = next((one.within for one in wanted if isinstance(one, Works)), 1e-3)
    with tempfile.TemporaryDirectory() as folder, offline(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages; those of unpoison have tests of their own
        without_cuda_operators()
        torch.manual_seed(0)
        case = kind.build(Path(folder))
        try:
            with within_time():
                complaint = _DO[verb](case, within)
        except UnpoisonError as error:
            message = str(error)
            message = message.replace(folder, "FOLDER")
            if len(message.splitlines()) != 1:
                return Outcome("fails", f"refused in {len(message.splitlines())} lines: {message}")
            return Outcome("refused", message)
        except Hung:
            return Outcome("fails", f"no answer within {SECONDS} seconds")
        except Exception as error:
            told = " ".join(str(error).split()).replace(folder, "FOLDER")[:160]
            return Outcome("fails", f"{type(error).__name__}: {told}", _where(error))
        return Outcome("fails", complaint) if complaint else Outcome("works")


class Hung(BaseException):
    """A verb took longer than `SECONDS`."""


@contextlib.contextmanager
def within_time() -> Iterator[None]:
    """Raises `Hung` after `SECONDS`."""

    def stop(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Hugging Face's packages open no connection and show no progress."""
    names = (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
    )
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _where(error: BaseException) -> str:
    """The innermost line of the package that took part, else of the harness."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/unpoison/" in frame.filename]
    if not own:
        return "not in unpoison: the network or dataset itself"
    place = own[-1].filename.rpartition("/unpoison/")[2]
    return f"src/unpoison/{place}:{own[-1].lineno}"


# What each verb does, and what is wrong with its result, if anything.


def _examples(case: Case) -> Any:
    dataset = case.open()
    reader = getattr(data, "DatasetExamples", None)
    return reader(dataset, **case.options) if case.options and reader is not None else dataset


def _trace(case: Case, within: float, method: str = "ek-fac") -> str | None:
    with _untouched(case.model) as changed, case.wrapped():
        findings = unpoison.trace(
            case.model, _examples(case), unpoison.Observation(case.query), method=method, **case.arguments
        )
    return changed() or _compared(findings.scores, _plain_findings(case, "trace", method).scores, within)


def _scan(case: Case, within: float) -> str | None:
    with _untouched(case.model) as changed, case.wrapped():
        findings = unpoison.scan(case.model, _examples(case), method="spectral-signatures", **case.arguments)
    plain = _plain_findings(case, "scan", "spectral-signatures")
    # Which sign a singular vector has is arbitrary; scores are squares.
    return changed() or _compared(findings.scores, plain.scores, within)


def _variations(case: Case, within: float) -> str | None:
    with _untouched(case.model) as changed, case.wrapped():
        findings = unpoison.trace(
            case.model,
            _examples(case),
            unpoison.Observation(case.query),
            method="delta-influence",
            **case.arguments,
        )
    told = changed() or _finite(findings.scores, len(case.labels))
    if told or case.training_set is None or "normalization" in case.arguments:
        return told
    observation = unpoison.Observation(case.query_inputs[0])
    plain = unpoison.trace(
        case.plain(copy.deepcopy(case.model)), case.training_set, observation, method="delta-influence"
    )
    return _compared(findings.scores, plain.scores, max(within, 0.02))


def _names(case: Case, within: float) -> str | None:
    findings = unpoison.scan(case.model, _examples(case), method="spectral-signatures", **case.arguments)
    if case.class_names is not None and list(findings.class_names) != list(case.class_names):
        return f"the classes are called {list(findings.class_names)}, not {list(case.class_names)}"
    if case.ids is not None:
        ids = getattr(findings, "ids", None)
        if ids is None:
            return "the findings have indices alone, no names of files or rows"
        if list(ids) != list(case.ids):
            return f"the examples are called {list(ids)[:2]}, not {list(case.ids)[:2]}"
    return None


def _coverage(case: Case, within: float) -> str | None:
    findings = unpoison.trace(
        case.model, _examples(case), unpoison.Observation(case.query), method="ek-fac", **case.arguments
    )
    share = outside_tracked_kinds(case.model)
    if share == 0 or getattr(findings, "tracked_share", None) is not None:
        return None
    told = f"{100 * share:.0f} % of the parameters lie outside plain Linear and Conv2d layers"
    return f"{told}, and nothing is said of them"


def _heal(method: str) -> Callable[[Case, float], str | None]:
    def heal(case: Case, within: float) -> str | None:
        arguments = dict(case.arguments)
        if method in ("retrain", "fine-tune"):
            arguments["recipe"] = RECIPE
        fresh = None
        if method == "retrain":
            fresh = copy.deepcopy(case.model) if case.fresh is None else case.fresh()
            arguments["start"] = copy.deepcopy(fresh)
        with _untouched(case.model) as changed, case.wrapped():
            healed = unpoison.heal(case.model, _examples(case), list(FORGET), method=method, **arguments)
        network = getattr(healed, "model", healed)
        told = changed() or _same_kind(case.model, network, trained_anew=method == "retrain")
        if told:
            return told
        with torch.no_grad():
            outputs = case.plain(copy.deepcopy(network).eval())(*case.inputs)
        told = _finite(outputs, len(case.labels))
        if told or case.training_set is None or "normalization" in case.arguments:
            return told
        if fresh is not None:
            arguments["start"] = case.plain(fresh)
        plain = unpoison.heal(
            case.plain(copy.deepcopy(case.model)), case.training_set, list(FORGET), method=method, **arguments
        )
        with torch.no_grad():
            reference = getattr(plain, "model", plain)(*case.inputs)
        # Dozens of steps at the largest rate that a network bears add up what is rounded otherwise.
        return _compared(outputs, reference, max(within, 0.1 if method == "relabel" else 0.01))

    return heal


_DO: Final[Mapping[str, Callable[[Case, float], str | None]]] = {
    "trace": _trace,
    "variations": _variations,
    "scan": _scan,
    "names": _names,
    "coverage": _coverage,
    **{method: _heal(method) for method in HEALING},
}


# The plain form.


@final
class LookedUp(nn.Module):
    """A network whose input is the number of an example, as a picture of one pixel."""

    def __init__(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.network, self.inputs = network, inputs

    def forward(self, images: Tensor) -> Tensor:
        rows = (images[:, 0, 0, 0] * 255).round().long()
        outputs: Tensor = self.network(*(part[rows] for part in self.inputs))
        return outputs


def _plain_findings(case: Case, verb: str, method: str) -> Any:
    count = len(case.labels)
    numbers = torch.arange(count + 1, dtype=torch.uint8)[:, None, None, None]
    inputs = tuple(
        torch.cat([part, query]) for part, query in zip(case.inputs, case.query_inputs, strict=True)
    )
    network = LookedUp(case.plain(copy.deepcopy(case.model)).eval(), inputs)
    names = tuple(str(label) for label in range(case.classes))
    training_set = TrainingSet(numbers[:count], case.labels, names)
    if verb == "scan":
        return unpoison.scan(network, training_set, method=method)
    return unpoison.trace(network, training_set, unpoison.Observation(numbers[count]), method=method)


# What can be wrong with a result.


def _compared(found: Tensor, right: Tensor, within: float) -> str | None:
    told = _finite(found, len(right))
    if told:
        return told
    found, right = found.double().cpu(), right.double().cpu()
    difference = float((found - right).abs().max() / right.abs().max().clamp(min=1e-12))
    return (
        f"wrong: differs from the plain form by {difference:.2g} of the largest value"
        if difference > within
        else None
    )


def _finite(values: Tensor, count: int) -> str | None:
    if len(values) != count:
        return f"wrong: {len(values)} rows for {count} examples"
    return None if bool(values.isfinite().all()) else "wrong: not all values are finite"


def _same_kind(before: nn.Module, after: nn.Module, *, trained_anew: bool) -> str | None:
    old, new = before.state_dict(), after.state_dict()
    if list(old) != list(new):
        odd = next(iter(set(old) ^ set(new)), "another order")
        return f"wrong: the healed network's state_dict has other keys ({odd})"
    types = [name for name in old if isinstance(old[name], Tensor) and old[name].dtype != new[name].dtype]
    if types:
        return f"wrong: {types[0]} was {old[types[0]].dtype} and is {new[types[0]].dtype}"
    frozen = [name for name, parameter in before.named_parameters() if not parameter.requires_grad]
    moved = [name for name in frozen if not torch.equal(old[name], new[name])]
    if moved and not trained_anew:
        return f"wrong: the frozen parameter {moved[0]} was changed"
    return None


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[Callable[[], str | None]]:
    """Gives a function that says what of the model, or of the global random state, has been changed."""

    def state() -> dict[str, Any]:
        return {
            "a weight": {
                name: value.clone() if isinstance(value, Tensor) and not is_lazy(value) else None
                for name, value in model.state_dict().items()
            },
            "the mode": [module.training for module in model.modules()],
            "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
            ".grad": [parameter.grad is None for parameter in model.parameters()],
            "the hooks": [len(module._forward_hooks) for module in model.modules()],
        }

    before = state()

    def changed() -> str | None:
        for what, now in state().items():
            was = before[what]
            same = (
                was == now
                if what != "a weight"
                else all((value is None) or torch.equal(value, now[name]) for name, value in was.items())
            )
            if not same:
                return f"wrong: {what} of the given model was changed"
        return None

    yield changed


def packages() -> dict[str, str]:
    """The versions of what the kinds come from, of those that are installed."""
    names = ("torch", "torchvision", "timm", "transformers", "peft", "datasets", "lightning")
    return {name: version(name) for name in names if importlib.util.find_spec(name) is not None}


def outside_tracked_kinds(model: nn.Module) -> float:
    """The share of parameters that belong to no Linear and no Conv2d with torch's own forward and weight."""
    inside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)
        and not parametrize.is_parametrized(module)
        for parameter in module.parameters(recurse=False)
    }
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    total = sum(sizes.values())
    return sum(size for key, size in sizes.items() if key not in inside) / max(total, 1)
