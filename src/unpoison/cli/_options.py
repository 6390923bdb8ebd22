"""The options of every verb: frozen dataclasses that import no torch, so that `--help` answers at once.

The docstring of a class is what `unpoison VERB --help` opens with, the string under a field the help of its
option.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, final

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
    arg(metavar="KEY=VALUE...", help_behavior_hint="", help="Options of the method, values as in TOML."),
]
Preset = Annotated[
    str | None, arg(metavar="PRESET", help_behavior_hint="", help="The settings of the method.")
]


@final
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run; the same for every verb."""

    seed: Annotated[int, arg(metavar="N")] = 0
    """What everything random is derived from."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes the GPU when there is one."""
    threads: MaybeCount = None
    """How many processor threads to use; as many as PyTorch likes when not given."""
    memory: Annotated[str | None, arg(metavar="BYTES", help_behavior_hint="")] = None
    """How much memory the verb may take, such as 8GB; nine tenths of what is free when not given. What takes
    more is refused before it starts."""
    json: bool = False
    """Print the content of run.json on standard output, and nothing else there."""
    overwrite: bool = False
    """Replace --out if it is a run directory already."""
    progress: Literal["auto", "json"] = "auto"
    """How to tell on standard error how far it is: a bar on a terminal and lines elsewhere, or JSON lines for
    a program to read."""


@final
@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How image files are read."""

    size: MaybeCount = None
    """Resize the shorter side of every image to so many pixels (area average), and cut out the middle square;
    what the images are without it must be of one size."""
    orient: bool = False
    """Turn photographs as their EXIF orientation says."""


@final
@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How a set is read that is not held in memory."""

    transform: MaybeFunction = None
    """What makes inputs of pictures, as package.module:function: from a picture of Pillow in RGB to the
    tensor that the network was trained on, the same at every call. The set is then read batch by batch."""
    held_share: Annotated[float, arg(metavar="X")] = 0.25
    """Hold image files in memory where they take no more than this share of what may be taken, and else
    decode them batch by batch in every pass; 0 never holds any."""
    workers: MaybeCount = None
    """Processes that decode ahead; half as many as there are cores, 8 at most, when not given."""
    cache: MaybeDirectory = None
    """Keep what was decoded here; further passes and runs read it from there."""
    fingerprint: Literal["files", "content"] = "files"
    """What ties findings to a set that is not held: names, sizes and times of files, or the whole content,
    which takes a pass."""


@final
@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """Where work is done that is done in parallel."""

    executor: Literal["local", "ray"] = "local"
    """Where: in processes of this machine, or on a Ray cluster."""
    ray_address: MaybeText = None
    """The Ray cluster, e.g. auto; one is started on this machine when not given."""
    gpu_share: Annotated[float, arg(metavar="X")] = 0.0
    """With Ray, how much of a GPU each worker needs: .25 lets four share one."""


@final
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model that unpoison did not train."""

    weights: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The weights of a timm:, torchvision: or package.module:factory model, as .safetensors; names may have a
    prefix, such as module. or model."""
    normalization: Annotated[str | None, arg(metavar="MEANS;STDS", help_behavior_hint="")] = None
    """What such a model expects its input to be normalised with, e.g. ".49,.48,.45;.25,.24,.26"."""
    task: Options = ()
    """How its logits are read: output=KEY, the key, attribute or place of the logits in what it returns;
    values=probabilities, if it returns those in place of logits."""


@final
@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """How to train: a preset, and what to change in it."""

    recipe: Annotated[str | None, arg(metavar="PRESET", help_behavior_hint="")] = None
    """The preset to start from: sample (2 cores, a minute), cifar10-small, resnet18-40, resnet18-200,
    benchmark-200, fast. Sample when not given, but for heal the recipe that the model was trained with."""
    epochs: MaybeCount = None
    """Passes over the training set."""
    batch_size: MaybeCount = None
    """Examples a step."""
    learning_rate: MaybeNumber = None
    """The highest learning rate."""
    weight_decay: MaybeNumber = None
    """Weight decay."""
    no_flip: bool = False
    """Do not mirror images, whatever the preset says: for signs, letters, and all that has left and right."""


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
    """What the adversary wants: backdoor, targeted-misclassification, self-concealment, label-noise,
    all-to-all or availability; the first that the attack serves and that fits when not given."""
    source: MaybeClass = None
    """The class whose images bear the trigger; every class but the target when not given."""
    target: MaybeClass = None
    """The class that the trigger, or --target-image, is to be answered with. Classes go by name or number."""
    target_image: Annotated[tuple[str, ...], arg(metavar="test:INDEX...", help_behavior_hint="")] = ()
    """Test images, of one class, that are to be taken for --target (or, for self-concealment, for any class
    but their own)."""
    budget: MaybeNumber = None
    """How much to poison, as a share of the training set (.01 when neither budget is given)."""
    budget_count: MaybeCount = None
    """How many examples to poison."""
    trigger: Annotated[str | None, arg(metavar="TRIGGER", help_behavior_hint="")] = None
    """white-corner (3x3; when not given), four-pixels (black), or an image file to stamp into the corner."""
    preset: Preset = None
    option: Options = ()
    surrogate: Annotated[tuple[Path, ...], arg(metavar="DIR...", help_behavior_hint="")] = ()
    """Run directories of train: the networks to craft on, for attacks that use some; trained here, on the
    clean set, when not given."""
    surrogates: MaybeCount = None
    """How many of those to train; the attack's own number when not given."""
    model: MaybeText = None
    """The network of surrogates, by its name in unpoison.models, in place of the preset's."""
    width: MaybeCount = None
    """Its width."""
    training: RecipeOptions
    checkpoints: MaybeDirectory = None
    """Keep the state of an attack that can resume here; the same command, given again, goes on from it."""
    list: bool = False
    """Describe the attacks, and do nothing else."""
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
    """A run directory of craft (or its poison/): put this poison into the training set."""
    defense: Defense = None
    preset: Preset = None
    option: Options = ()
    checkpoints: MaybeDirectory = None
    """Keep checkpoints here; the same command, given again after Ctrl-C or a crash, goes on from them."""
    model: MaybeText = None
    """The network, by its name in unpoison.models, in place of the preset's."""
    width: MaybeCount = None
    """Its width."""
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
    archive, or package.module:function, which gives a dataset or a pair of them, for training and test."""
    test_data: MaybeData = None
    """The test set, where it does not come with --data."""
    images: ImageOptions
    reading: ReadingOptions
    poison: MaybeDirectory = None
    """The poison that was put into the training set, where that is known; results are held against it."""


@final
@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """What to trace, and how."""

    suspect: Annotated[tuple[str, ...], arg(metavar="SUSPECT...")]
    """The input answered wrongly: an image file, test:INDEX, or triggered:INDEX (that test image with the
    trigger of --poison stamped on it). Several with the same answer are combined."""
    predicted: MaybeClass = None
    """The wrong label; what the model says when not given."""
    true: MaybeClass = None
    """What it ought to be; shown in the report, never used to trace. Known for test: and triggered:."""
    method: Tracer = "calibrated"
    preset: Preset = None
    option: Options = ()
    modules: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Modules whose parameters to track, or patterns such as layer4*; all that can be when not given."""
    reference: MaybeData = None
    """Labelled examples that are known to be clean and were not trained on, for calibrated; the test set when
    not given."""
    groups: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Names of groups of near-duplicates (tracks, patients, sources), for calibrated: one line for each
    training example, or a JSON list; measured on the images when not given."""
    calibration: MaybeDirectory = None
    """Where calibrated keeps what it learns of the model, for further traces of it; the directory calibration
    in that of --model when not given."""


@final
@dataclass(frozen=True, kw_only=True)
class Trace(OfModel):
    """Find the training examples that a wrong prediction goes back to. Writes DIR/findings."""

    tracing: TraceOptions
    index: MaybeDirectory = None
    """An index of the model and its training set, by unpoison index: the trace then takes the gradients of
    the suspect alone. What calibrated learns of the model is kept in it."""
    refine: MaybeCount = None
    """With an index, score so many of the examples that it ranks first again, exactly; 1000 when not
    given."""
    fail_on_findings: bool = False
    """End with status 1 when poison was found."""
    architecture: ModelOptions
    out: Directory
    """The run directory to write."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Index(OfModel):
    """Read the training set of a model once, so that trace --index and similar answer from what is kept.
    Given again after Ctrl-C or a crash, it goes on; a damaged file is made again."""

    numbers: MaybeCount = None
    """How many numbers to keep of each example; 2048 when not given, fewer where memory is short."""
    processes: MaybeCount = None
    """How many processes read training examples at a time, with a thread each where there are several; 1 when
    not given, with Ray as many as its cores allow."""
    place: ExecutorOptions
    modules: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Modules whose parameters to track, or patterns such as layer4*; all that can be when not given."""
    covariance_examples: MaybeCount = None
    """Fit the covariances to this many examples only."""
    eigenvalue_examples: MaybeCount = None
    """Fit the eigenvalues to this many examples only."""
    append: bool = False
    """Add the examples of --data to the index, after those that it has, which are not read again."""
    estimate: bool = False
    """Time some hundred examples, say what the index will take, and make none."""
    price: MaybeNumber = None
    """With --estimate, what a machine costs an hour, to say what the index will cost."""
    reference: MaybeData = None
    """Labelled examples that were not trained on, on which calibrated is calibrated at once, so that the
    first trace is as fast as the others; the test set when not given."""
    architecture: ModelOptions
    out: Directory
    """The directory of the index."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Similar:
    """Show the training examples whose gradients resemble those of given ones, from an index."""

    index: Directory
    """A directory that unpoison index wrote."""
    examples: Annotated[str, arg(metavar="N,N...")]
    """The examples, by index or by name."""
    count: Annotated[int, arg(metavar="N")] = 10
    """How many similar ones to show of each."""
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
    """How often to heal, at most."""
    training: RecipeOptions
    architecture: ModelOptions
    out: Directory
    """The run directory to write."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Scan(OfModel):
    """Search a training set for poison by what the model makes of it, without a wrong prediction to start
    from. Writes DIR/findings."""

    test_data: MaybeData = None
    """The test set, where it does not come with --data; it is not looked at."""
    method: Scanner = "statistical-contamination"
    preset: Preset = None
    option: Options = ()
    reference: MaybeData = None
    """Images that are known to be clean, for detectors that make use of some."""
    index: MaybeDirectory = None
    """An index of the model and its training set, by unpoison index, for gradient-clusters."""
    fail_on_findings: bool = False
    """End with status 1 when poison was found."""
    architecture: ModelOptions
    out: Directory
    """The run directory to write."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Screen(OfModel):
    """Say of inputs whether they look triggered, without a wrong answer to start from. What is flagged can be
    traced. Writes DIR/screening."""

    inputs: Annotated[tuple[str, ...], arg(metavar="INPUT...")]
    """What to screen, in the words of trace --suspect: image files, folders of image files, test:INDEX,
    triggered:INDEX; or test, for the whole test set."""
    reference: Data
    """Labelled examples that are known to be clean, were not trained on and are not among the inputs; 19 or
    more for a rate of .05, 99 for .01."""
    method: InputDetector = "strip"
    preset: Preset = None
    option: Options = ()
    false_positive_rate: Annotated[float, arg(metavar="X")] = 0.05
    """The share of clean inputs that may be flagged."""
    fail_on_findings: bool = False
    """End with status 1 when an input was flagged."""
    architecture: ModelOptions
    out: Directory
    """The run directory to write."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Heal(OfModel):
    """Make a model forget the training examples that trace flagged, or, with nothing found, repair it by
    clean examples. Writes the healed model to DIR/model."""

    findings: MaybeDirectory = None
    """A run directory of trace (or its findings/). Where they are whole, retrain, or in less time relabel;
    where only a part of the poison was found, potion; nad, fine-pruning and i-bau do without."""
    reference: MaybeData = None
    """Labelled examples that are known to be clean, for nad, fine-pruning and i-bau; what the findings left
    when not given."""
    method: Unlearner = "retrain"
    preset: Preset = None
    option: Options = ()
    train_command: Annotated[str | None, arg(metavar="COMMAND", help_behavior_hint="")] = None
    """Train by a program of your own in place of a method: it is run as COMMAND KEPT.csv WEIGHTS.safetensors,
    with the indices and names of the examples to keep, and writes the weights."""
    training: RecipeOptions
    architecture: ModelOptions
    out: Directory
    """The run directory to write."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Bench:
    """Run a recipe: attacks x defenses, detectors and unlearners over targets and seeds, with controls. Given
    again, it goes on where it was stopped."""

    recipe: Positional[Annotated[Path, arg(metavar="RECIPE.toml")]]
    """The recipe; docs/benchmarking.md says what it may hold."""
    workers: MaybeCount = None
    """How many stages to do at a time; as many as there are cores when not given."""
    place: ExecutorOptions
    out: Directory = Path("bench")
    """The store of results to write, or to go on with."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one self-contained HTML page about runs, or the leaderboard of a store of results."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="DIR...", help_behavior_hint="")]]
    """The run directories to tell about, or one store of bench."""
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
    """csv, parquet: a row for each example; json: the flagged ones; list: the names of the flagged ones, a
    line each; unflagged-list: those of all others; folder: hard links to the flagged files; sarif: SARIF
    2.1.0 for code scanning; cyclonedx: a CycloneDX 1.6 bill of materials with data and model; markdown: a
    summary for a ticket."""
    files: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")] = None
    """The training folder (or file), for folder, and for the paths and hashes of sarif and cyclonedx; where
    the run read it, if it is still there, when not given."""
    model: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")] = None
    """The model, as a run directory or a file of weights, for cyclonedx; likewise when not given."""
    fail_on_findings: bool = False
    """End with status 1 when poison was found, after writing."""
    out: Annotated[Path, arg(metavar="PATH")]
    """The file (or folder) to write; it must not be there yet."""
    run: RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class App:
    """Open a page on this machine to work through findings in: look, decide, trace, heal, export."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="DIR...", help_behavior_hint="")]]
    """What to work on: run directories of trace, scan, heal, repair, train or demo, an index, or a directory
    of findings alone."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The model; what the run directories name when not given, as for the options of data below."""
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
    """What the address of the page must hold, 16 characters or more; a random one when not given."""
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
