from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unpoison.data import TrainingSet, from_dataset, read_npz, write_npz
from unpoison.errors import InputError


def make(n: int) -> TrainingSet:
    images = torch.arange(n * 3 * 4 * 5).remainder(256).to(torch.uint8).reshape(n, 3, 4, 5)
    return TrainingSet(images, torch.arange(n) % 2, ("a", "b"))


@pytest.mark.parametrize("n", [0, 1, 5000])
def test_any_number_of_examples(n: int) -> None:
    made = make(n)
    assert len(made) == n
    assert made.class_counts().tolist() == [(n + 1) // 2, n // 2]
    assert len(made.fingerprint) == 32
    mean, std = made.channel_statistics
    if n:
        pixels = made.images.double() / 255
        assert torch.allclose(torch.tensor(mean, dtype=torch.float64), pixels.mean((0, 2, 3)))
        assert torch.allclose(
            torch.tensor(std, dtype=torch.float64), pixels.std((0, 2, 3), correction=0), atol=1e-6
        )
    images, labels = made.batch(0, 2)
    assert images.dtype == torch.float32
    assert len(images) == len(labels) == min(n, 2)
    assert made.without(range(min(n, 1))).image_shape == (3, 4, 5)
    assert made.subset([]).fingerprint == make(0).fingerprint
    assert made.with_examples([], made.images[:0], made.labels[:0]).fingerprint == made.fingerprint


def test_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    made = make(7)
    strided = TrainingSet(
        made.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        torch.stack([made.labels, made.labels], 1)[:, 0],
        made.class_names,
        "another name",
    )
    assert not strided.images.is_contiguous()
    write_npz(tmp_path / "a.npz", strided, compress=False)
    mapped = read_npz(tmp_path / "a.npz", memory_map=True).train
    assert strided.fingerprint == mapped.fingerprint == made.fingerprint
    assert mapped.channel_statistics == made.channel_statistics
    for other in (
        made.subset([1, 0, 2, 3, 4, 5, 6]),
        made.with_examples([6], made.images[6:] + 1, made.labels[6:]),
        made.with_examples([6], made.images[6:], 1 - made.labels[6:]),
        TrainingSet(made.images, made.labels, ("a", "c")),
        TrainingSet(made.images.reshape(7, 3, 5, 4), made.labels, made.class_names),
    ):
        assert other.fingerprint != made.fingerprint


def test_changes_give_new_sets() -> None:
    made = make(4)
    before = made.images.clone()
    changed = made.with_examples([2], torch.zeros(1, 3, 4, 5, dtype=torch.uint8), torch.tensor([1]))
    assert changed.images[2].sum() == 0
    assert changed[2][1] == 1
    assert torch.equal(made.images, before)
    for indices in ([4], [-1]):
        with pytest.raises(InputError, match=r"outside 0\.\.3"):
            made.subset(indices)


def test_sets_follow_each_other_with_their_names() -> None:
    images, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    named = TrainingSet(images, labels, ("a", "b"), ids=("w", "x", "y", "z"))
    both = named.subset([3, 1]).followed_by(named.subset([0]))
    assert both.ids == ("z", "x", "w")
    assert both.labels.tolist() == [1, 1, 0]
    assert named.followed_by(TrainingSet(images, labels, ("a", "b"))).ids is None


def test_what_cannot_be_a_training_set_is_refused() -> None:
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    for arguments, message in (
        ((images.float(), labels, ("a", "b")), "uint8"),
        ((images, labels.int(), ("a", "b")), "int64"),
        ((images, labels[:1], ("a", "b")), "shape"),
        ((images, labels * 2, ("a", "b")), "row 1: label 2"),
        ((images, labels * 0, ("a",)), "two classes"),
    ):
        with pytest.raises(InputError, match=message):
            TrainingSet(*arguments)


def test_examples_are_chosen_by_indices_or_by_a_mask() -> None:
    made = make(5)
    mask = torch.tensor([False, True, True, False, True])
    for chosen in (mask, mask.tolist(), mask.numpy(), [1, 2, 4], torch.tensor([1, 2, 4], dtype=torch.uint8)):
        assert torch.equal(made.subset(chosen).images, made.images[[1, 2, 4]])
        assert torch.equal(made.without(chosen).images, made.images[[0, 3]])
        changed = made.with_examples(chosen, made.images[:3], made.labels[:3])
        assert torch.equal(changed.images[[1, 2, 4]], made.images[:3])
    assert made.indices(range(2)).tolist() == [0, 1]
    for wrong, message in (
        (mask[:4], r"a mask must be bool \[5\], found \(4,\)"),
        ([0.0, 1.0], "indices must be whole numbers, found torch.float32"),
    ):
        with pytest.raises(InputError, match=message):
            made.subset(wrong)


@pytest.mark.parametrize("names", [[0, 1], torch.arange(2), np.arange(2), (np.str_("0"), b"1"), range(2)])
def test_class_names_are_text_whatever_they_were(names: Any) -> None:
    made = make(4)
    named = TrainingSet(made.images, made.labels, names)
    assert named.class_names == ("0", "1")
    assert all(type(name) is str for name in named.class_names)
    assert named.fingerprint == TrainingSet(made.images, made.labels, ("0", "1")).fingerprint
    read = from_dataset([made[index] for index in range(4)], class_names=names)
    assert read.fingerprint == named.fingerprint


@pytest.mark.parametrize("names", [2, "ab", {"a": 0, "b": 1}, torch.tensor(2)])
def test_what_cannot_be_class_names_is_refused(names: Any) -> None:
    with pytest.raises(InputError, match="class names must be a list of text"):
        TrainingSet(make(2).images, make(2).labels, names)
