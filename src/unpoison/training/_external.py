"""`ExternalTrainer`: a trainer of which only a command is known, as a service in a cloud would be.

The command is given a folder of images, trains whatever it likes, and leaves a model or predictions; nothing
else of it is known. So poisons can be tried on learners that are not ours, such as a random forest.

    COMMAND TRAIN ASK OUT

- TRAIN holds one folder a class, `00-cat/000123.png`, numbered as the examples are;
- ASK holds the images to be predicted, `000000.png` and so on;
- into OUT the command writes `predictions.csv`, one line an image: its file name, a comma, a class folder's
  name; or `model.onnx`, which takes Float[b c h w] images in [0, 1] and gives logits Float[b classes] in the
  order of the class folders (onnxruntime has to be installed to ask it).

`UNPOISON_SEED` in its environment is the seed, for those that use one. What it prints is kept from the
screen, and its last line is told when it fails.
"""

from __future__ import annotations

import csv
import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from unpoison.data import TrainingSet, encode_png
from unpoison.errors import InputError, MissingExtraError


@final
@dataclass(frozen=True, kw_only=True)
class ExternalTrainer:
    """Trains by a command.

    Arguments:
        command: the program and its first arguments; it is started without a shell.
        timeout: the seconds after which it is stopped; None waits for as long as it takes.

    Raises:
        InputError: the command is empty.
    """

    command: tuple[str, ...]
    timeout: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "command", tuple(self.command))
        if not self.command:
            raise InputError("ExternalTrainer: the command is empty")

    def predictions(self, training_set: TrainingSet, images: Tensor, *, seed: int) -> Tensor:
        """Int64[m]: the labels that the command's model gives to UInt8[m c h w] `images`.

        Cost: one PNG file an example, in a temporary directory, and whatever the command takes.

        Raises:
            InputError: the command cannot be started, fails, takes too long, or leaves something else than
                what was asked of it.
            MissingExtraError: it left an ONNX model and onnxruntime is not installed.
        """
        with tempfile.TemporaryDirectory(prefix="unpoison-") as directory:
            train, ask, out = (Path(directory) / name for name in ("train", "ask", "out"))
            folders = _class_folders(training_set.class_names)
            for folder in folders:
                (train / folder).mkdir(parents=True)
            ask.mkdir()
            out.mkdir()
            for index, (image, label) in enumerate(
                zip(training_set.images.cpu(), training_set.labels.tolist(), strict=True)
            ):
                (train / folders[label] / f"{index:06d}.png").write_bytes(encode_png(image, compress_level=1))
            for index, image in enumerate(images.cpu()):
                (ask / f"{index:06d}.png").write_bytes(encode_png(image, compress_level=1))
            self._run([str(train), str(ask), str(out)], seed)
            if (out / "predictions.csv").exists():
                return self._read(out / "predictions.csv", folders, len(images))
            if (out / "model.onnx").exists():
                return self._ask(out / "model.onnx", images)
        raise InputError(
            f"{self.command[0]}: wrote neither predictions.csv nor model.onnx into its last argument"
        )

    def _run(self, arguments: Sequence[str], seed: int) -> None:
        name = self.command[0]
        try:
            result = subprocess.run(
                [*self.command, *arguments],
                env={**os.environ, "UNPOISON_SEED": str(seed)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
                check=False,
            )
        except OSError as error:
            raise InputError(f"{name}: cannot be started ({error.strerror or error})") from None
        except subprocess.TimeoutExpired:
            raise InputError(f"{name}: was stopped after {self.timeout:g} seconds; raise timeout") from None
        if result.returncode:
            lines = (result.stderr.strip() or result.stdout.strip() or "it printed nothing").splitlines()
            raise InputError(f"{name}: failed with status {result.returncode}: {lines[-1].strip()}")

    def _read(self, path: Path, folders: Sequence[str], count: int) -> Tensor:
        name, label_of = self.command[0], {folder: label for label, folder in enumerate(folders)}
        predicted = [-1] * count
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for number, row in enumerate(csv.reader(file), 1):
                match = re.fullmatch(r"(\d{6,})\.png", row[0].strip()) if len(row) == 2 else None
                if match is None or int(match[1]) >= count or row[1].strip() not in label_of:
                    raise InputError(
                        f"{name}: line {number} of predictions.csv is {','.join(row)!r}; "
                        f"expected a file of the images asked about, a comma and a class folder's name"
                    )
                predicted[int(match[1])] = label_of[row[1].strip()]
        if -1 in predicted:
            raise InputError(
                f"{name}: predictions.csv says nothing of {predicted.index(-1):06d}.png and in all of "
                f"{predicted.count(-1)} of {count} images"
            )
        return torch.tensor(predicted, dtype=torch.int64)

    def _ask(self, path: Path, images: Tensor) -> Tensor:
        try:
            onnxruntime: Any = importlib.import_module("onnxruntime")
        except ImportError:
            raise MissingExtraError(
                f"{self.command[0]}: left an ONNX model; pip install 'unpoison[onnx]' to run it"
            ) from None
        try:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            inputs = images.cpu().float().div(255).numpy()
            logits = np.asarray(session.run(None, {session.get_inputs()[0].name: inputs})[0])
        except Exception as error:  # onnxruntime has no class of its own for what a model can do wrong
            words = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise InputError(f"{self.command[0]}: its model.onnx cannot be asked ({words})") from None
        if logits.ndim != 2 or len(logits) != len(images):
            raise InputError(
                f"{self.command[0]}: its model.onnx gave shape {logits.shape} for {len(images)} images; "
                "expected one row of logits each"
            )
        return torch.from_numpy(logits).argmax(1)


def _class_folders(names: Sequence[str]) -> list[str]:
    """A folder's name for each class, sorted as the classes are, safe on every file system."""
    width = len(str(len(names) - 1))
    return [
        f"{label:0{max(width, 2)}d}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}"
        for label, name in enumerate(names)
    ]
