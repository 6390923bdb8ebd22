"""The one path through unpoison: craft, train, observe, trace or scan, heal, measure.

    poison_set = craft("badnets", goal, training_set, budget=Budget(share=0.01))
    victim = train(training_set, recipe, poison=poison_set)
    observation = observe(victim, goal, test_set)
    findings = trace(victim, poison_set.apply(training_set), observation)
    healed = heal(victim, poison_set.apply(training_set), findings)
    measurement = measure(healed, test_set, goal)

The command, the demo, every stage of an evaluation and every benchmark call these functions, and so do users:
they are the top-level functions of the package. What is written here once: the choice of a method by name or
instance, datasets and networks of the user's own, normalisation, defaults, the checks that what is given
belongs together, and the derivation of seeds. Everything else is the methods' own.

A model is a `Trained` or any `nn.Module` that takes Float[b c h w] images in [0, 1] (or standardised ones,
see `normalization`), or whatever inputs the dataset gives, and returns Float[b classes] logits. A training
set is a `TrainingSet` of 8-bit images, `DatasetExamples`, or any map-style dataset, of which
`data.as_examples` makes one of the two. What attacks change and our trainer trains on must be 8-bit images;
what reads inputs and labels alone takes any. Neither model nor set is ever changed.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar, final

import torch
from torch import Tensor, nn

from unpoison import attacks, defenses, detectors, input_detectors, unlearners
from unpoison import training as trainer
from unpoison._arguments import check_arguments
from unpoison._executors import Executor
from unpoison._inputs import Inputs, count_of
from unpoison._memory import explained, limited
from unpoison._progress import Progress
from unpoison._seeds import derive_seed
from unpoison._statistics import Proportion
from unpoison.attacks import Attack
from unpoison.data import (
    Examples,
    MapStyle,
    TensorExamples,
    TrainingSet,
    as_examples,
    as_training_set,
    from_dataset,
)
from unpoison.detectors import Calibration, Detector, Findings, Observation
from unpoison.errors import InputError, MismatchError
from unpoison.influence import FACTOR_EXAMPLES, Damping, InfluenceIndex
from unpoison.input_detectors import InputDetector, Screening
from unpoison.models import (
    Normalized,
    OutputLogits,
    check_network,
    check_outputs,
    device_of,
    usual_mode,
)
from unpoison.registry import Method, Registry
from unpoison.tasks import ClassificationTask
from unpoison.threats import Budget, Goal, PoisonSet, TriggeredGoal
from unpoison.training import Defense, Recipe, Trained, Voting, certify, predict
from unpoison.unlearners import OwnTraining, Unlearner, retrain_with

Model = Trained | nn.Module
Dataset = Examples | MapStyle
Normalization = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel."""
Groups = Sequence[Hashable] | Tensor
"""A name or number for each training example, equal for near-duplicates."""
T = TypeVar("T")
P = ParamSpec("P")


def bounded(advice: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Check the arguments of a verb, let it take no more than its argument `memory`, and say in one line
    where that is not enough.

    Arguments:
        advice: what takes less, for an allocation that fails although the estimate says that it fits.
    """

    def bound(verb: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(verb)

        @functools.wraps(verb)
        def call(*given: P.args, **options: P.kwargs) -> T:
            check_arguments(verb.__name__, signature, signature.bind(*given, **options).arguments)
            memory: Any = options.get("memory")
            with limited(memory), explained(verb.__name__, advice):
                return verb(*given, **options)

        return call

    return bound


_LESS = "give a smaller batch_size, fewer modules= or a subset of the training set"
_LESS_POISON = "poison fewer examples, or give narrower surrogates or a subset of the training set"
_LESS_TRAINING = "give a recipe with a smaller batch_size or width, or a subset of the training set"


@bounded(_LESS_POISON)
def craft(
    attack: str | Attack,
    goal: Goal,
    training_set: Dataset,
    *,
    budget: Budget,
    surrogates: Sequence[Model] | int | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    checkpoints: str | os.PathLike[str] | None = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> PoisonSet:
    """Poison a training set.

    Arguments:
        attack: its name in `attacks.names()`, or an instance with its own options.
        goal: what the adversary wants.
        training_set: the clean set.
        budget: how many of its examples may be changed.
        surrogates: the networks to craft on, for attacks that use some; or how many to train by `recipe` on
            the clean set, the attack's own number when None.
        recipe: how to train surrogates.
        seed: of everything random.
        checkpoints: a directory, in which an attack that can resume keeps its state.
        memory: bytes that may be taken beyond what is taken already, or text such as "8GB"; nine tenths of
            what is free when None. What takes more is refused before it starts, with what would fit.
        progress: told of the training of surrogates, and of the steps of attacks that take long.

    Raises:
        InputError: there is no such attack, it cannot serve the goal or makes no use of surrogates, it needs
            some and there is neither a network nor a recipe, or the budget does not fit the set.
    """
    method, chosen = method_of(attacks.METHODS, attack)
    examples = as_training_set(training_set)
    networks = _surrogates(method, examples, surrogates, recipe, seed, progress)
    return chosen.craft(
        goal,
        examples,
        budget=budget,
        surrogate=networks or None,
        seed=seed,
        checkpoints=checkpoints,
        progress=progress,
    )


@bounded(_LESS_TRAINING)
def train(
    training_set: Dataset,
    recipe: Recipe,
    *,
    poison: PoisonSet | None = None,
    defense: str | Defense | None = None,
    start: Model | None = None,
    include: Tensor | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a network, on a clean or a poisoned set, with or without a defense.

    Arguments:
        training_set: the clean set.
        recipe: how to train.
        poison: is applied to the set first.
        defense: its name in `defenses.names()`, or an instance with its own options.
        start: the network to train on from a copy of; the recipe's own, freshly initialised, when None.
        include: Bool[n], the examples that may be learned from; all when None.
        seed: of everything random.
        device: where to train; where the training set lies when None.
        checkpoints: a directory; the state is kept there after each epoch, and the same call goes on from it.
        memory: as for `craft`.
        progress: told of every epoch, with its loss.

    Raises:
        InputError: there is no such defense, nothing to train on, or the network does not fit the set.
        MismatchError: the poison or the checkpoints belong to something else.
        TrainingDivergedError: the loss is no longer finite.
    """
    examples = as_training_set(training_set)
    return trainer.train(
        examples if poison is None else poison.apply(examples),
        recipe,
        seed=seed,
        defense=None if defense is None else method_of(defenses.METHODS, defense)[1],
        include=include,
        start=None if start is None else network_of(start),
        device=device,
        checkpoints=checkpoints,
        progress=progress,
    )


@bounded(_LESS)
def observe(model: Model, goal: Goal, test_set: Dataset, *, count: int = 1) -> Observation | None:
    """The first of the adversary's inputs that are answered as the adversary wants; None if there are none.

    Of inputs with a trigger only those count that are answered rightly without the trigger.

    Arguments:
        model: the victim.
        goal: what the adversary wants.
        test_set: clean images.
        count: how many inputs to observe, at most; all get the label that the first one gets.
    """
    network, clean = network_of(model), as_training_set(test_set)
    images, indices = goal.victims(clean)
    images, indices = images.cpu(), indices.cpu()
    answers = predict(network, images).argmax(1).cpu()
    hits = goal.achieved(answers, goal.own_labels(clean, indices))
    known = indices >= 0
    own = clean.to("cpu").subset(indices.clamp(min=0))
    if isinstance(goal, TriggeredGoal):
        hits = hits & (predict(network, own.images).argmax(1).cpu() == own.labels)
    chosen = hits.nonzero().reshape(-1)
    if not len(chosen):
        return None
    first = int(chosen[0])
    same = (answers == answers[first]) & (own.labels == own.labels[first]) & (known == known[first])
    chosen = chosen[same[chosen]][:count]
    return Observation(
        images[chosen],
        int(answers[first]),
        int(own.labels[first]) if bool(known[first]) else None,
        indices=tuple(indices[chosen].tolist()) if bool(known[first]) else (),
    )


@bounded(_LESS)
def calibrate(
    model: Model,
    training_set: Dataset,
    reference: Dataset | None = None,
    *,
    method: str | Detector = "calibrated",
    groups: Groups | None = None,
    index: InfluenceIndex | None = None,
    normalization: Normalization | None = None,
    task: ClassificationTask | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """What the model's own errors look like: one calibration for all answers that will be traced.

    Arguments:
        model: as for `trace`.
        training_set: as for `trace`.
        reference: as for `trace`.
        method: the name of a detector that calibrates, or an instance with its own options.
        groups: as for `trace`.
        index: as for `trace`.
        normalization: as for `trace`.
        task: as for `trace`.
        seed: of everything random.
        memory: as for `craft`.
        progress: as for `trace`.

    Returns:
        What `trace` takes as `calibration`; it can be saved, and loaded with `Calibration.load`.

    Raises:
        InputError: there is no such detector or it makes no calibration; the labelled examples do not fit, or
            are too few for its false-alarm level; there is not one group for each training example.

    Cost: most of a first `trace`; later ones with the calibration are cheap.
    """
    declared, detector = method_of(detectors.METHODS, method)
    _check_calibrates("calibrate", declared, detector)
    given: dict[str, Any] = {"groups": groups} if index is None else {"groups": groups, "index": index}
    calibration: Calibration = _run(
        "calibrate", detector, model, training_set, reference, normalization, task, seed, progress, **given
    )
    return calibration


@bounded(_LESS)
def trace(
    model: Model,
    training_set: Dataset,
    observation: Observation | Sequence[Observation],
    *,
    method: str | Detector = "calibrated",
    reference: Dataset | None = None,
    calibration: Calibration | None = None,
    groups: Groups | None = None,
    index: InfluenceIndex | None = None,
    refine: int | None = None,
    normalization: Normalization | None = None,
    task: ClassificationTask | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> Findings:
    """Find the training examples that a wrong prediction goes back to.

    Arguments:
        model: what was trained.
        training_set: what it was trained on, in the order whose indices are wanted, without random
            transforms.
        observation: the input that the model answers wrongly; several with the same answer are combined.
        method: the name of a detector, or an instance with its own options. "calibrated" can find nothing;
            "delta-influence" (arXiv 2411.13731) is as published; "ek-fac" and "trak" threshold influence.
        reference: labelled examples that are known to be clean and were not trained on, for detectors that
            make use of some.
        calibration: from `calibrate`, of this model and training set, for detectors that calibrate; they do
            so for this answer alone when None.
        groups: n names or numbers, equal for training examples that are near-duplicates (the frames of a
            film, the pictures of a patient), for detectors that calibrate; measured on the images when None.
        index: of this model and training set, by `index`, for detectors that can read influences from one:
            further answers then cost their own gradients alone. What a detector calibrates is kept in it.
        refine: with an index, how many of the examples that it ranks first are scored again exactly; 1,000
            when None, 0 for none.
        normalization: mean and standard deviation of each channel that the network expects its input to be
            standardised with, unless it is a `Normalized`, as those that `train` builds are. A dataset that
            gives float images is then taken to be standardised so as well, and is read back to 8 bits.
        task: where the logits are in what the network returns, and whether they are probabilities, where that
            is not clear: see `tasks.ClassificationTask`.
        seed: of everything random.
        memory: as for `craft`.
        progress: told the stage, the examples done and the examples to do.

    Returns:
        A score for every training example, the flagged ones, and whether poison was found at all.

    Raises:
        InputError: there is no such detector, it starts from no observation, or it takes no calibration; the
            observation does not fit the model or the set; the model gives another answer than the observation
            says, or the right one; or the dataset cannot be read.
        MismatchError: the calibration is of another model, training set or damping.

    Cost: `detectors.describe(method).cost`.
    """
    declared, detector = method_of(detectors.METHODS, method)
    if declared is not None and not declared.needs_observation:
        raise InputError(
            f"trace: {declared.name} searches the training set without an observation; give it to scan, or "
            f"trace with {_detectors(needs_observation=True)}"
        )
    given: dict[str, Any] = {"calibration": calibration, "groups": groups}
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        _check_calibrates("trace", declared, detector)
    if not isinstance(calibration, Calibration | None):
        raise InputError(f"trace: calibration must be a Calibration, found {calibration!r:.60}")
    if refine is not None and index is None:
        raise InputError("trace: refine is for an index alone; without one every score is exact")
    if index is not None:
        if declared is None or not declared.uses_index:
            name = type(detector).__name__ if declared is None else declared.name
            raise InputError(f"trace: {name} reads no index; {_detectors(uses_index=True)} do")
        given |= {"index": index} if refine is None else {"index": index, "refine": refine}
    given["observation"] = combined(observation)
    findings: Findings = _run(
        "find", detector, model, training_set, reference, normalization, task, seed, progress, **given
    )
    return findings


@bounded("give fewer numbers, fewer modules or a smaller memory")
def index(
    path: str | os.PathLike[str],
    model: Model,
    training_set: Dataset,
    *,
    append: bool = False,
    damping: Damping | None = None,
    modules: Sequence[str] | None = None,
    covariance_examples: int | None = FACTOR_EXAMPLES,
    eigenvalue_examples: int | None = FACTOR_EXAMPLES,
    numbers: int | None = None,
    processes: int = 1,
    executor: Executor | None = None,
    normalization: Normalization | None = None,
    task: ClassificationTask | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> InfluenceIndex:
    """Read the training set once, for any number of answers to trace: see `influence.InfluenceIndex`.

    Arguments:
        path: a directory. An unfinished index is gone on with, a damaged file is made again; a finished and
            sound one is opened.
        model: as for `trace`.
        training_set: as for `trace`; with `append`, examples that come after those of the index.
        append: add examples to the index, without reading those that it has.
        damping: of the curvature; that of "calibrated" by default.
        modules: whose parameters to track; all linear and convolution layers by default.
        covariance_examples: fit the covariances to this many examples; to all when None.
        eigenvalue_examples: fit the eigenvalues to this many examples; to all when None.
        numbers: kept of each example; by default whole gradients where all of them take at most 8 GiB, and
            else 2,048, fewer where memory is short.
        processes: how many make shards at a time, with a thread each where there are several.
        executor: makes shards in place of processes, such as an `evaluation.RayExecutor`.
        normalization: as for `trace`.
        task: as for `trace`.
        seed: of everything random.
        memory: as for `trace`; it decides how many numbers are kept, and how they are sketched.
        progress: as for `trace`.

    Returns:
        What `trace` takes as `index`, also for its similar examples and self-influences.

    Raises:
        InputError: an option is out of range, or the memory does not suffice.
        MismatchError: the directory holds the index of something else.

    Cost: two passes over examples for the factors, one over the training set for the index.
    """
    check_network(network_of(model), gradients=True)
    network = network_of(giving_logits(model, normalization, task))
    examples = examples_of(training_set, normalization)
    with usual_mode(device_of(network)):
        if append:
            known = InfluenceIndex.open(path)
            return known.append(network, examples, processes=processes, executor=executor, progress=progress)
        return InfluenceIndex.build(
            path,
            network,
            examples,
            seed=seed,
            damping=damping,
            modules=modules,
            covariance_examples=covariance_examples,
            eigenvalue_examples=eigenvalue_examples,
            numbers=numbers,
            processes=processes,
            executor=executor,
            progress=progress,
        )


@bounded(_LESS)
def scan(
    model: Model,
    training_set: Dataset,
    *,
    method: str | Detector = "statistical-contamination",
    reference: Dataset | None = None,
    index: InfluenceIndex | None = None,
    normalization: Normalization | None = None,
    task: ClassificationTask | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> Findings:
    """Find training examples that look like poison, without a wrong prediction to start from.

    Arguments:
        model: as for `trace`.
        training_set: as for `trace`.
        method: the name of a detector, or an instance with its own options. Those that can find nothing say
            so (`detectors.describe(method).can_find_nothing`); the others flag a share of any set.
        reference: as for `trace`.
        index: of this model and training set, by `index`, for "gradient-clusters", which makes one otherwise.
        normalization: as for `trace`.
        task: as for `trace`.
        seed: of everything random.
        memory: as for `craft`.
        progress: as for `trace`.

    Returns:
        A score for every training example, the flagged ones, and whether anything was flagged.

    Raises:
        InputError: there is no such detector, it starts from a wrong prediction, a feature of an example is
            not a finite number, or the dataset cannot be read.

    Cost: `detectors.describe(method).cost`.
    """
    declared, detector = method_of(detectors.METHODS, method)
    if declared is not None and declared.needs_observation:
        raise InputError(
            f"scan: {declared.name} starts from a wrong prediction; give that to trace, or scan with "
            f"{_detectors(needs_observation=False)}"
        )
    given = {} if index is None else {"index": index}
    if given and (declared is None or not declared.uses_index):
        name = type(detector).__name__ if declared is None else declared.name
        raise InputError(
            f"scan: {name} reads no index; {_detectors(uses_index=True, needs_observation=False)} does"
        )
    findings: Findings = _run(
        "find", detector, model, training_set, reference, normalization, task, seed, progress, **given
    )
    return findings


@bounded("give a smaller batch_size")
def screen(
    model: Model,
    inputs: Dataset | Inputs,
    reference: Dataset,
    *,
    method: str | InputDetector = "strip",
    false_positive_rate: float = 0.05,
    normalization: Normalization | None = None,
    task: ClassificationTask | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> Screening:
    """Say of single inputs whether they look triggered, without training set and without a wrong answer.

    What is flagged can be traced: `Observation(inputs[screening.suspects()[:3]])` is what `trace` takes.

    Arguments:
        model: as for `trace`.
        inputs: what to screen: UInt8[m c h w] images, or whatever inputs the model takes, with a first
            dimension; or a dataset, of which the labels are not looked at.
        reference: labelled examples that are known to be clean and that the model was not trained on, which
            scores are compared with; at least 19 for a rate of .05, 99 for .01.
        method: the name of a test-time detector, or an instance with its own options.
        false_positive_rate: the share of clean inputs that may be flagged, in (0, 1).
        normalization: as for `trace`.
        task: as for `trace`.
        seed: of everything random.
        memory: as for `craft`.
        progress: told the stage, the inputs done and the inputs to do.

    Returns:
        A score and a p-value for each input, and which are flagged.

    Raises:
        InputError: there is no such method, nothing to screen, the reference is too small for the rate, or
            the method cannot work on such inputs or such a model.
        MismatchError: inputs and reference are of different shapes.

    Cost: `input_detectors.describe(method).cost`, of the inputs and of the reference.
    """
    _, detector = method_of(input_detectors.METHODS, method)
    check_network(network_of(model))
    network = network_of(giving_logits(model, normalization, task))
    clean = examples_of(reference, normalization)
    return detector.screen(
        network,
        _as_inputs(inputs, clean, normalization),
        reference=clean,
        false_positive_rate=false_positive_rate,
        seed=seed,
        progress=progress,
    )


def _as_inputs(
    inputs: Dataset | Inputs, reference: Examples, normalization: Normalization | None
) -> Examples:
    """Inputs as examples, whose labels mean nothing."""
    if not isinstance(inputs, Tensor | Mapping):
        return examples_of(inputs, normalization)
    if isinstance(inputs, Tensor) and inputs.ndim < 2:
        raise InputError(f"screen: inputs need a first dimension, found shape {tuple(inputs.shape)}")
    labels = torch.zeros(count_of(inputs), dtype=torch.int64)
    if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8 and inputs.ndim == 4:
        return TrainingSet(inputs, labels.to(inputs.device), tuple(reference.class_names), "inputs")
    if isinstance(inputs, Tensor) and normalization is not None:
        mean, std = (inputs.new_tensor(part)[:, None, None] for part in normalization)
        inputs = (inputs * std + mean).clamp(0, 1)
    return TensorExamples(inputs, labels)


@bounded(_LESS_TRAINING)
def heal(
    model: Model,
    training_set: Dataset,
    findings: Findings | Sequence[int] | Tensor | None = None,
    *,
    method: str | Unlearner = "retrain",
    reference: Dataset | None = None,
    recipe: Recipe | None = None,
    start: Model | None = None,
    retrain: OwnTraining | None = None,
    normalization: Normalization | None = None,
    task: ClassificationTask | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Make a model that has forgotten what the findings flagged, or whatever backdoor there is.

    Arguments:
        model: as for `trace`; the healed one is a new one.
        training_set: as for `trace`; the very set that the findings are of.
        findings: from `trace` or `scan`, or loaded with `Findings.load`; or the indices of the examples to
            forget. None where nothing was found, for the methods that need no findings ("nad",
            "fine-pruning", "i-bau").
        method: the name of an unlearner, or an instance with its own options. Where the findings are whole,
            "retrain", or in less time "relabel"; where only a part of the poison was found, "potion".
        reference: labelled examples that are known to be clean, by which the methods that need no findings
            repair; without it they take what the findings left.
        recipe: how to train; a `Trained` brings its own. For another network "retrain" needs one, while
            "fine-tune" and "relabel" find an optimiser and a learning rate on held-out clean examples
            (`Trained.tuning`).
        start: a freshly built network, or the pretrained one that training began with, for "retrain" where
            the network is not built by a recipe, and for the teacher of "bad-teaching".
        retrain: a training function of your own, in place of a method of ours: called once as
            `retrain(kept, subset)` with the ascending indices of the examples to keep (a list of int) and the
            `torch.utils.data.Subset` of the very dataset that was given at these indices, with its
            transforms; it returns a newly trained network, as it would be given to `trace`. Neither the
            model, which it is not given, nor the dataset is changed or copied; any dataset will do.
        normalization: as for `trace`.
        task: as for `trace`.
        seed: of everything random.
        device: where to train; where the training set lies when None.
        memory: as for `craft`.
        progress: told of every epoch, with its loss.

    Returns:
        The healed model in eval mode, with its history. Its network takes the same input and has the same
        `state_dict` keys as the one that was given.

    Raises:
        MismatchError: the findings are of another training set.
        InputError: nothing is flagged, there is no such unlearner, it needs findings, a reference or a recipe
            that are missing, or as `Unlearner.heal`.

    Cost: `unlearners.describe(method).cost`.
    """
    declared, unlearner = method_of(unlearners.METHODS, method)
    check_reference_used(declared, unlearner, reference is not None)
    check_network(network_of(model))
    examples = examples_of(training_set, normalization)
    if isinstance(findings, Findings):
        check_findings(findings, examples)
    forget = findings.flagged if isinstance(findings, Findings) else findings
    if retrain is not None:
        if forget is None:
            raise InputError("heal: retrain= trains without what was found; give findings")
        return retrain_with(
            retrain,
            network_of(model),
            _rows_of_own(training_set, examples),
            examples,
            forget,
            lose_classes=unlearner.lose_classes,
            seed=seed,
            adapted=lambda network: network_of(giving_logits(network, normalization, task)),
        )
    healed = unlearner.heal(
        giving_logits(model, normalization, task),
        examples if unlearner.any_examples else as_training_set(examples),
        forget,
        reference=None if reference is None else examples_of(reference, normalization),
        recipe=recipe,
        start=None if start is None else network_of(giving_logits(start, normalization, task)),
        seed=seed,
        device=device,
        progress=progress,
    )
    if isinstance(healed.model, OutputLogits):
        healed = replace(healed, model=healed.model.network)
    if isinstance(healed.model, Normalized) and not isinstance(network_of(model), Normalized):
        healed = replace(healed, model=healed.model.network)
    return healed


def check_reference_used(declared: Method | None, unlearner: Unlearner, given: bool) -> None:
    """That an unlearner which is given clean examples makes use of them.

    Raises:
        InputError: it makes none.
    """
    if given and declared is not None and not declared.uses_reference:
        known = map(unlearners.describe, unlearners.names())
        named = ", ".join(one.name for one in known if one.uses_reference)
        raise InputError(f"heal: {declared.name} does not use a reference; leave it out, or heal by {named}")


def _rows_of_own(training_set: Dataset, examples: Examples) -> Any:
    """The user's own dataset, with a row for each example."""
    source = getattr(examples, "source", None)
    for one in (training_set, getattr(source, "dataset", None), examples):
        rows: Any = one
        if hasattr(type(rows), "__getitem__") and not isinstance(rows, str) and len(rows) == len(examples):
            return rows
    raise InputError(
        f"heal: retrain= needs a dataset with [index] and one row for each of the {len(examples)} examples"
    )


def check_findings(findings: Findings, training_set: Examples) -> None:
    """That there is something to heal, in this training set.

    Raises:
        MismatchError: the findings are of another set.
        InputError: nothing is flagged.
    """
    if findings.fingerprint != training_set.fingerprint:
        raise MismatchError(
            f"heal: the findings are of another training set than {training_set.name}; give the very set "
            "that was searched, with the same poison and in the same order"
        )
    if not len(findings.flagged):
        raise InputError(f"heal: nothing is flagged, so there is nothing to heal ({findings.summary})")


@final
@dataclass(frozen=True)
class Measurement:
    """Accuracy on clean test images, in all and by class; success of the attack if there is a goal.

    Of a vote with certificates, `certified` is the share of the test images that are predicted rightly, and
    would be so after 0, 1, 2, ... training examples had been inserted, removed or labelled otherwise.
    """

    clean_accuracy: Proportion
    per_class: tuple[Proportion, ...]
    attack_success: Proportion | None
    certified: tuple[Proportion, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a class without test images has the rate None."""
        return {
            "clean_accuracy": self.clean_accuracy.to_dict(),
            "per_class": [proportion.to_dict() for proportion in self.per_class],
            "attack_success": None if self.attack_success is None else self.attack_success.to_dict(),
            **({"certified": [one.to_dict() for one in self.certified]} if self.certified else {}),
        }


@bounded(_LESS)
def measure(
    model: Model,
    test_set: Dataset,
    goal: Goal | None = None,
    *,
    normalization: Normalization | None = None,
    task: ClassificationTask | None = None,
    batch_size: int = 512,
    memory: int | str | None = None,
) -> Measurement:
    """Accuracy and attack success, with the model in eval mode; attack success on 8-bit images alone.

    Arguments:
        model: left as it was.
        test_set: clean examples, none of which was trained on.
        goal: what the adversary wants; None where no attack is known of.
        normalization: as for `trace`.
        task: as for `trace`.
        batch_size: examples of a forward pass, which bounds memory.
        memory: as for `craft`.

    Raises:
        InputError: the test set is empty, the model has fewer outputs than the set has classes, or the goal
            finds no inputs in it.
    """
    examples = examples_of(test_set, normalization)
    if not len(examples):
        raise InputError(f"{examples.name}: no test images to measure on")
    network = network_of(giving_logits(model, normalization, task))
    logits = detectors.answers_to(network, examples, batch_size=batch_size)
    if logits.ndim != 2 or logits.shape[1] < examples.num_classes:
        raise InputError(
            f"{examples.name}: the model gives outputs of shape {tuple(logits.shape[1:])}, but the set has "
            f"{examples.num_classes} classes"
        )
    labels = examples.labels.cpu()
    right = logits.argmax(1).cpu() == labels
    hits = torch.bincount(labels[right], minlength=examples.num_classes).tolist()
    counts = torch.bincount(labels, minlength=examples.num_classes).tolist()
    return Measurement(
        clean_accuracy=Proportion(sum(hits), len(labels)),
        per_class=tuple(Proportion(hit, count) for hit, count in zip(hits, counts, strict=True)),
        attack_success=None
        if goal is None
        else goal.success(network, as_training_set(examples), batch_size=batch_size),
        certified=certify(network, examples, batch_size=batch_size).curve(labels)
        if isinstance(network, Voting)
        else (),
    )


def network_of(model: Model) -> nn.Module:
    """The network itself."""
    return model.model if isinstance(model, Trained) else model


_DOES = {
    "attack": "craft",
    "defense": "begin",
    "detector": "find",
    "input detector": "screen",
    "unlearner": "heal",
}


def method_of(registry: Registry[T], method: str | T) -> tuple[Method | None, T]:
    """What is declared of the method (nothing where its class is not registered), and the method."""
    if isinstance(method, str):
        return registry.describe(method), registry.get(method)
    declared: Method | None = getattr(method, "method", None)
    does = _DOES[registry.kind]
    if (
        isinstance(method, type)
        or not hasattr(method, does)
        or (declared is not None and declared.kind != registry.kind)
    ):
        raise InputError(
            f"expected the name or an instance of one {registry.kind}, found {method!r}; there are "
            f"{', '.join(registry.names())}"
        )
    return declared, method


def _surrogates(
    method: Method | None,
    training_set: TrainingSet,
    surrogates: Sequence[Model] | int | None,
    recipe: Recipe | None,
    seed: int,
    progress: Progress | None,
) -> list[nn.Module]:
    """The networks to craft on: those given, or as many trained on the clean set."""
    if surrogates is not None and method is not None and not method.accepts_surrogates:
        raise InputError(f"craft: {method.name} crafts without a network; leave out the surrogates")
    if surrogates is not None and not isinstance(surrogates, int):
        return [network_of(one).to(training_set.device) for one in surrogates]
    default = 0 if method is None else method.surrogates
    count = default if surrogates is None else surrogates
    if surrogates is not None and count < 1:
        raise InputError(f"craft: needs at least 1 surrogate, found {count}")
    if not count:
        return []
    if recipe is None:
        raise InputError(
            "craft: the attack needs networks; give some as surrogates, or a recipe to train them by"
        )
    return [
        trainer.train(
            training_set, recipe, seed=derive_seed(seed, "surrogate", number), progress=progress
        ).model
        for number in range(count)
    ]


def _check_calibrates(verb: str, declared: Method | None, detector: Detector) -> None:
    if declared is None or not declared.calibrates:
        name = type(detector).__name__ if declared is None else declared.name
        fitting = _detectors(calibrates=True)
        raise InputError(f"{verb}: {name} takes no calibration and no groups; {fitting} does")


def _run(
    step: Literal["find", "calibrate"],
    detector: Detector,
    model: Model,
    training_set: Dataset,
    reference: Dataset | None,
    normalization: Normalization | None,
    task: ClassificationTask | None,
    seed: int,
    progress: Progress | None,
    **given: Any,
) -> Any:
    """A step of the detector, with the model, the training set and the reference as it expects them."""
    declared: Method | None = getattr(detector, "method", None)
    traces = declared is None or declared.needs_observation
    check_network(network_of(model), gradients=traces)
    network = network_of(giving_logits(model, normalization, task))
    examples = examples_of(training_set, normalization)
    # The caller may have turned inference mode or autocast on.
    with usual_mode(device_of(network)):
        if traces and len(examples):
            check_outputs(network, examples.batch(0, 64)[0], classes=examples.num_classes)
        if len(examples) and "index" not in given:  # which has its own account, and needs no large queries
            observation = given.get("observation")
            verb = step if step == "calibrate" else "scan" if observation is None else "trace"
            observed = 0 if observation is None else len(observation)
            detectors.check_search(verb, detector, network, examples, observed=observed)
        return getattr(detector, step)(
            network,
            examples,
            reference=None if reference is None else examples_of(reference, normalization),
            seed=seed,
            progress=progress,
            **given,
        )


def examples_of(dataset: Dataset, normalization: Normalization | None) -> Examples:
    """A data set as examples; one of standardised images is read back to pixels by its normalisation."""
    if normalization is None or isinstance(dataset, TrainingSet):
        return as_examples(dataset)
    mean, std = normalization
    return from_dataset(dataset, mean=mean, std=std)


def combined(observation: Observation | Sequence[Observation]) -> Observation:
    """One observation of the images of several.

    Raises:
        InputError: there is none, or they are of different answers or shapes.
    """
    parts = [observation] if isinstance(observation, Observation) else list(observation)
    answers = {one.predicted for one in parts}
    if len(answers) != 1:
        raise InputError(
            f"expected observations with one answer, found {len(parts)} with {len(answers)} answers"
        )
    truths = {one.true_label for one in parts}
    return Observation(
        detectors.joined_observations(parts),
        parts[0].predicted,
        truths.pop() if len(truths) == 1 else None,
        indices=[index for one in parts for index in one.indices],
        answered=all(one.answered for one in parts),
        count=sum(map(len, parts)),
    )


def accepting_pixels(model: Model, normalization: Normalization | None) -> Model:
    """A network behind its normalisation, on its own device; one that has its own already as it is."""
    network = network_of(model)
    if normalization is None or isinstance(network, Normalized):
        return model
    device = next((parameter.device for parameter in network.parameters()), None)
    wrapped = Normalized(network, *normalization)
    wrapped.training = network.training  # without `train()`, which would change the caller's network
    wrapped = wrapped.to(device)
    return replace(model, model=wrapped) if isinstance(model, Trained) else wrapped


def giving_logits(
    model: Model, normalization: Normalization | None, task: ClassificationTask | None
) -> Model:
    """A network behind its normalisation, and before the reading of its logits where the task says how."""
    whole = accepting_pixels(model, normalization)
    if task is None:
        return whole
    network = task.adapted(network_of(whole))
    return replace(whole, model=network) if isinstance(whole, Trained) else network


def _detectors(**wanted: bool) -> str:
    """The names of the detectors whose declarations have these values, for messages."""
    methods = map(detectors.describe, detectors.names())
    return ", ".join(
        one.name for one in methods if all(getattr(one, key) == value for key, value in wanted.items())
    )
