"""Every kind of dataset and network: each verb works, or refuses in one line, as wanted.

What does not yet is listed in pending.json; an entry that has come right makes its test fail until it is
taken out, by hand or with `python -m benchmarks.compatibility --pending 1`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compat_datasets import DATASETS
from compat_harness import DATASET_VERBS, NETWORK_VERBS, WORKS, Kind, run
from compat_networks import NETWORKS

PENDING: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "pending.json").read_text(encoding="utf-8")
)


def cases() -> Iterator[Any]:
    for kinds, verbs in ((DATASETS, DATASET_VERBS), (NETWORKS, NETWORK_VERBS)):
        # Without the extra `compat` the kinds that need its packages are not collected.
        for kind in (kind for kind in kinds if kind.absent() is None):
            for verb in verbs:
                pending = verb in PENDING.get(kind.name, ())
                marks = [pytest.mark.xfail(reason="not yet", strict=True)] if pending else []
                yield pytest.param(kind, verb, id=f"{kind.name}-{verb}", marks=marks)


@pytest.mark.parametrize(("kind", "verb"), list(cases()))
def test_kind(kind: Kind, verb: str) -> None:
    outcome, expected = run(kind, verb), kind.expected.get(verb, WORKS)
    assert outcome.meets(expected), f"expected {expected}, found {outcome}"


def test_enough_kinds_of_unique_names() -> None:
    assert len(DATASETS) >= 40
    assert len(NETWORKS) >= 40
    names = [kind.name for kind in (*DATASETS, *NETWORKS)]
    assert len(set(names)) == len(names)


def test_pending_kinds_exist() -> None:
    verbs = {kind.name: DATASET_VERBS for kind in DATASETS} | {kind.name: NETWORK_VERBS for kind in NETWORKS}
    for name, pending in PENDING.items():
        assert set(pending) <= set(verbs[name]), name
