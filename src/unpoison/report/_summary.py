"""Findings as a short Markdown text, for a ticket or the summary of a pipeline.

Every text from data stands in a code span that is longer than any run of backticks in it, so that it is
neither markup nor a link nor a mention, whatever a class or a file is called.
"""

from __future__ import annotations

import re
from typing import Final

from unpoison.detectors import Findings
from unpoison.report._identifiers import identifiers_of
from unpoison.report._provenance import Provenance
from unpoison.report._statement import LIMITS, class_of, declared, statement
from unpoison.report._svg import plain

_SHOWN: Final = 20


def findings_markdown(findings: Findings, provenance: Provenance | None = None) -> str:
    """The summary of one search.

    Arguments:
        findings: of any detector.
        provenance: of the run.
    """
    origin = Provenance() if provenance is None else provenance
    method, observation, level = (
        declared(findings),
        findings.observation,
        findings.threshold.false_alarm_level,
    )
    title = "" if method is None else f" ({method.title}; {method.paper})"
    facts = [
        f"Method: {code_span(findings.method)}{title}",
        "False-alarm level: " + ("none stated by the method" if level is None else f"{level:g}"),
    ]
    if findings.p_value is not None:
        facts.append(f"p-value: {findings.p_value:.3g}")
    if observation is not None and observation.predicted is not None:
        truth = "not given"
        if observation.true_label is not None:
            truth = code_span(class_of(findings, observation.true_label))
        facts.append(
            f"Traced answer: {code_span(class_of(findings, observation.predicted))}; true label: {truth}"
        )
    for words, what in (("Training data", "data"), ("Model", "model")):
        if origin.named(what):
            facts.append(f"{words}: {code_span(origin.named(what))}")
    facts.append(f"Fingerprint of the training set: {code_span(findings.fingerprint)}")
    if origin.record is not None:
        facts.append(f"Searched: {origin.time}, unpoison {plain(origin.version)}, seed {origin.record.seed}")
    found = identifiers_of(traced=observation is not None)
    facts.append("Identifiers: " + "; ".join(f"[{one.id}]({one.uri}) {one.name}" for one in found))
    lines = [
        f"# unpoison: {len(findings.flagged):,} of {len(findings):,} training examples flagged",
        "",
        code_span(statement(findings)),
        "",
        f"Finding: {code_span(findings.summary)}",
        "",
        *(f"- {fact}" for fact in facts),
        "",
    ]
    if len(findings.flagged):
        shown = findings.flagged[:_SHOWN].tolist()
        more = f", the first {len(shown)} of {len(findings.flagged):,}"
        lines += [f"## Flagged examples{more if len(shown) < len(findings.flagged) else ''}", ""]
        lines += [
            f"1. {code_span(findings.name_of(index))}, label "
            f"{code_span(class_of(findings, int(findings.labels[index])))}, "
            f"score {float(findings.scores[index]):.4g}"
            for index in shown
        ]
        lines.append("")
    return "\n".join([*lines, LIMITS, ""])


def code_span(text: str) -> str:
    """A text from data as a code span of Markdown.

    >>> code_span("a`b"), code_span("<b>@all</b>"), code_span("")
    ('``a`b``', '`<b>@all</b>`', '` `')
    """
    line = plain(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}"
