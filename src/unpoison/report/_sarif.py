"""Findings as SARIF 2.1.0 (OASIS, errata 01), which code scanning services and editors read.

One run with the rule of the detector; one result for each flagged example. Its artifact is the file, its
partial fingerprint the SHA-256 of the content, so that an example is recognised in the next run, whatever its
index is then. Identifiers of MITRE ATLAS and OWASP are taxonomies of the run. A notification says what was
searched and how much was flagged, also where that is nothing.

Text from data is escaped as the standard has it: braces, which are placeholders, are doubled, and brackets,
which are links, have a backslash; paths are percent-encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import quote

from unpoison.detectors import Findings
from unpoison.report._identifiers import IDENTIFIERS, Identifier, identifiers_of
from unpoison.report._provenance import Provenance
from unpoison.report._statement import LIMITS, class_of, declared, statement
from unpoison.report._svg import plain

SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_BASE: Final = "TRAINING_DATA"


def findings_sarif(findings: Findings, provenance: Provenance | None = None) -> dict[str, Any]:
    """The SARIF log of one search.

    Arguments:
        findings: of any detector.
        provenance: of the run. Where it has a folder of training data, that is the beginning of every path
            (relative as it is given, so that a service finds files of a repository), and contents are hashed
            by file; else paths are relative to the base `TRAINING_DATA`.

    Cost: reads the flagged files.
    """
    origin = Provenance() if provenance is None else provenance
    hashes = origin.content_hashes(findings)
    run: dict[str, Any] = {
        "tool": {"driver": _driver(findings, origin)},
        "invocations": [
            {
                "executionSuccessful": True,
                "startTimeUtc": origin.time,
                "toolExecutionNotifications": [
                    {"level": "note", "message": {"text": _escaped(f"{statement(findings)} {LIMITS}")}}
                ],
            }
        ],
        "columnKind": "unicodeCodePoints",
        "taxonomies": [_taxonomy(entries) for entries in _by_taxonomy()],
        "results": [],
        "properties": {
            "trainingSetFingerprint": findings.fingerprint,
            "examples": len(findings),
            "flagged": len(findings.flagged),
            "falseAlarmLevel": findings.threshold.false_alarm_level,
            "pValue": findings.p_value,
        },
    }
    if findings.ids is not None and _folder(origin) is None:
        run["originalUriBaseIds"] = {_BASE: {"description": {"text": "The folder of the training data."}}}
    artifacts: list[dict[str, Any]] = []
    for index in findings.flagged.tolist():
        result = _result(findings, index, hashes.get(index), origin)
        place = result["locations"][0].get("physicalLocation")
        if place is not None:
            artifact: dict[str, Any] = {"location": dict(place["artifactLocation"])}
            if origin.file_of(findings.name_of(index)) is not None:
                artifact["hashes"] = {"sha-256": hashes[index]}
            place["artifactLocation"]["index"] = len(artifacts)
            artifacts.append(artifact)
        run["results"].append(result)
    if artifacts:
        run["artifacts"] = artifacts
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _driver(findings: Findings, origin: Provenance) -> dict[str, Any]:
    return {
        "name": "unpoison",
        "version": origin.version,
        "rules": [_rule(findings)],
        "supportedTaxonomies": [
            {"name": entries[0].taxonomy, "index": place} for place, entries in enumerate(_by_taxonomy())
        ],
    }


def _rule(findings: Findings) -> dict[str, Any]:
    method, found = declared(findings), identifiers_of(traced=findings.observation is not None)
    rule: dict[str, Any] = {
        "id": plain(findings.method),
        "defaultConfiguration": {"level": "warning"},
        "relationships": [
            {
                "target": {
                    "id": one.id,
                    "toolComponent": {"name": one.taxonomy, "index": place},
                },
                "kinds": ["relevant"],
            }
            for place, entries in enumerate(_by_taxonomy())
            for one in entries
            if one in found
        ],
        "properties": {"tags": ["security", *(one.id for one in found)]},
    }
    if method is not None:
        rule["shortDescription"] = {"text": _escaped(method.title)}
        rule["fullDescription"] = {"text": _escaped(method.summary)}
        rule["help"] = {"text": _escaped(f"{method.summary} Paper: {method.paper}. {LIMITS}")}
    return rule


def _result(findings: Findings, index: int, content: str | None, origin: Provenance) -> dict[str, Any]:
    level = findings.threshold.false_alarm_level
    stated = "the method states no false-alarm level" if level is None else f"false-alarm level {level:g}"
    cause = ""
    if findings.observation is not None and findings.observation.predicted is not None:
        answer = class_of(findings, findings.observation.predicted)
        cause = f" as a likely cause of the answer “{answer}”"
    label = class_of(findings, int(findings.labels[index]))
    location: dict[str, Any] = {
        "logicalLocations": [{"fullyQualifiedName": f"training_set[{index}]", "kind": "example"}]
    }
    if findings.ids is not None:
        location["physicalLocation"] = {"artifactLocation": _place(findings.ids[index], origin)}
    score = float(findings.scores[index])
    return {
        "ruleId": plain(findings.method),
        "ruleIndex": 0,
        "level": "warning",
        "message": {
            "text": _escaped(
                f"Training example {plain(findings.name_of(index), limit=200)} with the label “{label}” is "
                f"flagged by {plain(findings.method)}{cause}: score {score:.4g}; {stated}."
            )
        },
        "locations": [location],
        "partialFingerprints": (
            {"contentSha256/v1": content}
            if content is not None
            else {"exampleOfTrainingSet/v1": f"{findings.fingerprint}:{index}"}
        ),
        "properties": {"index": index, "label": label, "score": score},
    }


def _place(name: str, origin: Provenance) -> dict[str, Any]:
    """The artifact location of an example."""
    if PurePosixPath(name).is_absolute():
        return {"uri": "file://" + _quoted(PurePosixPath("/", name.lstrip("/")).as_posix())}
    folder = _folder(origin)
    if folder is None:
        return {"uri": _quoted(name), "uriBaseId": _BASE}
    path = (PurePosixPath(folder.as_posix()) / name).as_posix()
    return {"uri": ("file://" if folder.is_absolute() else "") + _quoted(path)}


def _folder(origin: Provenance) -> Path | None:
    return origin.data if origin.data is not None and origin.data.is_dir() else None


def _quoted(path: str) -> str:
    """A path as a URI; bytes that were no text in a file name stay what they were."""
    return quote(path, safe="/", errors="surrogateescape")


def _escaped(text: str) -> str:
    for character, escape in (("\\", "\\\\"), ("[", "\\["), ("]", "\\]"), ("{", "{{"), ("}", "}}")):
        text = text.replace(character, escape)
    return text


def _by_taxonomy() -> list[list[Identifier]]:
    names = list(dict.fromkeys(one.taxonomy for one in IDENTIFIERS))
    return [[one for one in IDENTIFIERS if one.taxonomy == name] for name in names]


def _taxonomy(entries: Sequence[Identifier]) -> dict[str, Any]:
    first = entries[0]
    return {
        "name": first.taxonomy,
        "version": first.version,
        "organization": first.organization,
        "shortDescription": {"text": first.taxonomy},
        "isComprehensive": False,
        "taxa": [
            {"id": one.id, "name": one.name, "shortDescription": {"text": one.name}, "helpUri": one.uri}
            for one in entries
        ],
    }
