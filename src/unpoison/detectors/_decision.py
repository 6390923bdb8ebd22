"""How `calibrated` decides on one answer, with a calibration given: its stages 1 and 3 to 5.

The constants were chosen on 13 development networks; docs/delta_influence.md says what the results become
where each is halved and doubled, and benchmarks/ledger.toml how many others were tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from unpoison._seeds import generator
from unpoison._stable import margins
from unpoison.data import Examples, TrainingSet
from unpoison.detectors._answers import answers_of, answers_to
from unpoison.detectors._calibration import (
    Calibration,
    Rank,
    in_label,
    shuffled,
)
from unpoison.detectors._cause import Kind, cause_of
from unpoison.detectors._collapse import LabelCollapse, joined, normalised, queries_of
from unpoison.detectors._conformal import FEWEST_SEEDS, RESPONSIBLE, SEED, errors_needed, robust_units
from unpoison.detectors._conformal import p_value as conformal_p_value
from unpoison.detectors._findings import Findings, Threshold
from unpoison.detectors._search import Search
from unpoison.detectors._seed_expansion import SplitScores, expand_seeds
from unpoison.detectors._shared_pattern import Patterns, shared_pattern
from unpoison.detectors.artifact_mixture import artifact_features, artifact_mixture
from unpoison.tasks import ClassificationTask

_NO_MEMBERS: Final = 0.25
"""The share of the examples with artifacts that must not be members, for the artifact mixture to decide."""


def decide(search: Search, calibration: Calibration, level: float) -> Findings:
    """The findings on the answer that is traced, at a false-alarm level."""
    rows = (search.training_set.labels.cpu() == search.answer).nonzero()[:, 0]
    if not len(rows):
        null = calibration.source
        return _findings(search, null, rows, torch.zeros(3, 0), level, Rank(1.0))
    examples, inputs = search.training_set.subset(rows), search.observation.inputs
    collapse, before = _collapses(search, rows)
    excess = calibration.excess(collapse, rows)
    own = search.observation.answered or bool(
        (answers_of(search.model, inputs).argmax(1) == search.answer).all()
    )
    search.lap("scores")
    value = float(calibration.statistic(search.training_set, excess, rows))
    search.lap("near-duplicates")
    patterns = Patterns(search, calibration.near)
    rank, null = _ranked(search, calibration, value, excess, rows, level, patterns if own else None)
    found = rank.p_value <= level + 1e-9
    if search.index is not None and search.refine and found:
        some = excess.topk(min(search.refine, len(rows))).indices
        collapse[some], before[some] = _collapses(search, rows[some], exact=True)
        excess, search.refined = calibration.excess(collapse, rows), len(some)
    search.lap("scores")
    columns = torch.stack([excess, before, before - collapse])
    findings = _findings(search, null, rows, columns, level, rank)
    ranking = excess.argsort(descending=True, stable=True)
    seeds = ranking[: max(FEWEST_SEEDS, int((excess > SEED).sum()))]
    expanded, kind, apart = _expanded(
        search, calibration, findings, examples, rows, seeds, excess, patterns if found else None
    )
    if found and not (own or apart):
        said = f"No poison found: no group of its own is behind the label {search.answer_name!r}"
        findings, found = replace(findings, summary=said), False
    if found:
        findings = expanded
        members = torch.searchsorted(rows, findings.flagged)
    else:
        findings = replace(findings, scores=expanded.scores, evidence=expanded.evidence)
        members = ranking[: int((excess > RESPONSIBLE).sum())][:64]
    logits, misfits = _fits(search, examples, rows, members)
    alike = calibration.near.alike_among(search.training_set, rows[members])
    cause = cause_of(members, alike, logits, misfits, search.answer, found=kind if found else None)
    search.lap("cause")
    told = [findings.summary, cause.describe(findings.class_names)]
    if search.observation.true_label is None:
        told.append("The true label is not given: the level holds for wrong answers alone")
    return replace(
        findings,
        configuration={**findings.configuration, **search.index_settings},
        cause=cause,
        summary=". ".join(told) + search.remarks(),
    )


def _ranked(
    search: Search,
    calibration: Calibration,
    value: float,
    excess: Tensor,
    rows: Tensor,
    level: float,
    patterns: Patterns | None,
) -> tuple[Rank, str]:
    """Stage 3: the rank of a statistic, and among what it was ranked.

    `patterns`: where the label is the model's answer, which is ranked among the calibration errors.
    """
    if patterns is not None:
        inputs = search.observation.inputs
        rank = calibration.p_value(value, excess, rows, search.answer, inputs, patterns=patterns, level=level)
        search.lap("shared pattern")
        return rank, calibration.source
    needed = errors_needed(level)
    others = _asked_alike(search, calibration, rows, 2 * needed)
    null = f"{len(others)} inputs with other answers, asked about the same label"
    if search.reference is None:
        null += ", of the training set, which the level hardly fits"
    if len(others) < needed:
        null += f" (the level takes {needed}, so nothing can be found)"
    return Rank(conformal_p_value(others >= value)), null


def _collapses(search: Search, rows: Tensor, *, exact: bool = False) -> Tensor:
    """Float64[2 k]: the normalised collapses and influences on the answer, of the examples `rows`."""
    inputs, label = search.observation.inputs, search.answer
    first, second = (
        queries_of(search, inputs, label, task, mean=True, exact=exact)
        for task in (LabelCollapse(), ClassificationTask())
    )
    return normalised(search, joined(first, second), rows, search.progress)


def _fits(search: Search, examples: Examples, rows: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Float[m classes]: the logits of the members, places among the `rows`; Float64[k]: minus their margins.

    An index knows the margins.
    """
    if search.index is not None and len(members):
        return answers_to(search.model, examples.subset(members)), search.index.values(rows)
    logits = answers_to(search.model, examples)
    return logits[members], margins(logits.double())[:, search.answer]


def _asked_alike(search: Search, calibration: Calibration, rows: Tensor, most: int) -> Tensor:
    """Float64[m]: the statistics of labelled inputs that neither have the traced label nor get it.

    At most `most` of them. An error is asked about its own answer; a label that an input is not given is
    mostly far less likely, so the two cannot be compared.
    """
    source = search.clean
    answers, own = answers_to(search.model, source).argmax(1), source.labels.cpu()
    places = ((answers != search.answer) & (own != search.answer)).nonzero()[:, 0]
    places = shuffled(places, generator(search.seed, "inputs with other answers"))
    inputs = source.at(places[:most])[0]
    excess = calibration.excess(in_label(search, inputs, search.answer, rows), rows)
    return calibration.statistic(search.training_set, excess, rows)


def _findings(
    search: Search,
    null: str,
    rows: Tensor,
    columns: Tensor,
    level: float,
    rank: Rank,
) -> Findings:
    """The findings before expansion, in which nothing is flagged.

    `columns` are Float64[3 k]: the excess, the influence before and after, of the k examples `rows`.
    """
    of = "a pattern that the input and what stands out for it share, and of " if rank.carried else ""
    how = f"rank of {of}the statistic among {null}"
    names = ("excess", "influence_before", "influence_after")
    evidence = {
        name: _spread_out(column, rows, len(search.training_set), 0.0)
        for name, column in zip(names, columns, strict=True)
    }
    findings = search.findings(
        scores=_spread_out(columns[0], rows, len(search.training_set)),
        threshold=math.inf,
        how=how,
        words="",
        evidence=evidence,
    )
    return replace(
        findings,
        threshold=Threshold(math.inf, how, level),
        p_value=rank.p_value,
        summary=f"No poison found: the answer {search.answer_name!r} does not differ from an ordinary error",
    )


def _expanded(
    search: Search,
    calibration: Calibration,
    findings: Findings,
    examples: Examples,
    rows: Tensor,
    seeds: Tensor,
    excess: Tensor,
    patterns: Patterns | None,
) -> tuple[Findings, Kind, bool]:
    """Stage 4: all examples that resemble the seeds, and whether these are a group of their own.

    `seeds` are places among the `rows`. With `patterns`, where poison was found, their gradients are exact,
    and a pattern that their inputs share is looked for.
    """
    expansion = expand_seeds(search, seeds, examples, rows, exact=patterns is not None)
    search.lap("seed expansion")
    total = len(search.training_set)
    evidence = {
        **findings.evidence,
        "seed_similarity": _spread_out(expansion.scores, rows, total, 0.0),
    }
    log_odds = pattern = None
    if not expansion.separated:
        log_odds = _artifacts(search, calibration, examples, seeds, excess)
    if log_odds is not None:
        evidence["artifact_log_odds"] = _spread_out(log_odds, rows, total, 0.0)
    selection = select(expansion, log_odds, excess, seeds)
    if patterns is not None and selection.kind == "trigger-like":
        known = patterns.label(search.answer, rows, expansion.scores)
        pattern = shared_pattern(known, expansion, seeds)
        search.lap("shared pattern")
    if pattern is not None:
        evidence["pattern_log_odds"] = _spread_out(pattern.scores, rows, total, 0.0)
        selection = select_pattern(pattern)
    flagged = selection.flagged.nonzero()[:, 0]
    flagged = rows[flagged[selection.scores[flagged].argsort(descending=True, stable=True)]]
    centre, unit = robust_units(selection.scores)
    how = f"{findings.threshold.how}; then all of the same label with {selection.rule}"
    updated = replace(
        findings,
        scores=_spread_out((selection.scores - centre) / unit, rows, total),
        flagged=flagged,
        threshold=replace(findings.threshold, value=float((selection.threshold - centre) / unit), how=how),
        poison_found=True,
        summary=f"Poison found: {len(flagged)} of {total} training examples make the model answer "
        f"{search.answer_name!r}",
        evidence=evidence,
    )
    return updated, selection.kind, expansion.separated or selection.kind == "optimised images"


def _artifacts(
    search: Search, calibration: Calibration, examples: Examples, seeds: Tensor, excess: Tensor
) -> Tensor | None:
    """Float64[k]: the log-odds of the artifact mixture, where examples are 8-bit images that show one."""
    if not isinstance(examples, TrainingSet):
        return None
    model, known = search.model, calibration.artifacts
    if search.answer not in known:
        known[search.answer] = artifact_features(model, examples, search.batch_size, search.progress)
    log_odds = artifact_mixture(
        model,
        examples,
        seeds,
        torch.ones(len(examples), dtype=torch.bool),
        excess,
        batch_size=search.batch_size,
        features=known[search.answer],
    )
    search.lap("artifact features")
    return log_odds


@final
@dataclass(frozen=True, eq=False)
class Selection:
    """Float[n] scores, Bool[n] which examples are flagged (those above the threshold), and why."""

    scores: Tensor
    threshold: float
    flagged: Tensor
    rule: str
    kind: Kind


def select(expansion: SplitScores, log_odds: Tensor | None, excess: Tensor, seeds: Tensor) -> Selection:
    """The examples of the same attack as the seeds, by the rule of stage 4.

    Arguments:
        expansion: by similar gradients.
        log_odds: Float64[n], of the artifact mixture; None where the seeds show no artifacts, or where it was
            not asked for.
        excess: Float64[n], by which the seeds were chosen.
        seeds: Int64[k], which are all where none has similar gradients.
    """
    members = expansion.members
    if log_odds is not None:
        found = log_odds > 0
        if int((found & ~members).sum()) > _NO_MEMBERS * int(found.sum()):
            rule = "the same artifacts: noise, and displacement under recompression and a shift"
            return Selection(log_odds, 0.0, found, rule, "optimised images")
    if not bool(members.any()):
        members = torch.zeros_like(members)
        members[seeds] = True
        threshold = float(excess[members].min()) - 1e-9
        return Selection(
            excess, threshold, members, "the largest excess, as no other is similar", "trigger-like"
        )
    rule = "similar gradients, up to the gap to the other examples"
    return Selection(expansion.scores, expansion.threshold, members, rule, "trigger-like")


def select_pattern(pattern: SplitScores) -> Selection:
    """The examples whose inputs carry the pattern that was found in those with similar gradients."""
    rule = "the pattern that inputs with similar gradients share, by the log-odds of it and of their cosines"
    return Selection(pattern.scores, pattern.threshold, pattern.members, rule, "trigger-like")


def _spread_out(values: Tensor, rows: Tensor, total: int, elsewhere: float | None = None) -> Tensor:
    """Float64[total]: the values at their rows, elsewhere less than any of them by default."""
    if elsewhere is None:
        elsewhere = float(values.min()) - 1 if len(values) else 0.0
    result = torch.full((total,), elsewhere, dtype=torch.float64)
    result[rows] = values.double()
    return result
