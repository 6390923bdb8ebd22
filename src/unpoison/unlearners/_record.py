"""`record_of`: the record of a healing in which nothing was trained."""

from __future__ import annotations

import time

import torch.nn.functional as F
from torch import nn

from unpoison.data import TrainingSet
from unpoison.training import EpochRecord, predict


def record_of(
    network: nn.Module, kept: TrainingSet, *, epoch: int, learning_rate: float, started: float
) -> EpochRecord:
    """Loss and accuracy of the network as it is now on the kept examples, which shows what a healing broke.

    Arguments:
        network: in eval mode.
        kept: read once.
        epoch: counted from 0.
        learning_rate: 0 where nothing was trained.
        started: `time.perf_counter()` when the healing began.
    """
    logits = predict(network, kept.images, batch_size=128)
    return EpochRecord(
        epoch=epoch,
        loss=float(F.cross_entropy(logits, kept.labels)),
        accuracy=int((logits.argmax(1) == kept.labels).sum()) / len(kept),
        learning_rate=learning_rate,
        examples=len(kept),
        seconds=time.perf_counter() - started,
    )
