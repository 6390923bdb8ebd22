"""Datasets and the `Trainer` of Hugging Face.

examples = from_hf(dataset["train"])
recording = Recording(examples, defense="epic")
Trainer(model, args, train_dataset=dataset["train"], callbacks=[recording]).train()
findings = unpoison.trace(model, recording.checked(examples), observation)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

from unpoison.data import DatasetExamples, Examples
from unpoison.defenses import OwnLoop
from unpoison.errors import InputError, MissingExtraError
from unpoison.training import TrainingRecord

try:
    from transformers import TrainerCallback
except ImportError:
    raise MissingExtraError("transformers is not installed; pip install transformers") from None

_FOLDER: Final = "unpoison"


def from_hf(dataset: Any, **options: Any) -> DatasetExamples:
    """The examples of a `datasets.Dataset`, with its own transforms, which must not be random.

    Arguments:
        dataset: one split; columns `pixel_values`, `image`, `input_ids` and so on are found, and `label`.
        **options: of `DatasetExamples`, such as `collate_fn` for texts of different lengths.

    Raises:
        InputError: it is a dict of splits or a stream, or as `DatasetExamples`.
    """
    if isinstance(dataset, Mapping):
        raise InputError(f"from_hf: a dict of splits ({', '.join(map(str, dataset))}); give one of them")
    if not hasattr(dataset, "__len__"):
        raise InputError("from_hf: a stream has no order and no indices; give a map-style dataset")
    return DatasetExamples(dataset, **options)


@final
class Recording(TrainerCallback):  # type: ignore[misc]
    """Takes down what a `Trainer` draws, and lets a defense drop examples while it trains.

    The record is in `record`, and beside every checkpoint in `checkpoint-N/unpoison`, from where a resumed
    training goes on. An epoch is shorter where examples were dropped, so fewer steps are done than planned.

    Arguments:
        examples: what `train_dataset` holds, in the same order: `from_hf(train_dataset)`.
        **options: of `OwnLoop`: `defense`, `task`, `seed`, `batch_size`.
    """

    def __init__(self, examples: Examples, **options: Any) -> None:
        self.loop = OwnLoop(examples, **options)
        self._epoch = 0

    @property
    def record(self) -> TrainingRecord:
        """What is known so far."""
        return self.loop.record

    def checked(self, examples: Examples) -> Examples:
        """The same examples, if they are those that were trained on.

        Raises:
            MismatchError: they are not.
        """
        self.record.check(examples)
        return examples

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Replace the loader's sampler; go on from the record of the checkpoint that is resumed."""
        place = Path(args.output_dir, f"checkpoint-{state.global_step}", _FOLDER)
        earlier = TrainingRecord.load(place) if state.global_step and place.is_dir() else None
        self._epoch = int(state.epoch or 0) if earlier is None else len(earlier.order)
        epochs = math.ceil(state.num_train_epochs or args.num_train_epochs)
        self.loop.begin(given["train_dataloader"], epochs=epochs, earlier=earlier)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A round of the defense, where there is one now."""
        self.loop.epoch(self._epoch, given["model"])
        self._epoch += 1

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Keep the record beside the checkpoint."""
        place = Path(args.output_dir, f"checkpoint-{state.global_step}")
        self.loop.checkpoint(state.global_step, place)
        if place.is_dir():
            self.record.save(place / _FOLDER)
