"""JPEG: what Pillow gives by hand."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unpoison import defenses
from unpoison.data import TrainingSet
from unpoison.defenses import JPEG
from unpoison.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
from runs import RECIPE, check_run, some_set


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("quality", [1, 25, 95])
def test_it_is_what_pillow_does(channels: int, mode: str, quality: int) -> None:
    training_set = some_set(6, channels=channels)
    found = JPEG(quality=quality).begin(training_set, RECIPE, seed=0)
    assert torch.equal(found.labels, training_set.labels)
    assert found.images.shape == training_set.images.shape
    for image, other in zip(training_set.images, found.images, strict=True):
        encoded = io.BytesIO()
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels.squeeze() if channels == 1 else pixels).save(
            encoded, format="JPEG", quality=quality
        )
        decoded = Image.open(encoded)
        assert decoded.mode == mode
        expected = torch.from_numpy(np.array(decoded)).reshape(12, 12, channels).permute(2, 0, 1)
        assert torch.equal(other, expected)


def test_less_quality_is_further_away() -> None:
    training_set = some_set()
    far, near = (
        (
            defenses.get("jpeg", preset=name).begin(training_set, RECIPE, seed=0).images.int()
            - training_set.images.int()
        ).abs()
        for name in ("quality-25", "quality-75")
    )
    assert float(far.float().mean()) > float(near.float().mean()) > 0


def test_it_defends_a_run(tmp_path: Path) -> None:
    check_run(lambda: JPEG(quality=10), tmp_path)


def test_it_refuses() -> None:
    two = TrainingSet(torch.zeros(2, 2, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    with pytest.raises(InputError, match="2 channels; JPEG has 1 or 3"):
        JPEG().begin(two, RECIPE, seed=0)
    for quality in (0, 96, 50.0, True):
        with pytest.raises(InputError, match=r"a whole number in \[1, 95\]"):
            JPEG(quality=quality)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no preset"):
        defenses.get("jpeg", preset="quality-50")
