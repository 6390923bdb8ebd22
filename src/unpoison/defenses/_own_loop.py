"""`OwnLoop`: a training loop of one's own that is taken down, and defended by dropping examples.

Defenses that drop examples need the logits of all examples between epochs, and a say in which are drawn; both
can be had in any loop that draws its batches from a `DataLoader`. The other defenses work within a step, and
need `unpoison.train`. One process; the order is that of the process.
"""

from __future__ import annotations

import os
from typing import Any, final

import torch
from torch import nn

from unpoison.data import Examples
from unpoison.defenses._dropping import DroppingDefense
from unpoison.defenses._methods import METHODS
from unpoison.errors import InputError, MismatchError
from unpoison.tasks import ClassificationTask
from unpoison.training import Recipe, RecordingSampler, TrainingRecord, predict_examples


@final
class OwnLoop:
    """Takes a training loop down, and lets a defense drop examples from it.

    Call `begin` with the loader before the first epoch, `epoch` before every epoch, and `checkpoint` after a
    checkpoint was written; `record` is what is known so far.

    Arguments:
        examples: what the loader's dataset holds, in the same order, without random transforms.
        defense: the name of a defense that drops examples, or an instance; None to take down alone.
        task: where the logits are in what the network returns, where that is not clear.
        seed: of the defense.
        batch_size: examples of a forward pass, for the logits of a round.

    Raises:
        InputError: the defense does not drop examples.

    Cost: for each round of the defense, a forward pass over the set.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        defense: str | DroppingDefense | None = None,
        task: ClassificationTask | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        chosen: Any = METHODS.get(defense) if isinstance(defense, str) else defense
        if chosen is not None and not isinstance(chosen, DroppingDefense):
            dropping = [name for name in METHODS.names() if METHODS.describe(name).drops_examples]
            raise InputError(
                f"{chosen!r}: works within a training step, which only unpoison.train gives it; a loop of "
                f"your own is defended by {', '.join(dropping)}"
            )
        self.examples, self.defense = examples, chosen
        self.task = ClassificationTask() if task is None else task
        self.seed, self.batch_size = seed, batch_size
        self._sampler: RecordingSampler | None = None
        self._earlier: TrainingRecord | None = None
        self._checkpoints: list[tuple[int, str]] = []

    def sampler(self, sampler: Any) -> RecordingSampler:
        """Another sampler, for a loader that is yet to be built."""
        self._sampler = RecordingSampler(sampler)
        return self._sampler

    def begin(self, loader: Any, *, epochs: int, earlier: TrainingRecord | None = None) -> None:
        """Start, with the loader of the training.

        Arguments:
            loader: a `torch.utils.data.DataLoader` (or what wraps one) of the examples; its sampler is
                replaced by one that takes down what it draws.
            epochs: how many there will be, which the schedule of a defense depends on.
            earlier: the record up to here of a training that is resumed.

        Raises:
            InputError: the loader draws no indices.
            MismatchError: its dataset has another length than the examples, or the earlier record is of
                another set.
        """
        batches: Any = getattr(loader, "batch_sampler", None)
        while hasattr(batches, "batch_sampler"):  # the shards of accelerate
            batches = batches.batch_sampler
        inner = getattr(batches, "sampler", None)
        if batches is None or inner is None:
            raise InputError(
                f"{type(loader).__name__}: draws its batches without a sampler of indices; give a DataLoader "
                "of a map-style dataset"
            )
        count = len(loader.dataset)
        if count != len(self.examples):
            raise MismatchError(
                f"{self.examples.name}: has {len(self.examples)} examples, the loader has {count}; give "
                "the very set that is trained on"
            )
        if inner is not self._sampler:  # that of an earlier training would go on dropping and taking down
            batches.sampler = self.sampler(inner.sampler if isinstance(inner, RecordingSampler) else inner)
        if self.defense is not None:
            whole: Any = self.examples  # those that drop examples do not read it here
            self.defense.begin(whole, Recipe(epochs=max(1, epochs), schedule="cosine"), seed=self.seed)
        if earlier is not None:
            earlier.check(self.examples)
            self._earlier, self._checkpoints = earlier, list(earlier.checkpoints)
            self._sampler_of_run().keep = ~earlier.dropped
            if self.defense is not None:
                self.defense.restore(earlier.state)

    def epoch(self, epoch: int, model: nn.Module) -> None:
        """Before an epoch, counted from 0: a round of the defense, where there is one now.

        Raises:
            InputError: the model fails on the examples, or its logits are not finite.
        """
        if self.defense is None or not self.defense.is_round(epoch):
            return
        logits = predict_examples(self.task.adapted(model), self.examples, batch_size=self.batch_size)
        keep = self.defense.select(epoch, logits, self.examples.labels)
        self._sampler_of_run().keep = keep.cpu()

    def checkpoint(self, step: int, place: str | os.PathLike[str]) -> None:
        """After an optimizer step, a checkpoint of the model was written."""
        self._checkpoints.append((step, os.fspath(place)))

    @property
    def record(self) -> TrainingRecord:
        """What is known so far."""
        sampler = self._sampler_of_run()
        earlier = () if self._earlier is None else self._earlier.order
        drawn = tuple(torch.tensor(one, dtype=torch.int64) for one in sampler.epochs)
        nothing = torch.zeros(len(self.examples), dtype=torch.bool)
        return TrainingRecord(
            fingerprint=self.examples.fingerprint,
            order=(*earlier, *drawn),
            dropped=nothing if sampler.keep is None else ~sampler.keep,
            defense=None if self.defense is None else repr(self.defense),
            checkpoints=tuple(self._checkpoints),
            state={} if self.defense is None else self.defense.state(),
        )

    def _sampler_of_run(self) -> RecordingSampler:
        if self._sampler is None:
            raise InputError("OwnLoop: has not begun; call begin with the loader first")
        return self._sampler
