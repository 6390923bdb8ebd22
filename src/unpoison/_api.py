"""The three lines of the engineer: `trace` a wrong prediction (or `scan` the training set), `heal` the model.

All are thin: they turn what the caller has (any network, any map-style dataset) into what the rooms work on,
choose a method by name, and refuse with one clear line what does not belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from unpoison import detectors, unlearners
from unpoison.data import MapStyle, TrainingSet, as_training_set, from_dataset
from unpoison.detectors import Findings, Observation
from unpoison.errors import InputError, MismatchError
from unpoison.models import Normalized
from unpoison.training import Recipe, Trained

Normalization = tuple[Sequence[float], Sequence[float]]


def trace(
    model: Trained | nn.Module,
    training_set: TrainingSet | MapStyle,
    observation: Observation,
    *,
    method: str = "delta-influence",
    preset: str | None = None,
    reference: TrainingSet | MapStyle | None = None,
    normalization: Normalization | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Findings:
    """Find the training examples that a wrong prediction goes back to.

    Arguments:
        model: what was trained; it takes Float[b c h w] images in [0, 1], unless `normalization` says
            otherwise, and returns Float[b classes] logits. It is left as it was.
        training_set: what it was trained on, in the order whose indices are wanted: a `TrainingSet`, or any
            dataset with `len()` and `[index]` that gives pairs of image and label, without random transforms.
        observation: the input that the model answers wrongly, and the label it gives.
        method: "delta-influence" (arXiv 2411.13731), or "ek-fac" and "trak", the baselines that threshold
            influence.
        preset: the method's settings: "calibrated" (when None), "published", "published-smooth" or
            "published-matching" for Delta-Influence; "published" for EK-FAC; "original" for TRAK.
        reference: labelled images that are known to be clean and were not trained on, for "calibrated" to
            compare with; the training set stands in for it.
        normalization: mean and standard deviation of each channel that the network expects its input to be
            standardised with (a `Trained` has its own). A dataset that gives float images is then taken to be
            standardised so as well, and is read back to 8 bits; `data.from_dataset` reads one that is not.
        seed: of everything random.
        progress: called with the stage, the examples done and the examples to do.

    Returns:
        A score for every training example, the flagged ones, and whether poison was found at all. When the
        wrong prediction looks like an ordinary mistake, `poison_found` is False and nothing is flagged.

    Raises:
        InputError: there is no such method or preset; the observation does not fit the model or the set; the
            model gives another answer than the observation says; or the dataset cannot be read.

    Cost: three passes over the training set, whatever the number of transforms and innocent inputs; with
    "calibrated" one more where poison is found.
    """
    examples = _examples(training_set, normalization)
    trusted = None if reference is None else _examples(reference, normalization)
    found = detectors.get(method, preset=preset, seed=seed)
    subject = _accepting_pixels(model, normalization)
    network = subject.model if isinstance(subject, Trained) else subject
    return found.find(network, examples, observation, reference=trusted, progress=progress)


def scan(
    model: Trained | nn.Module,
    training_set: TrainingSet | MapStyle,
    *,
    method: str = "statistical-contamination",
    preset: str | None = None,
    reference: TrainingSet | MapStyle | None = None,
    normalization: Normalization | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Findings:
    """Find training examples that look like poison, when nobody has noticed a wrong prediction yet.

    Arguments:
        model: as for `trace`.
        training_set: as for `trace`.
        method: "statistical-contamination" or "activation-clustering", which can find nothing;
            "spectral-signatures", "spectre", "deep-knn" or "frequency", which flag a share of any set.
        preset: the method's settings; its original ones when None. `detectors.describe(method).presets` has
            the names.
        reference: images that are known to be clean and are like the training set's, for "frequency" and
            "statistical-contamination" to learn from; the training set stands in for it.
        normalization: as for `trace`.
        seed: of everything random, which only "frequency" has.
        progress: called with the stage, the examples done and the examples to do.

    Returns:
        A score for every training example, the flagged ones, and whether anything was flagged.

    Raises:
        InputError: there is no such method or preset, the method starts from a wrong prediction, a feature of
            an example is not a finite number, or the dataset cannot be read.

    Cost: one or two forward passes over the training set; `detectors.describe(method).cost` says more.
    """
    card = detectors.describe(method)
    if card.needs_observation:
        others = [name for name in detectors.names() if not detectors.describe(name).needs_observation]
        raise InputError(
            f"scan: {method} starts from a wrong prediction, so give that to trace; "
            f"scan takes {', '.join(others)}"
        )
    examples = _examples(training_set, normalization)
    trusted = None if reference is None else _examples(reference, normalization)
    subject = _accepting_pixels(model, normalization)
    network = subject.model if isinstance(subject, Trained) else subject
    detector = detectors.get(method, preset=preset, seed=seed)
    return detector.find(network, examples, reference=trusted, progress=progress)


def heal(
    model: Trained | nn.Module,
    training_set: TrainingSet | MapStyle,
    findings: Findings,
    *,
    method: str = "retrain",
    recipe: Recipe | None = None,
    normalization: Normalization | None = None,
    seed: int = 0,
) -> Trained:
    """Make a model that has forgotten what the findings flagged.

    Arguments:
        model: as for `trace`; it is left as it was, the healed one is a new one.
        training_set: as for `trace`; the very set that the findings are of.
        findings: from `trace` or `scan`, or loaded with `Findings.load`.
        method: "retrain" from scratch without the flagged examples, "fine-tune" the model without them,
            "recant", or another of `unlearners.names()`.
        recipe: how to train; how the model was trained where it is a `Trained`, else the preset `sample`.
        normalization: as for `trace`; the healed model has it as its first layer and takes images in [0, 1].
        seed: of everything random.

    Returns:
        The healed model, in eval mode, with its training history.

    Raises:
        MismatchError: the findings are of another training set.
        InputError: nothing is flagged; there is no such method; or as `Unlearner.heal`.

    Cost: of one training for "retrain", of half a training for "fine-tune".
    """
    unlearner = unlearners.get(method)
    examples = _examples(training_set, normalization)
    if findings.fingerprint != examples.fingerprint:
        raise MismatchError(
            f"heal: the findings are of another training set than {examples.name}; "
            "give the very set that was traced, in the same order"
        )
    if not len(findings.flagged):
        raise InputError(f"heal: nothing is flagged, so there is nothing to heal ({findings.summary})")
    subject = _accepting_pixels(model, normalization)
    return unlearner.heal(subject, examples, findings.flagged, recipe=recipe, seed=seed)


def _examples(examples: TrainingSet | MapStyle, normalization: Normalization | None) -> TrainingSet:
    if normalization is None or isinstance(examples, TrainingSet):
        return as_training_set(examples)
    mean, std = normalization
    return from_dataset(examples, mean=mean, std=std)


def _accepting_pixels(model: Trained | nn.Module, normalization: Normalization | None) -> Trained | nn.Module:
    """A network behind its normalisation, on its own device; anything else as it is."""
    if normalization is None or isinstance(model, Trained):
        return model
    device = next((parameter.device for parameter in model.parameters()), None)
    wrapped = Normalized(model, *normalization)
    wrapped.training = model.training  # without `train()`, which would reach into the caller's network
    return wrapped.to(device)
