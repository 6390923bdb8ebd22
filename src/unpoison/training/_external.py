"""`ExternalTrainer`: a trainer that is a command, such as a cloud service or a random forest.

The command is given a folder of images, trains, and writes a model or predictions.

    COMMAND TRAIN QUERY OUT

- TRAIN holds one folder a class, `00-cat/000123.png`, numbered by the indices of the examples;
- QUERY holds the images to be predicted, `000000.png` and so on;
- into OUT the command writes `predictions.csv`, one line an image: its file name, a comma, the name of a
  class folder; or `model.onnx`, which takes Float[b c h w] images in [0, 1] and returns logits Float[b
  classes] in the order of the class folders (this needs onnxruntime).

`UNPOISON_SEED` in its environment is the seed. Its output is captured; an error message quotes the last line.
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

from unpoison._option_checks import CheckedOptions, PositiveFloat
from unpoison._progress import Progress
from unpoison.data import TrainingSet, encode_png
from unpoison.errors import InputError, MissingExtraError


@final
@dataclass(frozen=True, kw_only=True)
class ExternalTrainer(CheckedOptions):
    """Trains by a command.

    Arguments:
        command: the program and its first arguments; it is run without a shell.
        timeout: seconds after which it is stopped; None is no limit.

    Raises:
        InputError: the command is empty, or the timeout is not above 0.
    """

    command: tuple[str, ...]
    timeout: PositiveFloat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.command:
            raise InputError("ExternalTrainer: the command is empty")

    def predictions(
        self, training_set: TrainingSet, images: Tensor, *, seed: int, progress: Progress | None = None
    ) -> Tensor:
        """Int64[m]: the labels that the command's model predicts for UInt8[m c h w] `images`.

        Cost: one PNG file an example, in a temporary directory, and the command's own.

        Arguments:
            training_set: what the command trains on.
            images: what it predicts.
            seed: is passed on to the command.
            progress: called with the stage "writing images", and "training" when the command has ended.

        Raises:
            InputError: the command cannot be started, fails, takes too long, or does not write what is
                described above.
            MissingExtraError: it wrote an ONNX model and onnxruntime is not installed.
        """
        with tempfile.TemporaryDirectory(prefix="unpoison-") as directory:
            train, query, out = (Path(directory) / name for name in ("train", "query", "out"))
            folders = _class_folders(training_set.class_names)
            for folder in (*(train / name for name in folders), query, out):
                folder.mkdir(parents=True)
            places = [train / folders[label] for label in training_set.labels.tolist()]
            _write_images(training_set.images, places, progress)
            _write_images(images, [query] * len(images), None)
            self._run([str(train), str(query), str(out)], seed)
            if progress is not None:
                progress("training", 1, 1)
            if (out / "predictions.csv").exists():
                return self._read(out / "predictions.csv", folders, len(images))
            if (out / "model.onnx").exists():
                return self._predict(out / "model.onnx", images)
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
                        "expected the file name of a query, a comma and the name of a class folder"
                    )
                predicted[int(match[1])] = label_of[row[1].strip()]
        if -1 in predicted:
            raise InputError(
                f"{name}: predictions.csv lacks {predicted.count(-1)} of {count} images, the first of them "
                f"{predicted.index(-1):06d}.png"
            )
        return torch.tensor(predicted, dtype=torch.int64)

    def _predict(self, path: Path, images: Tensor) -> Tensor:
        try:
            onnxruntime: Any = importlib.import_module("onnxruntime")
        except ImportError:
            raise MissingExtraError(
                f"{self.command[0]}: wrote an ONNX model, which needs onnxruntime: pip install onnxruntime"
            ) from None
        try:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            inputs = images.cpu().float().div(255).numpy()
            logits = np.asarray(session.run(None, {session.get_inputs()[0].name: inputs})[0])
        except Exception as error:  # onnxruntime has no common class of errors
            words = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise InputError(f"{self.command[0]}: its model.onnx cannot be run ({words})") from None
        if logits.ndim != 2 or len(logits) != len(images):
            raise InputError(
                f"{self.command[0]}: its model.onnx gave shape {logits.shape} for {len(images)} images; "
                "expected one row of logits each"
            )
        return torch.from_numpy(logits).argmax(1)


def _class_folders(names: Sequence[str]) -> list[str]:
    """A folder name for each class, sorted like the classes, valid on every file system."""
    width = len(str(len(names) - 1))
    return [
        f"{label:0{max(width, 2)}d}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}"
        for label, name in enumerate(names)
    ]


def _write_images(images: Tensor, folders: Sequence[Path], progress: Progress | None) -> None:
    """Write each image into its folder, named by its index."""
    for index, (image, folder) in enumerate(zip(images.cpu(), folders, strict=True)):
        (folder / f"{index:06d}.png").write_bytes(encode_png(image, compress_level=1))
        if progress is not None and ((index + 1) % 1000 == 0 or index + 1 == len(images)):
            progress("writing images", index + 1, len(images))
