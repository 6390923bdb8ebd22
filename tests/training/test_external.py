from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unpoison.data import TrainingSet, read_folder
from unpoison.errors import InputError
from unpoison.training import ExternalTrainer

EXAMPLES = Path(__file__).parents[2] / "examples" / "black_boxes"


def make_set(n: int = 40) -> TrainingSet:
    """Class 1 is bright above, class 0 below."""
    images = torch.randint(0, 60, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % 2
    images[labels == 1, :, :4] += 150
    images[labels == 0, :, 4:] += 150
    return TrainingSet(images, labels, ("ankle boot", "T-shirt/top"))


def script(tmp_path: Path, body: str) -> ExternalTrainer:
    path = tmp_path / "train.py"
    path.write_text(
        f"import os, pathlib, sys, time\ntrain, query, out = map(pathlib.Path, sys.argv[1:])\n{body}\n"
    )
    return ExternalTrainer(command=(sys.executable, str(path)), timeout=30)


def test_the_command_sees_the_images_and_its_predictions_come_back(tmp_path: Path) -> None:
    body = f"""
import shutil
shutil.copytree(train, {str(tmp_path / "seen")!r})
names = sorted(path.name for path in train.iterdir())
(out / "predictions.csv").write_text("".join(
    f"{{path.name}},{{names[(number + int(os.environ['UNPOISON_SEED'])) % 2]}}\\n"
    for number, path in enumerate(sorted(query.iterdir()))
))"""
    clean = make_set()
    trainer = script(tmp_path, body)
    assert trainer.predictions(clean, clean.images[:3], seed=0).tolist() == [0, 1, 0]
    (tmp_path / "seen").rename(tmp_path / "first")
    assert trainer.predictions(clean, clean.images[:3], seed=1).tolist() == [1, 0, 1]
    seen = read_folder(tmp_path / "first").train
    assert seen.class_names == ("00-ankle-boot", "01-T-shirt-top")
    order = clean.labels.argsort(stable=True)
    assert torch.equal(seen.images, clean.images[order])


@pytest.mark.parametrize("name", ["scikit_learn.py", "onnx_export.py"])
def test_the_examples_learn(name: str) -> None:
    if name == "onnx_export.py":
        for needed in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(needed)
    clean = make_set()
    trainer = ExternalTrainer(command=(sys.executable, str(EXAMPLES / name)), timeout=60)
    found = trainer.predictions(clean, clean.images[:10], seed=0)
    assert found.tolist() == clean.labels[:10].tolist()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('no money left')", "failed with status 1: no money left"),
        ("pass", "wrote neither predictions.csv nor model.onnx"),
        (
            "(out / 'predictions.csv').write_text('000000.png,cat\\n')",
            "line 1 of predictions.csv is '000000.png,cat'",
        ),
        (
            "(out / 'predictions.csv').write_text('000000.png,00-ankle-boot\\n')",
            r"lacks 1 of 2 images, the first of them 000001\.png",
        ),
        ("(out / 'predictions.csv').write_text('000009.png,00-ankle-boot\\n')", "line 1"),
    ],
)
def test_what_a_command_does_wrong_is_said_in_one_line(tmp_path: Path, body: str, message: str) -> None:
    clean = make_set(4)
    with pytest.raises(InputError, match=message) as error:
        script(tmp_path, body).predictions(clean, clean.images[:2], seed=0)
    assert "\n" not in str(error.value)


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    clean = make_set(4)
    body = "(out / 'predictions.csv').write_text('000000.png,00-ankle-boot\\n')"
    script(tmp_path, body).predictions(
        clean,
        clean.images[:1],
        seed=0,
        progress=lambda stage, done, total, /, **_: seen.append((stage, done, total)),
    )
    assert seen == [("writing images", 4, 4), ("training", 1, 1)]


def test_a_command_that_is_not_there_or_takes_too_long(tmp_path: Path) -> None:
    clean = make_set(4)
    with pytest.raises(InputError, match="no-such-command: cannot be started"):
        ExternalTrainer(command=("no-such-command",)).predictions(clean, clean.images, seed=0)
    slow: Any = script(tmp_path, "time.sleep(60)")
    with pytest.raises(InputError, match=r"was stopped after 0\.5 seconds"):
        ExternalTrainer(command=slow.command, timeout=0.5).predictions(clean, clean.images, seed=0)
    with pytest.raises(InputError, match="the command is empty"):
        ExternalTrainer(command=())
    with pytest.raises(InputError, match="timeout must be a number above 0 or none, found 0"):
        ExternalTrainer(command=("x",), timeout=0)
