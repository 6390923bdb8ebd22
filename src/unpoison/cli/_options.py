"""The options of every verb: frozen dataclasses that import no torch, so that `--help` answers at once.

The docstring of a class is what `unpoison VERB --help` opens with, the string under a field the help of its
option.
"""

from __future__ import annotations

import ast
import operator
from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Final, Literal, final, get_type_hints

from tyro.conf import Positional, arg, subcommand

from unpoison import attacks, defenses, detectors, input_detectors, unlearners
from unpoison.registry import Registry
from unpoison.report import Form
from unpoison.runs import json_value

Class = Annotated[str, arg(metavar="CLASS")]
MaybeClass = Annotated[str | None, arg(metavar="CLASS", help_behavior_hint="")]
MaybeDirectory = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]
MaybeCount = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
MaybeNumber = Annotated[float | None, arg(metavar="X", help_behavior_hint="")]
MaybeText = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
MaybeFunction = Annotated[str | None, arg(metavar="MODULE:FUNCTION", help_behavior_hint="")]
Directory = Annotated[Path, arg(metavar="DIR")]
Data = Annotated[str, arg(metavar="DATA")]
MaybeData = Annotated[str | None, arg(metavar="DATA", help_behavior_hint="")]
Model = Annotated[str, arg(metavar="MODEL")]


def _listed(registry: Registry[Any], **wanted: bool) -> str:
    """The methods whose declarations have the wanted values, with their presets."""
    listed = []
    for method in map(registry.describe, registry.names()):
        if all(getattr(method, name) == value for name, value in wanted.items()):
            presets = "" if method.presets == ("default",) else f" ({', '.join(method.presets)})"
            listed.append(f"{method.name}{presets}")
    return ", ".join(listed)


_PRESETS = "presets in parentheses, the default first"
Attack = Annotated[str, arg(metavar="ATTACK", help=f"The attack; {_PRESETS}: {_listed(attacks.METHODS)}.")]
Defense = Annotated[
    str | None,
    arg(
        metavar="DEFENSE",
        help_behavior_hint="",
        help=f"Train with this defense; {_PRESETS}: {_listed(defenses.METHODS)}.",
    ),
]
Tracer = Annotated[
    str,
    arg(
        metavar="METHOD",
        help=f"The detector; {_PRESETS}: {_listed(detectors.METHODS, needs_observation=True)}.",
    ),
]
Scanner = Annotated[
    str,
    arg(
        metavar="METHOD",
        help=f"The detector; {_PRESETS}: {_listed(detectors.METHODS, needs_observation=False)}. Only "
        f"{_listed(detectors.METHODS, needs_observation=False, can_find_nothing=True)} can find nothing; the "
        "others flag a share of any set.",
    ),
]
InputDetector = Annotated[
    str,
    arg(
        metavar="METHOD",
        help=f"The test-time detector; {_PRESETS}: {_listed(input_detectors.METHODS)}.",
    ),
]
Unlearner = Annotated[
    str, arg(metavar="METHOD", help=f"The unlearner; {_PRESETS}: {_listed(unlearners.METHODS)}.")
]
Options = Annotated[
    tuple[str, ...],
    arg(metavar="KEY=VALUE...", help_behavior_hint="", help="Options of the method, with values as in TOML."),
]
Preset = Annotated[
    str | None, arg(metavar="PRESET", help_behavior_hint="", help="A named choice of settings of the method.")
]


@final
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run; the same for every verb."""

    seed: Annotated[int, arg(metavar="N")] = 0
    """The seed that all randomness is derived from."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to compute on; auto takes the GPU if there is one."""
    threads: MaybeCount = None
    """Number of processor threads; PyTorch's default when not given."""
    memory: Annotated[str | None, arg(metavar="BYTES", help_behavior_hint="")] = None
    """How much memory the command may use, such as 8GB; nine tenths of the free memory when not given. A run
    that would need more is refused before it starts."""
    json: bool = False
    """Print the content of run.json, and nothing else, on standard output."""
    overwrite: bool = False
    """Replace --out if it is a run directory already."""
    progress: Literal["auto", "json"] = "auto"
    """How to report progress on standard error. auto: a bar on a terminal, plain lines elsewhere; json: JSON
    lines for a program to read."""


@final
@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How image files are read."""

    size: MaybeCount = None
    """Resize the shorter side of every image to N pixels (area average), and crop the square in the centre.
    Without it, all images must have the same size."""
    orient: bool = False
    """Rotate photographs according to their EXIF orientation."""


@final
@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How a data set that is not held in memory is read."""

    transform: MaybeFunction = None
    """The function that makes an input of a picture, as package.module:function: it takes a Pillow image in
    RGB and returns the tensor that the network was trained on, the same at every call. The set is then read
    batch by batch."""
    held_share: Annotated[float, arg(metavar="X")] = 0.25
    """Hold image files in memory if they take no more than this share of the memory that may be used;
    otherwise decode them batch by batch in every pass. 0 never holds any."""
    workers: MaybeCount = None
    """Number of processes that decode in advance; when not given, half the number of cores, at most 8."""
    cache: MaybeDirectory = None
    """Keep decoded images here; later passes and runs read them from there."""
    fingerprint: Literal["files", "content"] = "files"
    """What ties findings to a set that is not held in memory: the names, sizes and times of its files, or its
    whole content, which takes one pass."""


@final
@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """Where parallel work is done."""

    executor: Literal["local", "ray"] = "local"
    """local: in processes on this machine; ray: on a Ray cluster."""
    ray_address: MaybeText = None
    """The address of the Ray cluster, e.g. auto; when not given, one is started on this machine."""
    gpu_share: Annotated[float, arg(metavar="X")] = 0.0
    """With Ray, the share of a GPU that each worker needs; .25 lets four workers share one."""


@final
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model that unpoison did not train."""

    weights: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The weights of a timm:, torchvision: or package.module:factory model, as .safetensors; the names of the
    tensors may have a prefix, such as module. or model."""
    normalization: Annotated[str | None, arg(metavar="MEANS;STDS", help_behavior_hint="")] = None
    """The means and standard deviations with which such a model expects its input to be normalised, e.g.
    ".49,.48,.45;.25,.24,.26"."""
    task: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE...", help_behavior_hint="")] = ()
    """How the logits are read from what the model returns: output=KEY gives their key, attribute or position;
    values=probabilities, if it returns probabilities in place of logits."""


@final
@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """How to train: a preset, and what to change in it."""

    recipe: Annotated[str | None, arg(metavar="PRESET", help_behavior_hint="")] = None
    """The preset to start from: sample (2 cores, a minute), cifar10-small, resnet18-40, resnet18-200,
    benchmark-200, fast. When not given: sample; for heal, the recipe that the model was trained with."""
    epochs: MaybeCount = None
    """Passes over the training set."""
    batch_size: MaybeCount = None
    """Examples per step."""
    learning_rate: MaybeNumber = None
    """The highest learning rate."""
    weight_decay: MaybeNumber = None
    """Weight decay."""
    no_flip: bool = False
    """Do not mirror images, whatever the preset says: for signs, letters and anything else whose mirror image
    is different."""


@final
@dataclass(frozen=True, kw_only=True)
class Demo:
    """Poison the bundled sample, train on it, trace one wrong prediction, heal the model, and report."""

    out: Directory = Path("demo")
    """The run directory to write."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Craft:
    """Poison a training set. Writes the poison set to DIR/poison; `craft --list` describes the attacks."""

    attack: Positional[Attack]
    data: Data
    """sample, a folder of class folders, .npz, .parquet, a .csv of paths and labels, .tar shards, or an
    extracted CIFAR archive."""
    test_data: MaybeData = None
    """The test set, where it does not come with --data."""
    images: ImageOptions
    goal: MaybeText = None
    """What the adversary wants: backdoor, targeted-misclassification, self-concealment, label-noise, all-to-
    all or availability; when not given, the first that the attack supports and that fits the other
    options."""
    source: MaybeClass = None
    """The class whose images get the trigger; every class but the target when not given."""
    target: MaybeClass = None
    """The class that images with the trigger, or --target-image, are to be classified as. Classes are given
    by name or by number."""
    target_image: Annotated[tuple[str, ...], arg(metavar="test:INDEX...", help_behavior_hint="")] = ()
    """Test images of one class that are to be classified as --target (for self-concealment, as any class but
    their own)."""
    budget: MaybeNumber = None
    """How much to poison, as a share of the training set; .01 when neither budget is given."""
    budget_count: MaybeCount = None
    """How many examples to poison."""
    trigger: Annotated[str | None, arg(metavar="TRIGGER", help_behavior_hint="")] = None
    """white-corner (3x3; when not given), four-pixels (black), or an image file, which is stamped into the
    corner."""
    preset: Preset = None
    option: Options = ()
    surrogate: Annotated[tuple[Path, ...], arg(metavar="DIR...", help_behavior_hint="")] = ()
    """Run directories of train: the networks to craft on, for attacks that need some. When not given, they
    are trained here, on the clean set."""
    surrogates: MaybeCount = None
    """How many such networks to train; the attack's default when not given."""
    model: MaybeText = None
    """The architecture of these networks, by its name in unpoison.models, in place of the preset's."""
    width: MaybeCount = None
    """The width of the network."""
    training: RecipeOptions
    checkpoints: MaybeDirectory = None
    """Keep the state of the attack here, if it can resume; the same command, run again, continues from it."""
    list: bool = False
    """Describe the attacks and do nothing else."""
    out: Directory
    """The run directory to write."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a classifier, on clean or on poisoned data. Writes the model to DIR/model."""

    data: Data
    """sample, a folder of class folders, .npz, .parquet, a .csv of paths and labels, .tar shards, or an
    extracted CIFAR archive."""
    test_data: MaybeData = None
    """The test set, where it does not come with --data."""
    images: ImageOptions
    poison: MaybeDirectory = None
    """A run directory of craft (or its poison/); its poison is applied to the training set."""
    defense: Defense = None
    preset: Preset = None
    option: Options = ()
    checkpoints: MaybeDirectory = None
    """Keep checkpoints here; the same command, run again after Ctrl-C or a crash, continues from them."""
    model: MaybeText = None
    """The network, by its name in unpoison.models, in place of the preset's."""
    width: MaybeCount = None
    """The width of the network."""
    training: RecipeOptions
    out: Directory
    """The run directory to write."""
    run: RunOptions


@dataclass(frozen=True, kw_only=True)
class OfModel:
    """A model, and what it was trained on."""

    model: Model
    """A run directory of train or heal; or timm:NAME, torchvision:NAME or package.module:factory (with
    --weights), or transformers:FOLDER."""
    data: Data
    """The training set of the model: sample, a folder, .npz, .parquet, .csv, .tar, an extracted CIFAR
    archive, or package.module:function, which returns a dataset, or a pair for training and test."""
    test_data: MaybeData = None
    """The test set, where it does not come with --data."""
    images: ImageOptions
    reading: ReadingOptions
    poison: MaybeDirectory = None
    """The poison that was applied to the training set, where it is known; results are compared with it."""


@final
@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """What to trace, and how."""

    suspect: Annotated[tuple[str, ...], arg(metavar="SUSPECT...")]
    """The input that is classified wrongly: an image file, test:INDEX, or triggered:INDEX (that test image
    with the trigger of --poison stamped on it). Several with the same predicted label are combined."""
    predicted: MaybeClass = None
    """The wrong label; the model's prediction when not given."""
    true: MaybeClass = None
    """The correct label; shown in the report, never used to trace. It is known for test: and triggered:."""
    method: Tracer = "calibrated"
    preset: Preset = None
    option: Options = ()
    modules: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Modules whose parameters to track, or patterns such as layer4*; when not given, all that can be
    tracked."""
    reference: MaybeData = None
    """Labelled examples that are known to be clean and that the model was not trained on, for calibrated; the
    test set when not given."""
    groups: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Names of groups of near-duplicates (tracks, patients, sources), for calibrated: one line for each
    training example, or a JSON list. When not given, near-duplicates are measured on the images."""
    calibration: MaybeDirectory = None
    """Where calibrated keeps its calibration, for further traces of the same model; when not given, the
    directory calibration in --model."""


@final
@dataclass(frozen=True, kw_only=True)
class Trace(OfModel):
    """Find the training examples that are responsible for a wrong prediction. Writes DIR/findings."""

    tracing: TraceOptions
    index: MaybeDirectory = None
    """An index of the model and its training set, made by unpoison index: the trace then computes the
    gradients of the suspect alone. The calibration of calibrated is kept in it."""
    refine: MaybeCount = None
    """With an index, how many of the examples that it ranks first are scored again, exactly; 1000 when not
    given."""
    fail_on_findings: bool = False
    """Exit with status 1 if poison was found."""
    architecture: ModelOptions
    out: Directory
    """The run directory to write."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Index(OfModel):
    """Read the training set of a model once, so that trace --index and similar can answer from what is
    stored. Run again after Ctrl-C or a crash, it continues; a damaged file is made again."""

    numbers: MaybeCount = None
    """How many numbers to keep of each example; when not given, whole gradients if all of them take at most 8
    GiB, otherwise 2048, or fewer if memory is short."""
    processes: MaybeCount = None
    """How many processes read training examples at a time, with one thread each if there are several; when
    not given, 1, and with Ray as many as its cores allow."""
    place: ExecutorOptions
    modules: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Modules whose parameters to track, or patterns such as layer4*; when not given, all that can be
    tracked."""
    covariance_examples: MaybeCount = None
    """Fit the covariances to this many examples; 2048 when not given."""
    eigenvalue_examples: MaybeCount = None
    """Fit the eigenvalues to this many examples; 2048 when not given."""
    append: bool = False
    """Add the examples of --data to the index, after those in it, which are not read again."""
    estimate: bool = False
    """Time at most 256 examples, say what the index will take, and do not make it."""
    price: MaybeNumber = None
    """With --estimate, the price of a machine per hour, to say what the index will cost."""
    reference: MaybeData = None
    """Labelled examples that the model was not trained on; calibrated is calibrated on them at once, so that
    the first trace is as fast as the others. The test set when not given."""
    architecture: ModelOptions
    out: Directory
    """The directory of the index."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Similar:
    """Show the training examples whose gradients resemble those of given ones, from an index."""

    index: Directory
    """A directory written by unpoison index."""
    examples: Annotated[str, arg(metavar="N,N...")]
    """The examples, by index or by name."""
    count: Annotated[int, arg(metavar="N")] = 10
    """How many similar examples to show for each."""
    out: MaybeDirectory = None
    """A run directory to write run.json to."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Repair(OfModel):
    """Trace a wrong prediction, heal the model, and trace the healed model again, until nothing is found.
    Writes the healed model to DIR/model and the findings of the first trace to DIR/findings."""

    tracing: TraceOptions
    unlearner: Unlearner = "retrain"
    rounds: Annotated[int, arg(metavar="N")] = 3
    """The largest number of rounds: of traces that are followed by healing."""
    withheld: Annotated[float, arg(metavar="X")] = 1.0
    """How many examples that rank next are withheld from the first healing of a round, as a multiple of the
    flagged ones; 0 for none."""
    training: RecipeOptions
    architecture: ModelOptions
    out: Directory
    """The run directory to write."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Scan(OfModel):
    """Search the training set of a model for poison, without a wrong prediction to start from. Writes
    DIR/findings."""

    test_data: MaybeData = None
    """The test set, where it does not come with --data; it is not used."""
    method: Scanner = "statistical-contamination"
    preset: Preset = None
    option: Options = ()
    reference: MaybeData = None
    """Images that are known to be clean, for detectors that use them."""
    index: MaybeDirectory = None
    """An index of the model and its training set, made by unpoison index, for gradient-clusters."""
    fail_on_findings: bool = False
    """Exit with status 1 if poison was found."""
    architecture: ModelOptions
    out: Directory
    """The run directory to write."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Screen(OfModel):
    """Test inputs for a trigger, without a wrong prediction to start from. Flagged inputs can be traced.
    Writes DIR/screening."""

    inputs: Annotated[tuple[str, ...], arg(metavar="INPUT...")]
    """What to screen, given as for trace --suspect: image files, folders of image files, test:INDEX,
    triggered:INDEX; or test, for the whole test set."""
    reference: Data
    """Labelled examples that are known to be clean, that the model was not trained on, and that are not among
    the inputs; at least 19 for a rate of .05, 99 for .01."""
    method: InputDetector = "strip"
    preset: Preset = None
    option: Options = ()
    false_positive_rate: Annotated[float, arg(metavar="X")] = 0.05
    """The share of clean inputs that may be flagged."""
    fail_on_findings: bool = False
    """Exit with status 1 if an input was flagged."""
    architecture: ModelOptions
    out: Directory
    """The run directory to write."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Heal(OfModel):
    """Make a model forget the training examples that trace flagged, or, without findings, repair it with
    clean examples. Writes the healed model to DIR/model."""

    findings: MaybeDirectory = None
    """A run directory of trace (or its findings/). If they hold all of the poison, heal by retrain, or in
    less time by relabel; if they hold a part of it, by potion. nad, fine-pruning and i-bau need no
    findings."""
    reference: MaybeData = None
    """Labelled examples that are known to be clean, for nad, fine-pruning and i-bau; when not given, the
    examples that the findings do not flag."""
    method: Unlearner = "retrain"
    preset: Preset = None
    option: Options = ()
    train_command: Annotated[str | None, arg(metavar="COMMAND", help_behavior_hint="")] = None
    """Train with a program of your own in place of a method: it is run as COMMAND KEPT.csv
    WEIGHTS.safetensors, finds the indices and names of the examples to keep in the first file, and writes the
    weights to the second."""
    training: RecipeOptions
    architecture: ModelOptions
    out: Directory
    """The run directory to write."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Bench:
    """Run a recipe: attacks x defenses, detectors and unlearners over targets and seeds, with controls. Run
    again, it continues where it was stopped."""

    recipe: Positional[Annotated[Path, arg(metavar="RECIPE.toml")]]
    """The recipe; docs/benchmarking.md says what it may hold."""
    workers: MaybeCount = None
    """How many stages to run at a time; the number of cores when not given."""
    place: ExecutorOptions
    out: Directory = Path("bench")
    """The store of results to write or to continue."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one self-contained HTML page about runs, or the leaderboard of a store of results."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="DIR...", help_behavior_hint="")]]
    """The run directories to report on, or one store of bench."""
    out: Annotated[Path, arg(metavar="PATH")] = Path("report.html")
    """The page (FILE.html; FILE.md or FILE.tex for a leaderboard), or a run directory to write it to."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Export:
    """Write what was found as a table or a list, by the names of files. Nothing is deleted or moved."""

    findings: Positional[Annotated[Path, arg(metavar="DIR")]]
    """A run directory of trace, scan or repair (or its findings/)."""
    form: Annotated[Form, arg(name="as", metavar="FORM")] = "csv"
    """csv, parquet: a row for each example; json: the flagged ones; list: the names of the flagged ones, one
    per line; unflagged-list: those of all others; folder: hard links to the flagged files; sarif: SARIF 2.1.0
    for code scanning; cyclonedx: a CycloneDX 1.6 bill of materials with data and model; markdown: a summary
    for a ticket."""
    files: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")] = None
    """The training folder (or file), for folder, and for the paths and hashes of sarif and cyclonedx; when
    not given, the one that the run read, if it still exists."""
    model: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")] = None
    """The model, as a run directory or a file of weights, for cyclonedx; when not given, likewise."""
    fail_on_findings: bool = False
    """Exit with status 1, after writing, if poison was found."""
    out: Annotated[Path, arg(metavar="PATH")]
    """The file (or folder) to write; it must not exist yet."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class App:
    """Open a page on this machine for working through findings: look, decide, trace, heal, export."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="DIR...", help_behavior_hint="")]]
    """What to work on: run directories of trace, scan, heal, repair, train or demo, an index, or a directory
    of findings alone."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The model; when not given, the one that the run directories name. This holds for the options of data
    below, too."""
    data: MaybeData = None
    """The training set of the model."""
    test_data: MaybeData = None
    """The test set, where it does not come with --data."""
    images: ImageOptions
    reading: ReadingOptions
    poison: MaybeDirectory = None
    """The poison that was put into the training set, where that is known."""
    architecture: ModelOptions
    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1"
    """The address to listen on; one that other machines reach needs a --token."""
    port: Annotated[int, arg(metavar="N")] = 0
    """The port to listen on; a free one when 0."""
    token: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None
    """The token that the address of the page must contain, at least 16 characters; a random one when not
    given."""
    out: MaybeDirectory = None
    """Where decisions, traces and healed models are kept; DIR-investigation when not given."""
    run: RunOptions


Verb = (
    Demo
    | Craft
    | Train
    | Index
    | Trace
    | Similar
    | Scan
    | Screen
    | Heal
    | Repair
    | Bench
    | Report
    | Export
    | App
)
VERBS: tuple[type[Verb], ...] = (
    Demo,
    Craft,
    Train,
    Index,
    Trace,
    Similar,
    Scan,
    Screen,
    Heal,
    Repair,
    Bench,
    Report,
    Export,
    App,
)


def _helps() -> dict[str, dict[str, str]]:
    """The strings below the fields of each class of this module, each on one line."""
    found: dict[str, dict[str, str]] = {}
    for body in ast.parse(Path(__file__).read_text(encoding="utf-8")).body:
        if isinstance(body, ast.ClassDef):
            for field, text in zip(body.body, body.body[1:], strict=False):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                        value=ast.Constant(value=str(words))
                    ):
                        found.setdefault(body.name, {})[name] = " ".join(words.split())
    return found


HELPS: Final = _helps()
for _name, _texts in HELPS.items():  # tyro would keep the line breaks of the source
    _class = globals()[_name]
    _class.__annotations__ |= {
        name: Annotated[hint, arg(help=_texts[name])]
        for name, hint in get_type_hints(_class, include_extras=True).items()
        if name in _texts
    }

CommandLine: Any = reduce(
    operator.or_, (Annotated[verb, subcommand(name=verb.__name__.lower())] for verb in VERBS)
)


def configuration(options: Any) -> dict[str, Any]:
    """All options of a verb as JSON values, named as on the command line with underscores."""
    flat: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        flat.update(configuration(value) if is_dataclass(value) else {field.name: json_value(value)})
    return flat
