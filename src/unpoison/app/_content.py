"""What is shown of examples, of any kind: pictures, texts, the columns of the map, the nearest example.

The kinds are "train", those of the input sets ("test", "triggered"), "upload", and of a search "suspect" and
"difference".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from unpoison.app._shown import picture_of, text_of
from unpoison.data import Inputs, TrainingSet
from unpoison.errors import InputError
from unpoison.report import difference_image, nearest_example

if TYPE_CHECKING:
    from unpoison.app._work import Work


def is_pictured(work: Work, kind: str) -> bool:
    """Whether examples of a kind are pictures; their texts are shown where they are not."""
    given = work.input_set(kind)
    return (work.shown if given is None else given.shown).kind == "picture" or kind == "upload"


def picture_for(work: Work, kind: str, number: int, search: str = "") -> Tensor | None:
    """UInt8[c h w]: a training image, an input, a suspect, or a suspect minus a training image.

    Raises:
        InputError: it cannot be read any more.
    """
    if kind == "train":
        return work.shown.picture(number)
    if kind == "upload":
        return picture_of(work.uploads[number].inputs) if 0 <= number < len(work.uploads) else None
    if kind in ("suspect", "difference"):
        suspect = _suspect(work, search)
        if kind == "suspect" or suspect is None:
            return None if suspect is None else picture_of(suspect)
        other = work.shown.inputs(number)
        both = isinstance(suspect, Tensor) and isinstance(other, Tensor) and suspect.ndim == 4
        return difference_image(suspect[0], other[0]) if both else None  # type: ignore[index]
    given = work.input_set(kind)
    return None if given is None else given.shown.picture(number)


def text_for(work: Work, kind: str, number: int, search: str = "") -> str:
    """What is shown of an example that is no picture; why, where it cannot be read."""
    try:
        if kind == "suspect":
            suspect = _suspect(work, search)
            return "" if suspect is None else text_of(suspect, work.case.words)
        given = work.input_set(kind)
        return (work.shown if given is None else given.shown).text(number)
    except InputError as error:
        return str(error)


def column_for(work: Work, name: str, search: str = "") -> bytes | None:
    """A column of the map, as bytes.

    "plane" is Float32[n 2], "label" UInt16[n], "score" Float32[n] and "decision" UInt8[n]; None for a
    column that is not there (yet).
    """
    if name == "plane":
        rows = work.features.rows
        return None if rows is None else rows[:, :2].contiguous().numpy().tobytes()
    if name == "label":
        return work.labels.astype(np.uint16).tobytes()
    if name == "decision":
        return work.decisions.codes.tobytes()
    found = work.search_named(search) if name == "score" else None
    return None if found is None else found.data.scores.astype(np.float32).tobytes()


def can_compare(work: Work) -> bool:
    """Whether the nearest examples are known."""
    return isinstance(work.training_set, TrainingSet) or work.features.rows is not None


def nearest_to(work: Work, index: int, search: str) -> tuple[int, str] | None:
    """The nearest example that is neither flagged nor blamed now, and by what it is nearest."""
    excluded = work.decisions.codes == 1
    found = work.search_named(search)
    if found is not None:
        excluded = excluded | found.data.is_flagged
    if isinstance(work.shown.examples, TrainingSet):
        nearest, by = nearest_example(work.shown.examples.images, index, excluded), "image"
    elif work.features.rows is not None:
        nearest, by = nearest_example(work.features.rows, index, excluded), work.features.kind
    else:
        return None
    return None if nearest is None else (nearest, by)


def _suspect(work: Work, search: str) -> Inputs | None:
    """The first of the inputs that were traced, with a first dimension of 1."""
    found = work.search_named(search)
    seen = None if found is None else found.findings.observation
    if seen is None or not len(seen):
        return None
    return (
        seen.inputs[:1]
        if isinstance(seen.inputs, Tensor)
        else {name: part[:1] for name, part in seen.inputs.items()}
    )
