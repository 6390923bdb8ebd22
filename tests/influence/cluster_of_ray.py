"""An index on a real Ray cluster of two workers, one of which is killed.

Not collected with the others, as it takes an idle machine: pytest tests/influence/cluster_of_ray.py
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unpoison._executors import RayExecutor
from unpoison.data import TensorExamples
from unpoison.influence import InfluenceIndex

# Ray leaves sockets and processes to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "default::DeprecationWarning")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).eval()


def examples(count: int = 50, kind: type[TensorExamples] = TensorExamples) -> TensorExamples:
    randomness = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 4, 4, generator=randomness)
    return kind(images, torch.randint(3, (count,), generator=randomness))


def make(path: Path, train: TensorExamples, **options: Any) -> InfluenceIndex:
    return InfluenceIndex.build(path, network(), train, **{"shard_examples": 8, "batch_size": 4, **options})


class Deadly(TensorExamples):  # type: ignore[misc]
    """Its first reader from 16 on is killed, where it is a worker."""

    mark: Path
    home: int

    def batch(self, start: int, stop: int) -> Any:
        if start >= 16 and os.getpid() != self.home and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(start, stop)


def test_a_worker_of_ray_that_is_killed_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.chdir(tmp_path)
    whole, train, seen = make(tmp_path / "whole", examples()), examples(kind=Deadly), []
    train.mark, train.home = tmp_path / "killed", os.getpid()
    with RayExecutor(2) as executor:
        two = make(Path("two"), train, executor=executor, progress=lambda *told, **_: seen.append(told))
        assert train.mark.exists()
        assert two.digest == whole.digest
        assert seen[-1] == ("index", 50, 50)
        grown = two.append(network(), examples(10), executor=executor)
    assert grown.digest == whole.append(network(), examples(10)).digest
