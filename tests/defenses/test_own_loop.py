"""A plain PyTorch loop that is taken down and defended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from unpoison.data import TensorExamples
from unpoison.defenses import EPIC, KNNOutlierFilter, OwnLoop, RandomDrop, isolated
from unpoison.errors import InputError, MismatchError
from unpoison.training import TrainingRecord


def case(count: int = 60) -> tuple[TensorExamples, DataLoader[Any], nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    inputs = torch.randn(count, 4, generator=generator) + 3 * labels[:, None]
    labels[:3] = 1 - labels[:3]
    sampler = RandomSampler(range(count), generator=generator)
    loader: DataLoader[Any] = DataLoader(TensorDataset(inputs, labels), batch_size=16, sampler=sampler)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Linear(4, 2)
    return TensorExamples(inputs, labels), loader, network


def run(loop: OwnLoop, loader: DataLoader[Any], network: nn.Module, epochs: range) -> list[list[int]]:
    """Train; the labels and inputs of each batch as they were seen."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    seen = []
    for epoch in epochs:
        loop.epoch(epoch, network)
        rows = []
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), labels).backward()
            optimizer.step()
            rows += [float(one) for one in inputs[:, 0]]
        seen.append(rows)
    return seen


@pytest.mark.parametrize(
    "defense",
    [
        None,
        EPIC(subset_size=0.3, interval=1, warm_up=1),
        KNNOutlierFilter(epochs=(1, 2), min_train_accuracy=0.0),
        RandomDrop(sizes=((1, 5), (3, 2))),
    ],
    ids=lambda one: type(one).__name__,
)
def test_the_record_is_what_the_loop_saw(defense: Any, tmp_path: Path) -> None:
    examples, loader, network = case()
    loop = OwnLoop(examples, defense=defense)
    loop.begin(loader, epochs=4)
    seen = run(loop, loader, network, range(4))
    loop.checkpoint(15, tmp_path / "weights.pt")
    record = loop.record
    first = examples.tensors[0][:, 0]
    assert [first[drawn].tolist() for drawn in record.order] == seen
    assert sorted(record.order[0].tolist()) == list(range(60))
    kept = (~record.dropped).nonzero()[:, 0].tolist()
    assert sorted(record.order[-1].tolist()) == kept
    assert (len(kept) < 60) == (defense is not None)
    assert all(
        not set(b.tolist()) - set(a.tolist()) for a, b in zip(record.order, record.order[1:], strict=False)
    )
    record.save(tmp_path / "record")
    again = TrainingRecord.load(tmp_path / "record")
    again.check(examples)
    assert [one.tolist() for one in again.order] == [one.tolist() for one in record.order]
    assert again.checkpoints == ((15, str(tmp_path / "weights.pt")),)
    assert again.defense == record.defense == (None if defense is None else repr(defense))
    with pytest.raises(MismatchError, match="the very set"):
        again.check(examples.subset(range(59)))


def test_epic_drops_what_it_finds_isolated_then() -> None:
    examples, loader, network = case()
    loop = OwnLoop(examples, defense=EPIC(subset_size=0.3, interval=1, warm_up=1, last_epoch=1), seed=3)
    loop.begin(loader, epochs=4)
    run(loop, loader, network, range(1))
    logits = network(examples.tensors[0]).detach()
    loop.epoch(1, network)
    expected = isolated(logits, examples.labels, subset_size=0.3, seed=loop.defense._round_seed(1))
    assert torch.equal(loop.record.dropped, expected)
    assert int(expected.sum()) > 0


def test_a_resumed_run_goes_on_from_the_record() -> None:
    defense = RandomDrop(sizes=((1, 5), (3, 4)))
    examples, loader, network = case()
    whole = OwnLoop(examples, defense=defense)
    whole.begin(loader, epochs=4)
    run(whole, loader, network, range(4))
    examples, loader, network = case()
    first = OwnLoop(examples, defense=RandomDrop(sizes=((1, 5), (3, 4))))
    first.begin(loader, epochs=4)
    run(first, loader, network, range(2))
    second = OwnLoop(examples, defense=RandomDrop(sizes=((1, 5), (3, 4))))
    loader = DataLoader(loader.dataset, batch_size=16)
    second.begin(loader, epochs=4, earlier=first.record)
    run(second, loader, network, range(2, 4))
    assert torch.equal(second.record.dropped, whole.record.dropped)
    assert len(second.record.order) == 4
    assert int(second.record.dropped.sum()) == 9


def test_a_loader_is_recorded_anew_by_another_loop() -> None:
    examples, loader, network = case()
    first = OwnLoop(examples, defense=RandomDrop(sizes=((0, 5),)))
    first.begin(loader, epochs=1)
    run(first, loader, network, range(1))
    second = OwnLoop(examples)
    second.begin(loader, epochs=1)
    run(second, loader, network, range(1))
    assert [len(drawn) for drawn in first.record.order] == [55]
    assert [len(drawn) for drawn in second.record.order] == [60]
    assert not second.record.dropped.any()


def test_what_cannot_be_defended_is_refused(tmp_path: Path) -> None:
    examples, loader, network = case()
    with pytest.raises(InputError, match=r"within a training step.*epic"):
        OwnLoop(examples, defense="mixup")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has not begun"):
        _ = OwnLoop(examples).record
    with pytest.raises(InputError, match="without a sampler"):
        OwnLoop(examples).begin(iter([]), epochs=1)
    with pytest.raises(MismatchError, match="has 59 examples, the loader has 60"):
        OwnLoop(examples.subset(range(59))).begin(loader, epochs=1)
    loop = OwnLoop(examples, defense=EPIC(interval=1, warm_up=0))
    loop.begin(loader, epochs=2)
    network.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        loop.epoch(0, network)
    (tmp_path / "training.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match="damaged"):
        TrainingRecord.load(tmp_path)
