"""An `InfluenceIndex` of unusual examples, of a set read in another way, and on a disk that is full."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison.data import DatasetExamples, TensorExamples, TrainingSet
from unpoison.errors import InputError, MismatchError
from unpoison.influence import InfluenceIndex
from unpoison.influence import _index_files as files
from unpoison.influence._index_files import IndexFiles


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def held(count: int = 70) -> TrainingSet:
    randomness = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 1, 4, 4), generator=randomness, dtype=torch.uint8)
    return TrainingSet(images, torch.randint(3, (count,), generator=randomness), ("a", "b", "c"))


def lazily(training_set: TrainingSet) -> DatasetExamples:
    """The same set, read row by row."""
    rows = list(zip(training_set.images.float().div(255), training_set.labels.tolist(), strict=True))
    return DatasetExamples(rows, class_names=training_set.class_names, memory_bytes=0)


def make(path: Path, train: Any, model: nn.Module | None = None, **options: Any) -> InfluenceIndex:
    given = {"shard_examples": 16, "batch_size": 8, **options}
    return InfluenceIndex.build(path, model or network(), train, **given)


@pytest.mark.parametrize("first", ["held", "lazy"])
def test_a_set_in_memory_and_the_same_read_lazily_share_an_index(tmp_path: Path, first: str) -> None:
    sets: list[Any] = [held(), lazily(held())]
    index = make(tmp_path / "index", sets[first == "lazy"])
    for one in sets:
        index.check(network(), one)
        assert make(tmp_path / "index", one).digest == index.digest


def test_another_order_and_other_labels_are_noticed(tmp_path: Path) -> None:
    train = held()
    index, order = make(tmp_path / "index", train), torch.arange(70)
    order[[2, 3]] = order[[3, 2]]
    # Of 70 examples 64 are looked at by `sampled_fingerprint`; 11 is not among them.
    assert 11 not in {place * 70 // 64 for place in range(64)}
    labels = train.labels.clone()
    labels[11] = (labels[11] + 1) % 3
    pixels = train.images.clone()
    pixels[11] += 1
    for other in (
        train.subset(order),
        lazily(train.subset(order)),
        replace(train, labels=labels),
        lazily(replace(train, labels=labels)),
        replace(train, images=pixels),
    ):
        with pytest.raises(MismatchError, match="another training set"):
            index.check(network(), other)
        with pytest.raises(MismatchError, match="other examples"):
            make(tmp_path / "index", other)


def test_one_example(tmp_path: Path) -> None:
    index = make(tmp_path / "index", held(1))
    assert len(index) == 1
    assert index.influence(index.queries(network(), held(1).batch(0, 1))).shape == (1, 1)
    indices, cosines = index.similar([0])
    assert indices.shape == cosines.shape == (1, 0)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        kept = self.table(input_ids) * attention_mask[:, :, None]
        return self.head(kept.sum(1) / attention_mask.sum(1, keepdim=True))  # type: ignore[no-any-return]


def test_texts(tmp_path: Path) -> None:
    randomness = torch.Generator().manual_seed(0)
    ids = torch.randint(9, (30, 6), generator=randomness)
    mask = (torch.arange(6) < torch.randint(1, 7, (30, 1), generator=randomness)).long()
    train = TensorExamples({"input_ids": ids, "attention_mask": mask}, torch.arange(30) % 2)
    model = Words().eval()
    index = make(tmp_path / "index", train, model)
    index.check(model, train)
    found = index.influence(index.queries(model, train.batch(0, 3)))
    assert torch.allclose(found[torch.arange(3), torch.arange(3)], index.self_influence[:3], rtol=0.02)
    changed = TensorExamples({"input_ids": ids, "attention_mask": mask.flip(0)}, torch.arange(30) % 2)
    with pytest.raises(MismatchError, match="another training set"):
        index.check(model, changed)


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_told_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    whole, save = make(tmp_path / "whole", held()), files.save_file

    def fills(tensors: Any, path: Path, **given: Any) -> None:
        if "32.safetensors" in path.name:
            path.write_bytes(b"a half")
            full()
        save(tensors, path, **given)
        if processes > 1 and ".0.safetensors" in path.name:
            time.sleep(60)  # stopped before it renames the file, because the other worker fails

    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", fills)
        with pytest.raises(
            InputError, match=r"32\.safetensors: cannot be written \(No space left on device\)"
        ):
            make(tmp_path / "index", held(), processes=processes)
    assert not list((tmp_path / "index").rglob("*.partial"))
    with pytest.raises(InputError, match="unfinished"):
        InfluenceIndex.open(tmp_path / "index")
    assert make(tmp_path / "index", held()).digest == whole.digest


@pytest.mark.parametrize("what", ["index.json", "factors", "basis.safetensors"])
def test_a_disk_that_is_full_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    names = {"index.json": "write_json", "basis.safetensors": "save_file"}
    if what == "factors":
        monkeypatch.setattr("unpoison.influence._factors.save_file", full)
    else:
        monkeypatch.setattr(files, names[what], full)
    with pytest.raises(InputError, match=rf"{what}: cannot be written"):
        make(tmp_path / "index", held())


def test_two_at_a_time_are_refused_and_leftovers_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unpoison._artefacts._WAITS", 1)
    shards = tmp_path / "index" / "shards"
    shards.mkdir(parents=True)
    (shards / ".0.safetensors.abcd.partial").write_bytes(b"a half")
    with (
        IndexFiles(tmp_path / "index").alone(),
        pytest.raises(InputError, match="another process is making this index"),
    ):
        make(tmp_path / "index", held())
    make(tmp_path / "index", held())
    assert not list(tmp_path.rglob("*.partial"))


def test_a_shard_that_is_cut_off_is_made_again(tmp_path: Path) -> None:
    digest, place = make(tmp_path / "index", held()).digest, tmp_path / "index" / "shards" / "16.safetensors"
    place.write_bytes(place.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"16\.safetensors: cannot be read"):
        InfluenceIndex.open(tmp_path / "index").lengths()
    assert make(tmp_path / "index", held()).digest == digest


def test_shards_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, read, checked = make(tmp_path / "index", held()), files.read_tensors, list[bool]()

    def watched(path: Path, *names: str, check: bool = True) -> Any:
        checked.append(check and not names)
        return read(path, *names, check=check)

    monkeypatch.setattr("unpoison.influence._index.read_tensors", watched)
    opened = InfluenceIndex.open(index.directory)
    checked.clear()
    opened.similar([3])
    assert checked.count(True) == 5
    checked.clear()
    opened.similar([3])
    assert not any(checked)
