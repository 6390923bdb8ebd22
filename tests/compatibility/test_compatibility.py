"""Every kind of dataset and network: each verb works, or refuses in one line, as wanted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from compat_datasets import DATASETS
from compat_harness import DATASET_VERBS, NETWORK_VERBS, WORKS, Kind, run
from compat_networks import NETWORKS


def cases() -> Iterator[Any]:
    for kinds, verbs in ((DATASETS, DATASET_VERBS), (NETWORKS, NETWORK_VERBS)):
        # Without the extra `compat` the kinds that need its packages are not collected.
        for kind in (kind for kind in kinds if kind.absent() is None):
            for verb in verbs:
                yield pytest.param(kind, verb, id=f"{kind.name}-{verb}")


@pytest.mark.parametrize(("kind", "verb"), list(cases()))
def test_kind(kind: Kind, verb: str) -> None:
    outcome, expected = run(kind, verb), kind.expected.get(verb, WORKS)
    assert outcome.meets(expected), f"expected {expected}, found {outcome}"


def test_enough_kinds_of_unique_names() -> None:
    assert len(DATASETS) >= 40
    assert len(NETWORKS) >= 40
    names = [kind.name for kind in (*DATASETS, *NETWORKS)]
    assert len(set(names)) == len(names)
