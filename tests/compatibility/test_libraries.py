"""Networks by the names of other people's libraries, where those are installed: `make compat`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from photographs import trace
from torchvision_shim import without_cuda_operators

from unpoison.cli._networks import network_of_library

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
