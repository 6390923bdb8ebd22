"""`repair`: trace, heal, ask again and trace the healed model, until the wrong answer has no cause left.

One trace may miss a part of the poison, and what is left may carry the attack after healing. So the healed
model is asked about the observation and copies of it, and is traced in its turn: the same input,
the same wrong label, whether it is still the answer or not. What is found is added to the examples to forget,
all of which are forgotten by the model that was given, so that the result is that of one `heal`. It ends when
a trace finds nothing, when no rounds are left, or when a trace of a healed model flags more than was removed
until then, which is no rest of the poison.

A trigger goes with a wrong label, which a model that never saw the poison does not give. So where a trace
finds one, and healing trains anew, the examples with the same label that rank next, as many as were flagged,
are withheld from the first healing. Those to which the healed model gives another label are removed as well,
if the margin of their label falls at least half as far from the traced model to the healed one as the median
of the flagged: ordinary examples that are hard fall less. The others are put back, and the model is healed
once more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from unpoison import unlearners, workflow
from unpoison._progress import Progress
from unpoison._seeds import generator
from unpoison._stable import margins
from unpoison._statistics import Proportion
from unpoison.data import DatasetExamples, Examples, TrainingSet, as_training_set
from unpoison.detectors import (
    Calibration,
    Detector,
    Findings,
    Observation,
    answers_of,
    check_observation,
    similar_copies,
)
from unpoison.errors import InputError, MismatchError
from unpoison.tasks import ClassificationTask
from unpoison.training import Recipe, Trained, predict
from unpoison.unlearners import OwnTraining, Unlearner
from unpoison.workflow import Dataset, Groups, Model, Normalization

Outcome = Literal["nothing found", "repaired", "answer remains", "poison remains"]
# So many copies, and more than half of those that got the wrong label at first, show that it is not gone.
_FEWEST_COPIES = 3
_BATCH = 256


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Round:
    """One model of a repair, the given one or a healed one.

    Arguments:
        findings: from tracing it, of the examples that it learned from.
        examples: Int64[n], these examples by their indices in the whole training set.
        answers: its labels for the observed inputs.
        wrong: Bool[c], to which of the mirrored and jittered copies of them it gives the wrong label; empty
            for inputs that are no images.
        unforgotten: Int64[r], the examples removed until then, with the wrong label, to which it still gives
            that label, highest score first; by their indices in the whole training set.
        withheld: Int64[w], the examples that rank next to the flagged ones and were withheld from the first
            healing, highest score first; by their indices in the whole training set.
        mislabelled: Int64[m], those of them that were removed as well: the model that was healed without them
            gave them another label, and their margins fell half as far as those of the flagged ones.
    """

    findings: Findings
    examples: Tensor
    answers: tuple[int, ...]
    wrong: Tensor
    unforgotten: Tensor
    withheld: Tensor
    mislabelled: Tensor

    @property
    def copies(self) -> Proportion:
        """How many of the copies get the wrong label."""
        return Proportion(int(self.wrong.sum()), len(self.wrong))

    @property
    def flagged(self) -> Tensor:
        """Int64[k]: the flagged examples by their indices in the whole training set, highest score first."""
        return self.examples[self.findings.flagged]

    @property
    def suspected(self) -> Tensor:
        """Int64[k]: the flagged examples, and the mislabelled ones beside them."""
        return torch.cat([self.flagged, self.mislabelled])


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Repair:
    """What `repair` returns.

    Arguments:
        model: the healed model; the one that was given where nothing was found.
        observation: what was traced, with the wrong label.
        removed: Int64[k], the examples to forget, by round.
        rounds: the models one after another: the given one first, the last one at the end.
        outcome: `repaired` when a trace of the healed model finds nothing and the wrong answer is gone;
            `answer remains` when it is not gone although nothing is found; `poison remains` when the last
            trace still finds some.
        summary: the outcome in one sentence, with what to do next.
    """

    model: Model
    observation: Observation
    removed: Tensor
    rounds: tuple[Round, ...]
    outcome: Outcome
    summary: str


@workflow.bounded("give a smaller batch_size, fewer modules= or a subset of the training set")
def repair(
    model: Model,
    training_set: Dataset,
    observation: Observation | Sequence[Observation],
    *,
    method: str | Detector = "calibrated",
    unlearner: str | Unlearner = "retrain",
    rounds: int = 3,
    withheld: float = 1.0,
    recipe: Recipe | None = None,
    start: Model | None = None,
    retrain: OwnTraining | None = None,
    reference: Dataset | None = None,
    calibration: Calibration | None = None,
    findings: Findings | None = None,
    groups: Groups | None = None,
    normalization: Normalization | None = None,
    task: ClassificationTask | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> Repair:
    """Find the poison behind a wrong answer and make a model without it, in as many rounds as it takes.

    Arguments:
        model: as for `trace`.
        training_set: as for `trace`.
        observation: as for `trace`.
        method: as for `trace`.
        unlearner: as the method of `heal`. "retrain" is the one that is certain to forget; "relabel" takes a
            fifth of the time and does not suit poison whose labels are right.
        rounds: how often to trace and heal, at most.
        withheld: how many examples that rank next are withheld from the first healing of a round, as a
            multiple of those flagged, in [0, inf); at most half of the label's others. 0 saves that healing.
        recipe: as for `heal`.
        start: as for `heal`.
        retrain: as for `heal`, called once a round, or twice where examples are withheld.
        reference: as for `trace`.
        calibration: of the given model, as for `trace`; healed models are calibrated anew.
        findings: of a trace of the given model from this observation, which is then not traced again.
        groups: as for `trace`.
        normalization: as for `trace`.
        task: as for `trace`.
        seed: of everything random; every step gets it.
        device: as for `heal`.
        memory: as for `craft`.
        progress: told the round with every stage.

    Raises:
        InputError: `rounds` or `withheld` is out of range, or as `trace` and `heal`; what healing needs is
            asked for before anything is traced.
        MismatchError: the findings are of another training set or another answer.

    Cost: a `trace` of every model, and a `heal` a round, or two where examples are withheld.
    """
    unlearner = unlearner_for(
        model, unlearner, rounds=rounds, withheld=withheld, recipe=recipe, start=start, retrain=retrain
    )
    examples = workflow.examples_of(training_set, normalization)
    if retrain is None and not unlearner.any_examples:
        as_training_set(examples)
    held_out = None if reference is None else workflow.examples_of(reference, normalization)
    network = workflow.network_of(workflow.giving_logits(model, normalization, task))
    asked = check_observation(network, examples, workflow.combined(observation))
    if findings is not None:
        _check_first(findings, examples, asked)
    copies = _copies(asked, examples, generator(seed, "copies"))
    share = withheld if retrain is not None or _trains_anew(unlearner) else 0.0

    def healed(told: Progress | None, *more: Tensor) -> Model:
        """Without all that is suspected until now, and without these examples."""
        return workflow.heal(
            model,
            examples if retrain is None else training_set,
            torch.cat([*(one.suspected for one in past), *more]),
            method=unlearner,
            recipe=recipe,
            start=start,
            retrain=retrain,
            normalization=normalization,
            task=task,
            seed=seed,
            device=device,
            progress=told,
        )

    def network_of(one: Model) -> nn.Module:
        return workflow.network_of(workflow.giving_logits(one, normalization, task))

    current, past = model, list[Round]()
    kept = torch.arange(len(examples))
    names = groups.tolist() if isinstance(groups, Tensor) else groups
    first: dict[str, Any] = {} if calibration is None else {"calibration": calibration}
    while True:
        told = _numbered(progress, len(past))
        if names is not None:
            first["groups"] = [names[row] for row in kept.tolist()]
        found = (
            findings
            if findings is not None
            else workflow.trace(
                current,
                examples.subset(kept) if past else examples,
                replace(asked, answered=False) if past else asked,
                method=method,
                reference=held_out,
                normalization=normalization,
                task=task,
                seed=seed,
                progress=told,
                **first,
            )
        )
        network = network_of(current)
        answers = answers_of(network, asked.inputs).argmax(1).tolist()
        wrong = torch.zeros(0, dtype=torch.bool)
        if copies is not None:
            wrong = (predict(network, copies).argmax(1) == asked.answer).cpu()
        removed = torch.cat([kept[:0], *(one.suspected for one in past)])
        own = removed[examples.labels.cpu()[removed] == asked.answer]
        past.append(
            Round(
                findings=found,
                examples=kept,
                answers=tuple(answers),
                wrong=wrong,
                unforgotten=own[_logits(network, examples, own).argmax(1) == asked.answer],
                withheld=kept[:0],
                mislabelled=kept[:0],
            )
        )
        if not found.poison_found or len(past) > rounds or _implausible(past):
            break
        beside = kept[_next_ranked(found, asked.answer, share)]
        current = healed(told, beside)
        if len(beside):
            last = replace(past[-1], withheld=beside)
            wrongly = _mislabelled(network, network_of(current), examples, last, asked.answer)
            past[-1] = replace(last, mislabelled=beside[wrongly])
            if not bool(wrongly.all()):
                current = healed(told)
        kept, first, findings = kept[~torch.isin(kept, past[-1].suspected)], {}, None
    return _ended(current, asked, past, examples)


def unlearner_for(
    model: Model,
    unlearner: str | Unlearner,
    *,
    rounds: int,
    withheld: float,
    recipe: Recipe | None,
    start: Model | None,
    retrain: OwnTraining | None = None,
) -> Unlearner:
    """The unlearner of a repair, which is known to have what it needs before anything is traced.

    Raises:
        InputError: `rounds` or `withheld` is out of range, there is no such unlearner, or a recipe or `start`
            is missing.
    """
    if rounds < 1:
        raise InputError(f"repair: rounds must be at least 1, found {rounds}")
    if not 0 <= withheld < math.inf:
        raise InputError(f"repair: withheld must be a finite number of at least 0, found {withheld}")
    chosen = workflow.method_of(unlearners.METHODS, unlearner)[1]
    if retrain is not None:
        return chosen
    ours = isinstance(model, Trained)
    if chosen.needs_recipe and recipe is None and not (ours and model.recipe is not None):
        raise InputError("repair: how this network was trained is not known; give a recipe to heal it by")
    if _trains_anew(chosen) and start is None and not (ours and not model.own_model):
        raise InputError(
            "repair: this network is not built by a recipe; give start=, the network before training "
            "(freshly built, or the pretrained one), retrain=, a training function of your own, or another "
            "unlearner, such as relabel, which goes on from its weights"
        )
    return chosen


def _trains_anew(unlearner: Unlearner) -> bool:
    """Whether the healed model knows nothing of what is forgotten."""
    return unlearner.needs_recipe and unlearner.uses_start


def _check_first(findings: Findings, examples: Examples, asked: Observation) -> None:
    """Raise a `MismatchError` unless the findings are of this training set and this answer."""
    if findings.fingerprint != examples.fingerprint:
        raise MismatchError(
            f"repair: the findings are of another training set than {examples.name}; give the very set that "
            "was searched"
        )
    if findings.observation is None or findings.observation.answer != asked.answer:
        raise MismatchError("repair: the findings are not of a trace of this answer; trace it first")


def _copies(observation: Observation, examples: Examples, randomness: torch.Generator) -> Tensor | None:
    """Mirrored and jittered copies of observed images, as the model takes them; None of other inputs."""
    if isinstance(examples, TrainingSet):
        return similar_copies(observation.images, randomness)
    inputs = observation.inputs
    if not (isinstance(examples, DatasetExamples) and examples.of_images and isinstance(inputs, Tensor)):
        return None
    low, high = examples.value_range
    pixels = ((inputs - low) / (high - low)).clamp(0, 1)
    return similar_copies((pixels * 255).round().to(torch.uint8), randomness) / 255 * (high - low) + low


def _next_ranked(findings: Findings, answer: int, share: float) -> Tensor:
    """Int64[w]: the examples that rank next to the flagged ones, where these have a trigger."""
    if not share or findings.cause is None or findings.cause.kind != "trigger-like":
        return findings.flagged[:0]
    scores = findings.scores.clone()
    scores[findings.labels != answer] = -torch.inf
    scores[findings.flagged] = -torch.inf
    count = int(min(share * len(findings.flagged), int(scores.isfinite().sum()) // 2))
    return scores.argsort(descending=True, stable=True)[:count]


def _mislabelled(
    traced: nn.Module, healed: nn.Module, examples: Examples, last: Round, answer: int
) -> Tensor:
    """Bool[w]: which of the withheld examples go with the flagged ones, by how far their margins fall.

    A half was chosen on four development networks (benchmarks/ledger.toml says from what).
    """

    def fall(rows: Tensor) -> tuple[Tensor, Tensor]:
        before, after = (_logits(network, examples, rows) for network in (traced, healed))
        return margins(after)[:, answer] - margins(before)[:, answer], after.argmax(1) != answer

    falls, others = fall(last.withheld)
    return others & (falls >= fall(last.flagged)[0].median() / 2)


def _logits(network: nn.Module, examples: Examples, rows: Tensor) -> Tensor:
    """Float64[k classes], of examples."""
    if not len(rows):
        return torch.zeros(0, examples.num_classes).double()
    parts = (answers_of(network, examples.at(some)[0]) for some in torch.split(rows, _BATCH))
    return torch.cat([part.double().cpu() for part in parts])


def _implausible(rounds: Sequence[Round]) -> bool:
    """Whether a trace of a healed model flags more than was removed until then.

    What a trace misses is a part of the poison; a healed model without poison that is taken to have some may
    lose most of a class.
    """
    return len(rounds) > 1 and len(rounds[-1].flagged) > sum(len(one.suspected) for one in rounds[:-1])


def _numbered(progress: Progress | None, number: int) -> Progress | None:
    """The progress of a round, which is named with every stage."""
    if progress is None:
        return None

    def told(stage: str, done: int, total: int, /, **metrics: float) -> None:
        progress(f"round {number + 1}, {stage}", done, total, **metrics)

    return told


def _ended(model: Model, observation: Observation, rounds: Sequence[Round], examples: Examples) -> Repair:
    """The repair after its last round."""
    last, name = rounds[-1], examples.class_names[observation.answer]
    done = rounds[:-1]
    removed = torch.cat([last.flagged[:0], *(one.suspected for one in done)])
    so_far = f"{len(removed)} of {len(examples)} training examples"
    outcome: Outcome
    if not done and not last.findings.poison_found:
        outcome, summary = "nothing found", f"Nothing was changed. {last.findings.summary}"
    elif last.findings.poison_found:
        outcome = "poison remains"
        advice = "these are more than were removed, so look at them first" if _implausible(rounds) else ""
        summary = (
            f"Not repaired in {_counted(len(done))}: at least {so_far} are poison, and a last trace finds "
            f"{len(last.flagged)} more; {advice or 'give it more rounds'}"
        )
    elif gone(observation.answer, rounds[0], last):
        outcome = "repaired"
        summary = (
            f"Repaired in {_counted(len(done))}: {so_far} removed, the answer {name!r} is gone, and a last "
            f"trace finds nothing{_warned(last)}"
        )
    else:
        outcome = "answer remains"
        summary = (
            f"Not repaired in {_counted(len(done))}: {so_far} removed, and a last trace finds nothing more, "
            f"but the answer {name!r} remains; retrain if another unlearner was used, or trace further inputs"
        )
    return Repair(
        model=model,
        observation=observation,
        removed=removed,
        rounds=tuple(rounds),
        outcome=outcome,
        summary=summary,
    )


def _warned(last: Round) -> str:
    """What the answers to the removed examples say."""
    count = len(last.unforgotten)
    if not count:
        return ""
    return (
        f"; but the healed model still gives {count} of the removed examples their label: look at them, as "
        "poison may be left where that label is wrong"
    )


def gone(answer: int, before: Round, after: Round) -> bool:
    """Whether a healed model no longer gives the answer.

    Not where it gives it to an observed image, or to more than half of the copies to which the
    model before gave it, if these are three at least.
    """
    still = int((before.wrong & after.wrong).sum())
    return answer not in after.answers and (still < _FEWEST_COPIES or 2 * still <= int(before.wrong.sum()))


def _counted(rounds: int) -> str:
    return f"{rounds} round" + ("" if rounds == 1 else "s")
