"""An index of which each shard is made by a worker: on a Ray cluster, and what it needs."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from unpoison._executors import Done, Executor, LocalExecutor, RayExecutor
from unpoison.data import TensorExamples, TrainingSet
from unpoison.errors import InputError
from unpoison.influence import InfluenceIndex
from unpoison.influence import _index_workers as workers

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


def test_processes_are_forked_from_one_that_has_used_several_threads(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        torch.ones(1 << 20).sin()
        assert len(make(tmp_path / "index", examples(), processes=2)) == 50
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(InputError, match="a forked process has one, found 2"):
        LocalExecutor(1, threads=2, start="fork")


def test_whoever_goes_on_reads_in_the_pieces_that_were_begun_with(tmp_path: Path) -> None:
    sizes: list[int] = []
    model = network()
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    options: dict[str, Any] = {"shard_examples": 24, "batch_size": 24, "numbers": 20}
    begun = InfluenceIndex.build(tmp_path / "index", model, examples(), memory="50kB", **options)
    assert max(sizes) < 24
    known = begun.digest
    for shard in (tmp_path / "index" / "shards").iterdir():
        shard.unlink()
    sizes.clear()
    assert InfluenceIndex.build(tmp_path / "index", model, examples(), **options).digest == known
    assert max(sizes) < 24
    sizes.clear()
    InfluenceIndex.build(tmp_path / "other", model, examples(), **options)
    assert max(sizes) == 24


@pytest.mark.parametrize("kept", ["float16", "int8"])
def test_an_estimate_knows_the_size_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    if kept == "int8":
        monkeypatch.setattr("unpoison.influence._index_build._WHOLE", 0)
    train = TrainingSet(
        torch.randint(256, (50, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        torch.arange(50) % 3,
        ("a", "b", "c"),
        ids=tuple(f"folder/{'x' * 100}{row}.png" for row in range(50)),
    )
    found = InfluenceIndex.estimate(network(), train)
    index = make(tmp_path / "index", train)
    assert (found.numbers, found.sketch) == (index.numbers, index.settings["sketch"])
    assert index.settings["type"] == kept
    every = [path for path in (tmp_path / "index").rglob("*") if path.is_file()]
    headers = 3000 * len(every)
    assert found.disk_bytes <= sum(path.stat().st_size for path in every) <= found.disk_bytes + headers
    assert found.seconds(2) < found.seconds(1)


class Remote:
    """A function of Ray's, called when its result is asked for."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def options(self, **_: Any) -> Remote:
        return self

    def remote(self, *arguments: Any) -> Any:
        return partial(self.function, *arguments)


def test_what_is_sent_to_ray_makes_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from ray import cloudpickle, exceptions

    sent: list[int] = []

    def get(reference: Any) -> Any:
        if isinstance(reference, bytes):
            sent.append(len(reference))
            return cloudpickle.loads(reference)
        if fails:
            raise fails.pop()
        return reference()

    fails: list[Exception] = []
    fake = SimpleNamespace(
        init=lambda **_: None,
        shutdown=lambda: None,
        cancel=lambda *_, **__: None,
        cluster_resources=lambda: {"CPU": 2.0},
        put=cloudpickle.dumps,
        get=get,
        remote=Remote,
        wait=lambda references, num_returns: (references[:num_returns], references[num_returns:]),
        exceptions=exceptions,
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.chdir(tmp_path)
    whole = make(tmp_path / "whole", examples())
    with RayExecutor(2) as executor:
        assert make(Path("other"), examples(), executor=executor).digest == whole.digest
        assert len(sent) == 1  # by the one process that the workers are here
        fails.append(exceptions.WorkerCrashedError())
        with pytest.raises(InputError, match="the worker died 3 times; out of memory"):
            make(Path("third"), examples(), executor=executor)


class Inline(Executor):
    """Makes every shard in this process."""

    def __init__(self, gpu: bool = False) -> None:
        super().__init__(1)
        self.gpu, self.value, self.done = gpu, None, list[Done]()

    @property
    def on_gpu(self) -> bool:
        return self.gpu

    def share(self, value: Any) -> None:
        self.value = value

    def submit(self, key: str, function: Any, *arguments: Any) -> None:
        assert function is workers._make
        self.done.append(Done(key, self.value.make(*arguments)))

    def wait(self) -> list[Done]:
        done, self.done = self.done, []
        return done

    def close(self) -> None:
        pass


def test_a_share_of_a_gpu_takes_the_model_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []

    def to(self: nn.Module, device: object) -> nn.Module:
        taken.append(device)
        return self

    monkeypatch.setattr(nn.Module, "to", to)
    whole = make(tmp_path / "whole", examples(), executor=Inline())
    assert taken == []
    assert make(tmp_path / "gpu", examples(), executor=Inline(gpu=True)).digest == whole.digest
    assert taken == ["cuda"]


def test_a_model_on_a_gpu_needs_workers_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "where", lambda model: (torch.device("cuda"), torch.float32))
    with pytest.raises(InputError, match="how much of one each worker needs"):
        workers.check_executor(Inline(), network())
    workers.check_executor(Inline(gpu=True), network())
    workers.check_executor(None, network())
