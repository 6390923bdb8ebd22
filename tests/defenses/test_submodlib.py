"""The same decisions as submodlib, the library that EPIC's published code clusters with."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unpoison.defenses._facility_location import greedy_medoids

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("submodlib") is None, reason="needs submodlib-py, of the extra 'peers'"
)

# In a process of its own: the import takes seconds and warns of other people's code.
PEER = """
import sys
import numpy as np
from submodlib import FacilityLocationFunction

points = np.load(sys.argv[1])
for name, count in (("few", 40), ("many", 120)):
    function = FacilityLocationFunction(n=len(points), data=points, metric="euclidean", mode="dense")
    picked = function.maximize(
        budget=count, optimizer="LazyGreedy", stopIfZeroGain=False, stopIfNegativeGain=False,
        verbose=False, show_progress=False,
    )
    order = np.array([place for place, _ in picked])
    owner = np.asarray(function.sijs)[:, order].argmax(1)
    np.savez(sys.argv[2] + "/" + name, order=order, size=np.bincount(owner, minlength=count)[owner])
"""


def test_the_same_clusters(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(400, 10, generator=generator)
    logits[:, 0] += 8 * torch.rand(400, generator=generator)
    gradients = logits.double().softmax(1)
    gradients[:, 0] -= 1
    np.save(tmp_path / "points.npy", gradients.float().numpy())
    subprocess.run(
        [sys.executable, "-c", PEER, str(tmp_path / "points.npy"), str(tmp_path)],
        check=True,
        capture_output=True,
    )
    for name, count in (("few", 40), ("many", 120)):
        found = greedy_medoids(gradients, count)
        with np.load(tmp_path / f"{name}.npz") as theirs:
            alone = torch.from_numpy(theirs["size"]) == 1
            # Points that would serve each other gain the same; then either is picked.
            assert len(set(theirs["order"].tolist()) & set(found.medoids.tolist())) >= 0.8 * count
            assert bool(alone.any()) or name == "few"
            assert float(((found.size_of_each == 1) == alone).double().mean()) >= 0.995
