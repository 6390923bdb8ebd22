"""`--model` by a library's name, and weights through the prefixes of trainers."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unpoison.cli._networks import network_of_library
from unpoison.errors import InputError, MissingExtraError
from unpoison.models import load_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def stored(tmp_path: Path, prefix: str = "", **more: torch.Tensor) -> tuple[Path, nn.Module]:
    """The weights of a network under a prefix, and the network."""
    trained = network()
    nn.init.constant_(trained[0].bias, 7.0)
    weights = {f"{prefix}{name}": value.clone() for name, value in trained.state_dict().items()}
    weights.pop(f"{prefix}1.num_batches_tracked")
    save_file({**weights, **more}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", trained


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "state_dict.model.module."])
def test_prefixes_in_the_file(tmp_path: Path, prefix: str) -> None:
    more = {} if not prefix else {"ema_decay": torch.zeros(1)}
    path, trained = stored(tmp_path, prefix, **more)
    fresh = network()
    load_weights(fresh, path, where="--weights")
    assert torch.equal(fresh[0].weight, trained[0].weight)
    wrapped = nn.DataParallel(network())
    load_weights(wrapped, path, where="--weights")
    assert torch.equal(wrapped.module[0].bias, trained[0].bias)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path, trained = stored(tmp_path, "a.")
    twice = {f"b.{name}": value.clone() for name, value in trained.state_dict().items()}
    path, _ = stored(tmp_path, "a.", **twice)
    with pytest.raises(InputError, match=r"under 2 prefixes \(a\., b\.\)"):
        load_weights(network(), path, where="--weights")
    path, _ = stored(tmp_path, "model.")
    for other, words in (
        (nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), "'0.weight' has shape"),
        (nn.Sequential(nn.Linear(4, 3)), "which the model does not have"),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)), "lacks '2.weight'"),
    ):
        with pytest.raises(InputError, match=words):
            load_weights(other, path, where="--weights")
    (tmp_path / "weights.safetensors").write_bytes(b"pickle")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_weights(network(), path, where="--weights")


def test_other_specs_are_not_of_a_library() -> None:
    assert network_of_library("mynets:resnet", num_classes=3, shape=(3, 8, 8)) is None
    assert network_of_library("timm", num_classes=3, shape=(3, 8, 8)) is None


def test_a_library_that_is_not_installed_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match="pip install timm"):
        network_of_library("timm:resnet18", num_classes=3, shape=(3, 8, 8))


def test_a_timm_network_is_built_for_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, object]] = []

    def create_model(name: str, **options: object) -> nn.Module:
        if "img_size" in options and name == "conv":
            raise TypeError("unexpected keyword argument 'img_size'")
        made.append(options)
        return network()

    timm = types.ModuleType("timm")
    timm.create_model, timm.is_model = create_model, lambda name: name in ("vit", "conv")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    for name in ("vit", "conv"):
        found = network_of_library(f"timm:{name}", num_classes=5, shape=(1, 8, 6))
        assert found is not None
        build, trained = found
        assert trained is None
        assert isinstance(build(), nn.Module)
    plain = {"pretrained": False, "num_classes": 5, "in_chans": 1}
    assert made == [{**plain, "img_size": (8, 6)}, plain]
    with pytest.raises(InputError, match="no such model"):
        network_of_library("timm:nothing", num_classes=5, shape=(1, 8, 6))
    with pytest.raises(InputError, match=r"is for images \[c, h, w\], found inputs of shape \(7,\)"):
        network_of_library("timm:conv", num_classes=5, shape=(7,))
