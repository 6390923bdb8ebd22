"""`Shown`: examples, one at a time, as people look at them: a picture, a text, or the shape of an input.

Sets that are not held are read at the moment that an example is shown, one read at a time: a dataset of the
user's own need not be safe in several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

from torch import Tensor

from unpoison.data import DatasetExamples, Examples, Inputs, TrainingSet
from unpoison.detectors import Findings, Observation
from unpoison.report import plain

Words = Callable[[Sequence[int]], str]
"""The text of token ids."""
_LONGEST = 2_000


@final
@dataclass(frozen=True, eq=False)
class Named:
    """A training set of which findings are known, and the inputs are not.

    Arguments:
        name: what to call it.
        labels: Int64[n].
        class_names: one a class.
        ids: what people call the examples, where they have names.
        fingerprint: of the set.
    """

    name: str
    labels: Tensor
    class_names: tuple[str, ...]
    ids: Sequence[str] | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, findings: Findings) -> Named:
        """The set that the findings are about."""
        return cls(
            "findings without their data",
            findings.labels.cpu(),
            findings.class_names,
            findings.ids,
            findings.fingerprint,
        )


@final
class Shown:
    """Examples as people look at them.

    Arguments:
        examples: on any device.
        words: the text of token ids, where a tokenizer is known.
    """

    def __init__(self, examples: Examples | Named, words: Words | None = None) -> None:
        self.examples = examples.to("cpu") if isinstance(examples, TrainingSet) else examples
        self._words = words
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def kind(self) -> str:
        """ "picture", "text", or "none" for `Named` examples."""
        if isinstance(self.examples, Named) or not len(self):
            return "none"
        return "text" if self.picture(0) is None else "picture"

    def inputs(self, index: int) -> Inputs | None:
        """An example as the network is given it, with a first dimension of 1; None where there is none.

        Raises:
            InputError: it cannot be read any more.
        """
        if isinstance(self.examples, Named) or not 0 <= index < len(self):
            return None
        with self._guard:
            found: Inputs = self.examples.at([index])[0]
        return found

    def picture(self, index: int) -> Tensor | None:
        """UInt8[c h w]; None for an example that is no picture."""
        if isinstance(self.examples, TrainingSet):
            return self.examples.images[index] if 0 <= index < len(self) else None
        inputs = self.inputs(index)
        return None if inputs is None else picture_of(inputs)

    def text(self, index: int) -> str:
        """The text of an example: the words of its row, of its tokens, or what it is made of."""
        if isinstance(self.examples, DatasetExamples) and 0 <= index < len(self):
            source = self.examples.source
            with self._guard:
                row = source.row(int(self.examples.rows[index]))
            if isinstance(row, Mapping):
                parts = [
                    value
                    for key, value in row.items()
                    if isinstance(value, str) and key not in (source.label_part, source.id_part)
                ]
                if parts:
                    return plain("\n".join(parts), limit=_LONGEST)
        inputs = self.inputs(index)
        return "" if inputs is None else text_of(inputs, self._words)


def picture_of(inputs: Inputs) -> Tensor | None:
    """UInt8[c h w] of one input with a first dimension of 1, stretched where its values are not in [0, 1]."""
    if isinstance(inputs, Mapping) or inputs.ndim != 4:
        return None
    pictures = Observation(inputs, count=1).pictures
    return None if pictures is None else pictures[0]


def text_of(inputs: Inputs, words: Words | None) -> str:
    """One input with a first dimension of 1 as text: its tokens, or else what shapes it is made of."""
    tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if tokens is None or tokens.is_floating_point() or tokens.ndim != 2:
        parts = inputs.items() if isinstance(inputs, Mapping) else [("numbers", inputs)]
        return "; ".join(f"{plain(name)} {list(part.shape[1:])}" for name, part in parts)
    row = tokens[0]
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is not None and mask.shape == tokens.shape:
        row = row[mask[0].bool()]
    numbers = row.tolist()
    return plain(" ".join(map(str, numbers)) if words is None else words(numbers), limit=_LONGEST)
