"""Networks by the names of other people's libraries, where those are installed: `make compat`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from photographs import trace
from safetensors.torch import load_file, save_file
from torchvision_shim import without_cuda_operators

import unpoison
from unpoison.cli import main
from unpoison.cli._networks import network_of_library
from unpoison.data import TrainingSet, write_npz
from unpoison.detectors import Findings
from unpoison.errors import InputError

if find_spec("timm"):

    def test_timm() -> None:
        without_cuda_operators()
        found = network_of_library("timm:vit_tiny_patch16_224", num_classes=3, shape=(3, 32, 32))
        assert found is not None
        assert found[0]()(torch.rand(2, 3, 32, 32)).shape == (2, 3)

    def test_photographs_of_many_sizes_are_traced_from_the_command() -> None:
        _, results, _, named = trace("timm:test_vit", 20, "small", "--option", "threshold=0")
        assert named
        assert all(named)
        assert results["reading"]["rows"] >= 3 * 20
        assert results["fingerprint_of"] == "files"
        assert set(results["detector_seconds"]) == {"factors", "queries", "scores"}


if find_spec("transformers"):

    def test_transformers(tmp_path: Path) -> None:
        without_cuda_operators()
        import transformers

        config = transformers.ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=3,
        )
        network = transformers.ViTForImageClassification(config)
        network.save_pretrained(tmp_path / "vit")
        found = network_of_library(f"transformers:{tmp_path / 'vit'}", num_classes=3, shape=(3, 32, 32))
        assert found is not None
        build, trained = found
        assert trained is not None
        for name, value in network.state_dict().items():
            assert torch.equal(value, trained.state_dict()[name])
        assert set(build().state_dict()) == set(network.state_dict())


if find_spec("torchvision"):

    def test_torchvision() -> None:
        without_cuda_operators()
        found = network_of_library("torchvision:shufflenet_v2_x0_5", num_classes=3, shape=(3, 32, 32))
        assert found is not None
        build, trained = found
        assert trained is None
        one, other = build(), build()
        assert one(torch.rand(2, 3, 32, 32)).shape == (2, 3)
        assert one is not other
        with pytest.raises(InputError, match=r"--model torchvision:no_such_network: \S.*") as error:
            network_of_library("torchvision:no_such_network", num_classes=3, shape=(3, 32, 32))
        assert "\n" not in str(error.value)

    def test_torchvision_from_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        without_cuda_operators()
        monkeypatch.chdir(tmp_path)
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=draw)
        write_npz("data.npz", TrainingSet(images, torch.arange(24) % 3, ("a", "b", "c"), "drawn"))
        found = network_of_library("torchvision:shufflenet_v2_x0_5", num_classes=3, shape=(3, 32, 32))
        assert found is not None
        save_file(found[0]().state_dict(), "weights.safetensors")
        words = ["--model", "torchvision:shufflenet_v2_x0_5", "--weights", "weights.safetensors"]
        scanned = ["--method", "spectral-signatures", "--out", "found"]
        assert main(["scan", *words, "--data", "data.npz", *scanned]) == 0
        network = found[0]()
        network.load_state_dict(load_file("weights.safetensors"))
        expected = unpoison.scan(network.eval(), unpoison.data.load("data.npz").train, method=scanned[1])
        scores = Findings.load("found/findings").scores
        torch.testing.assert_close(scores, expected.scores.to(scores), rtol=1e-3, atol=1e-5)
