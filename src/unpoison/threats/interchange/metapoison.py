"""`poisondataset-60.pkl` of MetaPoison (Huang et al. 2020, arXiv 2004.00225).

A dict of arrays: the whole poisoned training set as floats, sorted by class, the target and the test set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unpoison.data import TrainingSet, read_pickle, write_pickle
from unpoison.errors import InputError, MismatchError
from unpoison.threats._given_images import TargetedMisclassification
from unpoison.threats._poison_set import PoisonSet
from unpoison.threats.interchange.common import imported


def read_metapoison(
    file: str | os.PathLike[str],
    training_set: TrainingSet,
    *,
    eps: float | None = None,
    attack: str = "metapoison",
) -> PoisonSet:
    """Read MetaPoison's dict of arrays.

    The file contains a whole training set in its own order. Rows that equal an example of `training_set` are
    not poison; each other row is the poison of the nearest example of its class that no row equals, each
    example used once. Costs one pass over both sets, and the square of the number of poisons.

    Arguments:
        file: `poisondataset-60.pkl`; read without running anything, numpy arrays only.
        training_set: the clean set, in any order.
        eps: the greatest change that was allowed, in 1/255. MetaPoison also recolours, which exceeds its
            additive 8/255.
        attack: what to call the attack.

    Raises:
        InputError: the file is damaged, lacks an entry, or contains anything but arrays.
        MismatchError: it belongs to another training set.
    """
    where = str(file)
    content = read_pickle(file)
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: must hold a mapping, found {type(content).__name__}")
    rows = _eight_bit(where, "xtrain", content, training_set)
    labels = _labels(where, "ytrain", content)
    if len(rows) != len(training_set) or len(labels) != len(rows):
        raise MismatchError(
            f"{where}: has {len(rows)} examples and {len(labels)} labels, {training_set.name} has "
            f"{len(training_set)} examples"
        )
    clean = training_set.to("cpu")
    places: dict[tuple[bytes, int], list[int]] = {}
    for index, (image, label) in enumerate(zip(clean.images.numpy(), clean.labels.tolist(), strict=True)):
        places.setdefault((image.tobytes(), label), []).append(index)
    unknown = []
    for row, (image, label) in enumerate(zip(rows.numpy(), labels.tolist(), strict=True)):
        free = places.get((image.tobytes(), label))
        if free:
            free.pop()
        else:
            unknown.append(row)
    unclaimed = torch.tensor(sorted(index for free in places.values() for index in free), dtype=torch.int64)
    if len(unknown) > len(rows) // 2:
        raise MismatchError(
            f"{where}: {len(unknown)} of {len(rows)} examples are not in {training_set.name}; give the set "
            f"that it was made from"
        )
    indices = _nearest(rows[unknown], labels[unknown], clean, unclaimed, where)
    targets = _eight_bit(where, "xtarget", content, training_set)
    true, wanted = (sorted(set(_labels(where, key, content).tolist())) for key in ("ytarget", "ytargetadv"))
    if len(true) != 1 or len(wanted) != 1:
        raise InputError(
            f"{where}: ytarget and ytargetadv must name one class each, found {true} and {wanted}"
        )
    goal = TargetedMisclassification(targets, true[0], wanted[0])
    return imported(
        where,
        training_set,
        indices=indices,
        images=rows[unknown],
        labels=labels[unknown].tolist(),
        goal=goal,
        attack=attack,
        format="metapoison",
        eps=eps,
    )


def write_metapoison(
    file: str | os.PathLike[str], poison: PoisonSet, training_set: TrainingSet, test_set: TrainingSet
) -> None:
    """Write MetaPoison's dict of arrays: Float32[n h w c] in 0..255, sorted by class, poisons first.

    Raises:
        InputError: the goal is no targeted misclassification, or the file cannot be written.
        MismatchError: the poison belongs to another training set.
    """
    if not isinstance(poison.goal, TargetedMisclassification):
        raise InputError(
            f"{file}: the format contains target images, so it cannot express a {poison.goal.kind!r}"
        )
    poisoned = poison.apply(training_set).to("cpu")
    # A stable sort by class, with the poisons before the rest.
    key = poisoned.labels * 2 + (~poison.membership(len(poisoned))).long()
    order = key.argsort(stable=True)
    test = test_set.to("cpu")
    write_pickle(
        file,
        {
            "xtrain": _floats(poisoned.images[order]),
            "ytrain": poisoned.labels[order].numpy(),
            "xtarget": _floats(poison.goal.images),
            "ytarget": np.full(len(poison.goal.images), poison.goal.true_label),
            "ytargetadv": np.full(len(poison.goal.images), poison.goal.target),
            "xvalid": _floats(test.images),
            "yvalid": test.labels.numpy(),
        },
    )


def _floats(images: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = images.permute(0, 2, 3, 1).contiguous().float().numpy()
    return array


def _array(where: str, key: str, content: Mapping[Any, Any]) -> NDArray[Any]:
    for spelling in (key, key.encode()):
        if spelling in content:
            array = np.asarray(content[spelling])
            if array.dtype.kind in "iuf" and np.isfinite(array).all():
                return array
            raise InputError(f"{where}: {key}: must be an array of finite numbers")
    raise InputError(f"{where}: lacks the entry {key!r}")


def _labels(where: str, key: str, content: Mapping[Any, Any]) -> Tensor:
    array = np.atleast_1d(_array(where, key, content))
    if array.ndim != 1 or (array != np.rint(array)).any() or (len(array) and array.min() < 0):
        raise InputError(f"{where}: {key}: must be class numbers")
    return torch.from_numpy(array.astype(np.int64))


def _eight_bit(where: str, key: str, content: Mapping[Any, Any], training_set: TrainingSet) -> Tensor:
    """An entry of images as UInt8[n c h w]; floats are in 0..255, or in 0..1 if none is above 1."""
    array = _array(where, key, content)
    channels, height, width = training_set.image_shape
    if array.ndim == 3:
        array = array[None]
    if array.shape[1:] == (height, width, channels):
        array = array.transpose(0, 3, 1, 2)
    if array.shape[1:] != (channels, height, width) or not len(array):
        raise InputError(
            f"{where}: {key}: has shape {array.shape}, the images of {training_set.name} are "
            f"{training_set.image_shape}"
        )
    scale = 255 if array.dtype.kind == "f" and array.max() <= 1 else 1
    pixels = np.empty(array.shape, np.uint8)
    for start in range(0, len(array), 4096):
        part = array[start : start + 4096]
        pixels[start : start + 4096] = np.rint(part * scale).clip(0, 255)
    return torch.from_numpy(pixels)


def _nearest(images: Tensor, labels: Tensor, clean: TrainingSet, unclaimed: Tensor, where: str) -> list[int]:
    """For each image the place of the nearest unclaimed example of its class, each taken once."""
    left = set(unclaimed.tolist())
    chosen = []
    for image, label in zip(images, labels.tolist(), strict=True):
        free = torch.tensor(sorted(index for index in left if int(clean.labels[index]) == label))
        if not len(free):
            raise MismatchError(f"{where}: has more examples of class {label} than {clean.name}")
        change = (clean.images[free].float() - image.float()).flatten(1).norm(dim=1)
        index = int(free[change.argmin()])
        left.remove(index)
        chosen.append(index)
    return chosen
