"""Sets that are read batch by batch from the command: transforms, datasets of one's own, caches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unpoison.cli import main
from unpoison.detectors import Findings

MODULE = """
import numpy as np
import torch
from torch import nn
from unpoison.data import DatasetExamples


def signed(picture):
    assert picture.mode == "RGB"
    pixels = np.array(picture.resize((8, 8)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def network():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))


class Rows:
    classes = ["a", "b", "c"]

    def __init__(self, count, seed):
        randomness = torch.Generator().manual_seed(seed)
        self.targets = [row % 3 for row in range(count)]
        self.inputs = torch.randn(count, 3, 8, 8, generator=randomness)
        self.inputs += torch.tensor(self.targets)[:, None, None, None]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.inputs[index], self.targets[index]


def train():
    return Rows(30, 0)


def both():
    return Rows(30, 0), Rows(9, 1)


def pictures():
    images = (Rows(30, 0).inputs * 40 + 80).clamp(0, 255).to(torch.uint8)
    return [(image, row % 3) for row, image in enumerate(images)]


def tokens():
    rows = [{"input_ids": torch.arange(1, 4 + row % 2), "label": row % 3} for row in range(30)]

    def padded(rows):
        words = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
        return {"input_ids": words, "label": [row["label"] for row in rows]}

    return tuple(DatasetExamples(rows, collate_fn=padded) for _ in range(2))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, input_ids):
        return self.head(self.words(input_ids).mean(1))


def broken():
    raise OSError("no disk")


def nothing():
    return None


def whole():
    return 5


def failing(picture):
    raise ValueError("not this one")


constant = 5
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with photos/ of many sizes, the module ownreading and its weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ownreading.py").write_text(MODULE)
    for row in range(31):
        draws = np.random.default_rng(row)
        pixels = draws.integers(0, 120, (14 + row % 5, 12 + row % 7, 3)) + 60 * (row % 3)
        place = (
            tmp_path / ("photos" if row < 30 else "") / ("abc"[row % 3] if row < 30 else "") / f"{row:02}.png"
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place)
    randomness = torch.Generator().manual_seed(3)
    weights = {
        "0.weight": torch.randn(6, 3, 3, 3, generator=randomness) / 5,
        "0.bias": torch.zeros(6),
        "3.weight": torch.randn(3, 216, generator=randomness) / 15,
        "3.bias": torch.zeros(3),
    }
    save_file(weights, tmp_path / "w.safetensors")
    return tmp_path


MODEL = ("--model", "ownreading:network", "--weights", "w.safetensors")
SIGNED = ("--data", "photos", "--transform", "ownreading:signed", "--workers", "0")


def run(verb: str, out: str, *more: str) -> dict[str, Any]:
    assert main([verb, *MODEL, *more, "--out", out]) == 0
    results: dict[str, Any] = json.loads(Path(out, "run.json").read_text())["results"]
    return results


TRACED = ("--method", "ek-fac", "--suspect", "30.png")


def test_photographs_are_traced_and_healed_through_a_transform(here: Path, capsys: Any) -> None:
    traced = run("trace", "found", *SIGNED, *TRACED, "--held-share", "0")
    assert traced["flagged_ids"]
    assert all((here / "photos" / name).is_file() for name in traced["flagged_ids"])
    assert traced["fingerprint_of"] == "files"
    assert traced["fingerprint"].startswith("files:")
    assert traced["reading"]["rows"] > 60
    assert any("ownreading:signed" in note for note in traced["notes"])
    assert "names, sizes and times" in capsys.readouterr().err
    assert load_file("found/blamed.safetensors")["images"].shape[1:] == (3, 8, 8)
    # Kept in memory the same is found, and findings of the one are of the other.
    kept = run("trace", "kept", *SIGNED, *TRACED)
    one, other = (Findings.load(Path(name, "findings")) for name in ("found", "kept"))
    assert torch.equal(one.scores, other.scores)
    assert (kept["fingerprint"], kept["reading"]["rows"]) == (traced["fingerprint"], 30)
    healed = run("heal", "healed", *SIGNED, "--findings", "found", "--method", "fine-tune", "--epochs", "1")
    assert healed["removed"] == len(traced["flagged_ids"])
    assert main(["report", "found", "--out", "page.html"]) == 0
    scanned = run("scan", "scanned", *SIGNED, "--method", "spectral-signatures", "--fingerprint", "content")
    assert scanned["fingerprint_of"] == "content"
    method = ("--unlearner", "fine-tune", "--epochs", "1", "--rounds", "1")
    assert main(["repair", *MODEL, *SIGNED, *TRACED, *method, "--out", "repaired"]) in (0, 1)


def test_the_second_run_reads_the_cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("trace", "one", *SIGNED, *TRACED, "--cache", "cache")
    assert len(list((here / "cache").iterdir())) == 1
    second = run("trace", "two", *SIGNED, *TRACED, "--cache", "cache")
    assert second["reading"]["seconds"] == 0 < first["reading"]["seconds"]
    plain = run("trace", "three", *SIGNED, *TRACED)
    scores = [Findings.load(Path(name, "findings")).scores for name in ("one", "two", "three")]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    assert plain["flagged_ids"] == second["flagged_ids"]


def test_a_set_that_is_not_held_gives_the_scores_of_one_that_is(here: Path) -> None:
    sized = ("--data", "photos", "--size", "8", "--workers", "0")
    held = run("trace", "held", *sized, *TRACED)
    read = run("trace", "read", *sized, *TRACED, "--held-share", "0")
    assert (held["reading"], held["fingerprint_of"]) == (None, "content")
    assert any("more than 0 of what may be taken" in note for note in read["notes"])
    one, other = (Findings.load(Path(name, "findings")) for name in ("held", "read"))
    assert torch.equal(one.scores, other.scores)
    assert one.ids == other.ids
    blamed = [load_file(f"{name}/blamed.safetensors")["images"] for name in ("held", "read")]
    assert torch.equal(*blamed)
    # Heal reads the set as it was read for the findings, whatever fits.
    method = ("--method", "fine-tune", "--epochs", "1")
    run("heal", "a", *sized, "--findings", "held", *method, "--held-share", "0")
    run("heal", "b", *sized, "--findings", "read", *method)
    # What trains on 8-bit images reads them all.
    assert main(["heal", *MODEL, *sized, "--findings", "read", "--epochs", "1", "--out", "c"]) == 0


def test_datasets_of_ones_own(here: Path) -> None:
    both = run("trace", "both", "--data", "ownreading:both", "--method", "ek-fac", "--suspect", "test:1")
    assert both["fingerprint_of"] == "content"  # kept in memory
    own = ("--data", "ownreading:train", "--transform", "ownreading:signed", "--held-share", "0")
    traced = run("trace", "own", *own, *TRACED, "--test-data", "ownreading:train")
    assert traced["examples"] == 30
    read = run("scan", "scanned", "--data", "ownreading:pictures", "--method", "spectral-signatures")
    assert read["reading"] is None  # 8-bit images that fit are a training set
    referred = ("--method", "activation-clustering", "--reference", "ownreading:train")
    run("scan", "referred", "--data", "ownreading:both", *referred)
    crafted = ["craft", "badnets", "--data", "ownreading:pictures", "--target", "1", "--budget-count", "3"]
    assert main([*crafted, "--out", "poison"]) == 0
    poisoned = ("--data", "ownreading:pictures", "--poison", "poison", "--method", "spectral-signatures")
    assert run("scan", "poisoned", *poisoned)["recall"] is not None


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("leave out size (--size)", ["trace", *SIGNED, *TRACED, "--size", "8"]),
        ("8-bit images in memory, which --transform does not give", ["scan", *SIGNED, "--poison", "p"]),
        (
            "--transform signed: expected package.module:function",
            ["scan", "--data", "photos", "--transform", "signed"],
        ),
        ("there is no module 'absent'", ["scan", "--data", "photos", "--transform", "absent:signed"]),
        ("module ownreading has no 'x'", ["scan", "--data", "photos", "--transform", "ownreading:x"]),
        (
            "constant is int, not a function",
            ["scan", "--data", "photos", "--transform", "ownreading:constant"],
        ),
        (
            "a/00.png: the transform failed (ValueError",
            ["scan", "--data", "photos", "--transform", "ownreading:failing"],
        ),
        ("--data ownreading:broken: the function failed (OSError", ["scan", "--data", "ownreading:broken"]),
        ("the function returned nothing", ["scan", "--data", "ownreading:nothing"]),
        ("is not a map-style dataset", ["scan", "--data", "ownreading:whole"]),
        ("name by --transform package.module:function", ["trace", "--data", "ownreading:train", *TRACED]),
        ("names no files", ["scan", "--data", "ownreading:train", "--cache", "cache"]),
        ("must lie in [0, 1]", ["scan", "--data", "photos", "--held-share", "2"]),
        (
            "must be at least 0",
            ["scan", "--data", "photos", "--size", "8", "--workers", "-1", "--held-share", "0"],
        ),
        ("frequency", ["scan", *SIGNED, "--method", "frequency"]),
        ("pixels, but", ["scan", "--data", "photos", "--held-share", "0"]),
        ("does not take inputs of shape (3, 9, 9)", ["scan", "--data", "photos", "--size", "9"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    here: Path, fails: Any, words: str, arguments: Sequence[str]
) -> None:
    verb, *rest = arguments
    assert words in fails([verb, *MODEL, *rest, "--out", "refused"])
    assert not (here / "refused").exists()


def test_what_trains_on_8_bit_images_takes_no_transform(here: Path, fails: Any) -> None:
    assert "--transform" in fails(["train", *SIGNED, "--out", "refused"])
    run("trace", "found", *SIGNED, *TRACED)
    said = fails(["heal", *MODEL, *SIGNED, "--findings", "found", "--epochs", "1", "--out", "refused"])
    assert "8-bit images in memory" in said


def test_suspects_of_different_lengths_are_refused(here: Path, fails: Any) -> None:
    words = ("trace", "--model", "ownreading:Words", "--data", "ownreading:tokens", "--method", "ek-fac")
    suspects = ("--suspect", "test:0", "test:1")
    assert "the inputs are of different sizes" in fails([*words, *suspects, "--out", "refused"])
