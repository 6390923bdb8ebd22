"""The `Trainer` of Lightning.

recording = Recording(as_examples(train_set), defense="epic")
Trainer(callbacks=[recording]).fit(module, DataLoader(train_set, batch_size=64, shuffle=True))
recording.record.check(examples)
"""

from __future__ import annotations

from typing import Any, final

from unpoison.data import Examples
from unpoison.defenses import OwnLoop
from unpoison.errors import MissingExtraError
from unpoison.training import TrainingRecord

try:
    from lightning.pytorch import Callback
except ImportError:
    raise MissingExtraError("lightning is not installed; pip install lightning") from None


@final
class Recording(Callback):  # type: ignore[misc]
    """Takes down what a `Trainer` draws, and lets a defense drop examples while it trains.

    The module's `forward` gives logits. A loader with worker processes reads ahead before the first epoch
    begins; build it with `sampler=recording.loop.sampler(RandomSampler(dataset))` then.

    Arguments:
        examples: what the loader's dataset holds, in the same order.
        **options: of `OwnLoop`: `defense`, `task`, `seed`, `batch_size`.
    """

    def __init__(self, examples: Examples, **options: Any) -> None:
        self.loop = OwnLoop(examples, **options)

    @property
    def record(self) -> TrainingRecord:
        """What is known so far."""
        return self.loop.record

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Replace the loader's sampler."""
        self.loop.begin(trainer.train_dataloader, epochs=max(1, trainer.max_epochs or 1))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """A round of the defense, where there is one now."""
        self.loop.epoch(trainer.current_epoch, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take down the step, and the fingerprint in the checkpoint itself."""
        self.loop.checkpoint(trainer.global_step, trainer.default_root_dir)
        checkpoint["unpoison_fingerprint"] = self.loop.examples.fingerprint
