"""Checkpoints of both kinds: what lies on disk, that it comes back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unpoison._checkpoints import CRAFTING, TRAINING, Checkpoint, Checkpoints, Kind, digest_of
from unpoison.errors import InputError, MismatchError

BOTH = pytest.mark.parametrize(
    ("kind", "directory", "file", "key"),
    [
        (TRAINING, "epoch-0003", "checkpoint.json", "history"),
        (CRAFTING, "step-0003", "crafting.json", "notes"),
    ],
    ids=["training", "crafting"],
)


def store(directory: Path, kind: Kind, *, seed: int = 0) -> Checkpoints:
    return Checkpoints(directory, {"seed": seed, "goal": [1]}, kind=kind)


def state(done: int) -> Checkpoint:
    return Checkpoint(done=done, tensors={"a": torch.arange(6.0).view(2, 3).T + done}, notes=[{"loss": 0.5}])


@BOTH
def test_the_files_are_those_of_earlier_versions(
    tmp_path: Path, kind: Kind, directory: str, file: str, key: str
) -> None:
    store(tmp_path, kind).write(state(3))
    assert sorted(path.name for path in (tmp_path / directory).iterdir()) == [file, "state.safetensors"]
    assert json.loads((tmp_path / directory / file).read_text()) == {
        "identity": {"seed": 0, "goal": [1]},
        key: [{"loss": 0.5}],
    }


@BOTH
def test_the_newest_comes_back_and_the_older_ones_go(
    tmp_path: Path, kind: Kind, directory: str, file: str, key: str
) -> None:
    checkpoints = store(tmp_path / "new", kind)
    assert checkpoints.latest() is None
    checkpoints.write(state(2))
    (tmp_path / "new" / f".{directory}.1a2b3c4d.partial").mkdir()
    (tmp_path / "new" / "mine").mkdir()
    checkpoints.write(state(3))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {directory, "mine"}
    found = checkpoints.latest()
    assert found is not None
    assert (found.done, found.notes) == (3, [{"loss": 0.5}])
    assert torch.equal(found.tensors["a"], state(3).tensors["a"])


@BOTH
def test_what_belongs_to_other_work_or_cannot_be_read_is_refused(
    tmp_path: Path, kind: Kind, directory: str, file: str, key: str
) -> None:
    store(tmp_path, kind).write(state(3))
    with pytest.raises(
        MismatchError, match=f"{directory}: .* belongs to a {kind.work} with another seed; name"
    ):
        store(tmp_path, kind, seed=1).latest()
    (tmp_path / directory / file).write_text(json.dumps({"identity": {"seed": 0, "goal": [1]}}))
    with pytest.raises(InputError, match=rf"{directory}: damaged checkpoint \('{key}'\); remove .* to start"):
        store(tmp_path, kind).latest()


def test_a_digest_tells_names_types_shapes_and_contents_apart() -> None:
    tensor = torch.tensor([[0.0, 1.0]])
    different = (
        {"weight": tensor},
        {"bias": tensor},
        {"weight": tensor + 1},
        {"weight": tensor.T},
        {"weight": tensor.view(torch.int32)},
        {"weight": tensor, "bias": tensor},
        {"weight": tensor.bfloat16()},
        {"weight": torch.tensor(True)},
    )
    assert len({digest_of(one) for one in different}) == len(different)
    assert digest_of({"weight": tensor.clone()}) == digest_of(different[0])


def test_a_group_is_named_without_its_prefix() -> None:
    checkpoint = Checkpoint(done=1, tensors={"a.x": torch.ones(1), "ab.x": torch.zeros(1)}, notes=None)
    assert checkpoint.group("a.") == {"x": torch.ones(1)}
