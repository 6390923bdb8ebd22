"""The pictures of the EPIC paper: what is noted is what a plain calculation gives, and all are drawn."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison import data
from unpoison.data import TrainingSet
from unpoison.models import build
from unpoison.threats import PoisonSet, TargetedMisclassification

ROOT = Path(__file__).parents[1]
SWEEP = """
name = "tiny"
seeds = [0]
data.source = "set.npz"
attacks = [{ name = "label-flip", budget = 0.1 }]
targets.pairs = [["a", "b"]]

[pretraining]
training.epochs = 1

[training]
model = "convnet"
width = 4
epochs = 4
batch_size = 16
learning_rate = 0.05
"""


@pytest.fixture(scope="module")
def pictures() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("epic_pictures", ROOT / "benchmarks/epic_pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["epic_pictures"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["epic_pictures"]


def some_set(n: int, *, seed: int = 0) -> TrainingSet:
    """Three classes that differ in brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 128, (n, 1, 8, 8), generator=generator)
    return TrainingSet((images + 60 * labels[:, None, None, None]).to(torch.uint8), labels, ("a", "b", "c"))


def some_poison(clean: TrainingSet, test: TrainingSet) -> PoisonSet:
    """Four images of class a, darkened; clean labels."""
    places = (clean.labels == 0).nonzero().squeeze(1)[:4]
    return PoisonSet.of(
        clean,
        indices=places,
        images=clean.images[places] // 2,
        given_labels=clean.labels[places],
        goal=TargetedMisclassification.of(test, 2, target=0),
        attack="gradient-matching",
        configuration={},
        seed=0,
    )


def at(*rows: tuple[float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_effective_poisons_are_those_nearer_to_the_target_than_to_their_class(pictures: ModuleType) -> None:
    near, far, pull = (0.0, 0.0, 0.0), (-0.8, 0.0, 0.8), (-1.0, 0.0, 1.0)
    gradients = at(near, near, far, near, far, near)
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    truth = torch.tensor([False, False, False, True, True, False])
    numbers = pictures.places(gradients, labels, truth, at(pull)[0])
    assert numbers["effective"] == {"poisons": 50.0, "clean": pytest.approx(100 / 3)}
    centre = gradients[:3].mean(0)
    expected = sorted(float((gradients[place] - centre).norm()) for place in (3, 4))
    assert numbers["to_class"]["poisons"][1] == pytest.approx(sum(expected) / 2)
    assert numbers["to_nearest"]["clean"] == [0.0, 0.0, 0.0]
    assert numbers["target_to_class"] == pytest.approx(float((at(pull)[0] - centre).norm()))


def test_norms_are_those_of_the_mean_gradients(pictures: ModuleType) -> None:
    clean = some_set(12)
    model = build("convnet", num_classes=3, in_channels=1, image_size=(8, 8), width=4, seed=0)
    kept = torch.arange(12) % 4 != 0
    numbers = pictures.gradient_norms(model, clean, kept)

    def mean_gradient(mask: Tensor) -> Tensor:
        images, labels = clean.images[mask].float() / 255, clean.labels[mask]
        loss = F.cross_entropy(model(images), labels)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])

    model.eval()
    everything = mean_gradient(torch.ones(12, dtype=torch.bool))
    assert numbers["gradient"] == pytest.approx(float(everything.norm()), rel=1e-4)
    difference = float((everything - mean_gradient(kept)).norm())
    assert numbers["difference"] == pytest.approx(difference, rel=1e-4)


def test_every_picture_is_drawn_with_its_numbers(pictures: ModuleType, tmp_path: Path) -> None:
    data.write_npz(tmp_path / "set.npz", some_set(60), some_set(12, seed=1))
    splits = data.load(tmp_path / "set.npz")
    assert splits.test is not None
    some_poison(splits.train, splits.test).save(tmp_path / "poison")
    (tmp_path / "sweep.toml").write_text(SWEEP, encoding="utf-8")
    out = tmp_path / "out"
    words = f"--poison {tmp_path}/poison --recipe {tmp_path}/sweep.toml --out {out} --dpi 40 --seeds 0 1"
    words += " --defenses epic:released-fine-tune isolation --sizes 0.3 0.6"
    pictures.main(words.split())
    records = {}
    for name in pictures.PICTURES:
        assert (out / f"epic_{name}.png").stat().st_size > 1000
        assert 1000 < (out / f"epic_{name}.svg").stat().st_size < 60_000
        record = json.loads((out / f"epic_{name}.json").read_text(encoding="utf-8"))
        assert record["poisons"][0]["count"] == 4
        assert record["fine_tuned"]
        records[name] = record["numbers"]
    # Two runs; four epochs and the end.
    assert [len(run) for run in records["effective"]["poisons"]] == [5, 5]
    assert [len(run) for run in records["distance"]["to_class"]["clean"]] == [5, 5]
    dropped = records["drops"]["epic:released-fine-tune"]["clean"]
    assert [len(run) for run in dropped] == [4, 4]
    assert all(run == sorted(run) and run[0] == 0 for run in dropped)
    assert max(max(run) for run in dropped) > 0
    assert [row["subset_size"] for row in records["sizes"]["rows"]] == [None, 0.3, 0.6]
    assert [row["success"]["trials"] for row in records["sizes"]["rows"]] == [2, 2, 2]
    for name in ("epic:released-fine-tune", "random, as many as epic:released-fine-tune"):
        differences = records["dynamics"][name]["difference"]
        assert all(run[0] == 0 and run[-1] > 0 for run in differences)
