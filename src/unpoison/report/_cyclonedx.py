"""The searched data and the model as components of a CycloneDX 1.6 bill of materials (an ML-BOM).

A `data` component for the training set and a `machine-learning-model` for the model, each with the SHA-256 of
its files where they are at hand, the flagged examples within the data, and an annotation that says what was
searched and how much was flagged. Where poison was found, it is a vulnerability in triage of both components.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Final

from unpoison._artefacts import canonical_json
from unpoison._statistics import Proportion
from unpoison.detectors import Findings
from unpoison.report._data import rate_of
from unpoison.report._identifiers import identifiers_of
from unpoison.report._provenance import Provenance, sha256
from unpoison.report._statement import LIMITS, class_of, statement
from unpoison.report._svg import plain
from unpoison.runs import json_value

_DATA, _MODEL, _VERSION = "training-data", "model", "1.6"
# Serial numbers are derived from the content, so that the same run gives the same file.
_NAMESPACE: Final = uuid.UUID("5b0f2f0e-8a53-4d7c-9a0e-3f6c1f1f7f60")


def findings_cyclonedx(findings: Findings, provenance: Provenance | None = None) -> dict[str, Any]:
    """The bill of materials of one search.

    Arguments:
        findings: of any detector.
        provenance: of the run, with the files to hash.

    Cost: reads the training data and the weights.
    """
    origin = Provenance() if provenance is None else provenance
    tool = {"type": "application", "name": "unpoison", "version": origin.version}
    bom: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": _VERSION,
        "version": 1,
        "metadata": {"timestamp": origin.time, "tools": {"components": [tool]}},
        "components": [_model(origin), _data(findings, origin)],
        "dependencies": [{"ref": _MODEL, "dependsOn": [_DATA]}, {"ref": _DATA}],
        "annotations": [
            {
                "subjects": [_DATA, _MODEL],
                "annotator": {"component": tool},
                "timestamp": origin.time,
                "text": f"{statement(findings)} {LIMITS}",
            }
        ],
    }
    if findings.poison_found:
        bom["vulnerabilities"] = [_vulnerability(findings, origin)]
    bom = json_value(bom)
    return {"serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, canonical_json(bom))}", **bom}


def _data(findings: Findings, origin: Provenance) -> dict[str, Any]:
    threshold = findings.threshold
    name = "" if origin.data is None else plain(origin.data.name)
    component: dict[str, Any] = {
        "type": "data",
        "bom-ref": _DATA,
        "name": name or origin.named("data") or "training data",
        "data": [
            {
                "type": "dataset",
                "name": name or origin.named("data") or "training data",
                "description": f"{len(findings):,} labelled training examples of "
                f"{len(findings.class_names):,} classes",
            }
        ],
        "properties": _properties(
            {
                "fingerprint": findings.fingerprint,
                "method": plain(findings.method),
                "false-alarm-level": threshold.false_alarm_level,
                "p-value": findings.p_value,
                "examples": len(findings),
                "flagged": len(findings.flagged),
            }
        ),
    }
    if origin.data is not None:
        component["hashes"] = _hashes(sha256(origin.data))
    hashes = origin.content_hashes(findings)
    flagged = [
        {
            "type": "file",
            "bom-ref": f"{_DATA}/{index}",
            "name": plain(findings.name_of(index)) or str(index),
            **({"hashes": _hashes(hashes[index])} if index in hashes else {}),
            "properties": _properties(
                {
                    "index": index,
                    "label": class_of(findings, int(findings.labels[index])),
                    "score": f"{float(findings.scores[index]):.6g}",
                    "flagged": True,
                }
            ),
        }
        for index in findings.flagged.tolist()
    ]
    if flagged:
        component["components"] = flagged
    return component


def _model(origin: Provenance) -> dict[str, Any]:
    results: Mapping[str, Any] = {} if origin.trained is None else origin.trained.results
    recipe = results.get("recipe") or {}
    parameters: dict[str, Any] = {
        "approach": {"type": "supervised"},
        "task": "classification",
        "datasets": [{"ref": _DATA}],
    }
    if recipe.get("model"):
        parameters["modelArchitecture"] = plain(recipe["model"])
    card: dict[str, Any] = {"modelParameters": parameters}
    metrics = [
        _metric(name, rate)
        for name in ("clean_accuracy", "attack_success")
        if isinstance(rate := rate_of(results, name), Proportion) and rate.trials
    ]
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": origin.named("model") or ("model" if origin.model is None else plain(origin.model.name)),
        "modelCard": card,
    }
    if origin.model is not None:
        component["hashes"] = _hashes(sha256(origin.model))
    return component


def _metric(name: str, rate: Proportion) -> dict[str, Any]:
    low, high = rate.interval()
    return {
        "type": name.replace("_", " "),
        "value": f"{rate.rate:.6g}",
        "slice": f"{rate.successes} of {rate.trials}",
        "confidenceInterval": {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"},
    }


def _vulnerability(findings: Findings, origin: Provenance) -> dict[str, Any]:
    found = identifiers_of(traced=findings.observation is not None)
    return {
        "id": found[0].id,
        "source": {"name": found[0].taxonomy, "url": found[0].uri},
        "references": [{"id": one.id, "source": {"name": one.taxonomy, "url": one.uri}} for one in found[1:]],
        "description": found[0].name,
        "detail": f"{plain(findings.summary)} {statement(findings)}",
        "analysis": {"state": "in_triage", "detail": LIMITS},
        "affects": [{"ref": _DATA}, {"ref": _MODEL}],
    }


def _properties(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "name": f"unpoison:{name}",
            "value": str(value).lower() if isinstance(value, bool) else str(value),
        }
        for name, value in values.items()
        if value is not None
    ]


def _hashes(hexadecimal: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": hexadecimal}]
