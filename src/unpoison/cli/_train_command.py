"""`heal --train-command`: a training program of the user's own, run on what is kept."""

from __future__ import annotations

import csv
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from unpoison.errors import InputError
from unpoison.models import Normalized, load_weights
from unpoison.training import run_command
from unpoison.unlearners import OwnTraining


def training_by(
    command: str, build: Callable[[], nn.Module] | None, ids: Sequence[str] | None, *, seed: int
) -> OwnTraining:
    """A function for `workflow.heal(retrain=...)` that runs the command.

    It is run as `COMMAND KEPT.csv WEIGHTS.safetensors`, without a shell. KEPT.csv has a row for each example
    to keep: its index in the training set and its name (a file or key, empty where there is none), under the
    header `index,name`. The command writes the trained weights to WEIGHTS.safetensors.

    Raises:
        InputError: the command is empty or has an open quotation, or no function builds the network.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--train-command {command}: cannot be split into words ({error})") from None
    if not words:
        raise InputError("--train-command: is empty; give a program and its arguments")
    if build is None:
        raise InputError(
            "--train-command: the weights are loaded into a network that is built anew, so --model must be "
            "timm:NAME, torchvision:NAME, transformers:FOLDER or package.module:factory"
        )

    def retrain(kept: list[int], subset: Any) -> nn.Module:
        with tempfile.TemporaryDirectory(prefix="unpoison-") as folder:
            listed, weights = Path(folder) / "kept.csv", Path(folder) / "weights.safetensors"
            with listed.open("w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow(("index", "name"))
                rows.writerows((index, "" if ids is None else ids[index]) for index in kept)
            run_command([*words, str(listed), str(weights)], seed=seed)
            if not weights.is_file():
                raise InputError(f"--train-command {words[0]}: wrote no weights to its last argument")
            network = build()
            inner = network.network if isinstance(network, Normalized) else network
            load_weights(inner, weights, where=f"--train-command {words[0]}: its weights")
        return network

    return retrain
