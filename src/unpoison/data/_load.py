"""`load`: one word or path, any of the formats."""

from __future__ import annotations

import os
from pathlib import Path

from unpoison.data._npz import read_npz
from unpoison.data._sample import sample
from unpoison.data._splits import Splits
from unpoison.errors import InputError


def load(spec: str | os.PathLike[str], *, test: str | os.PathLike[str] | None = None) -> Splits:
    """Read a data set of any known format.

    Arguments:
        spec: `sample` for the bundled set, or an `.npz` file.
        test: where the test set lies, in any of the formats, when `spec` does not hold it. All of its
            training examples are taken as test examples.
    """
    train = _load(spec)
    if test is None:
        return train
    return Splits(train.train, _load(test).train)


def _load(spec: str | os.PathLike[str]) -> Splits:
    if spec == "sample":
        return sample()
    path = Path(spec)
    if path.suffix.lower() == ".npz":
        return read_npz(path)
    raise InputError(f"{path}: not a format that can be read")
