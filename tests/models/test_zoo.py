"""Every architecture: shapes, published sizes, seeds, and the global random state left alone."""

from __future__ import annotations

import pytest
import torch

from unpoison.errors import InputError
from unpoison.models import ARCHITECTURES, Normalized, build, names, reinitialized, whiten

SMALL = {"mobilenet-v2": 8, "vgg11": 4, "vgg13": 4, "vgg13-plain": 4, "vgg16": 4}


def small(
    name: str, *, channels: int = 3, size: int | tuple[int, int] = 32, seed: int = 0
) -> torch.nn.Module:
    return build(
        name, num_classes=7, in_channels=channels, image_size=size, width=SMALL.get(name, 4), seed=seed
    )


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (28, 28)), (3, (17, 23)), (2, None)])
def test_logits_for_every_image_shape(name: str, channels: int, size: tuple[int, int] | None) -> None:
    size = size or (ARCHITECTURES[name].smallest_image,) * 2
    model = small(name, channels=channels, size=size)
    assert model(torch.rand(2, channels, *size)).shape == (2, 7)


@pytest.mark.parametrize("name", names())
def test_the_gradient_reaches_every_parameter(name: str) -> None:
    model = small(name)
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, path
            assert parameter.grad.isfinite().all(), path


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("convnet-bn", 70_618),  # MetaPoison
        ("resnet18", 11_173_962),  # the usual CIFAR ResNet-18
        ("resnet20", 269_722 + 512 + 64 + 2048 + 128),  # He et al. 2016, plus projection shortcuts
        ("vgg11", 9_231_114 - 2_752),  # the benchmark's, less the convolution biases
        ("vgg13", 9_416_010 - 2_944),
        ("vgg16", 14_728_266 - 4_224),
        ("vgg13-plain", 9_416_010 - 2 * 2_944),  # less the norms
        ("mobilenet-v2", 2_296_922),  # the benchmark's
        ("resnet9", 6_573_120 + 10),  # Page 2018, plus the bias of the linear layer
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    model = build(name, num_classes=10, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", names())
def test_no_convolution_before_a_norm_has_a_bias(name: str) -> None:
    model = small(name)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        assert all(module.bias is None for module in model.modules() if isinstance(module, torch.nn.Conv2d))


@pytest.mark.parametrize("name", names())
def test_seeds_decide_and_the_global_state_does_not_move(name: str) -> None:
    before = torch.random.get_rng_state()
    first, same, other = (small(name, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", names())
def test_reinitialized_draws_from_the_distribution_of_build(name: str) -> None:
    model = small(name)
    original = {key: value.clone() for key, value in model.state_dict().items()}
    before = torch.random.get_rng_state()
    fresh = reinitialized(model, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    for key, value in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[key], original[key])
        if value.numel() > 300 and float(value.std()) > 0:
            assert float(value.std()) == pytest.approx(float(original[key].std()), rel=0.35)
    assert any(not torch.equal(value, original[key]) for key, value in fresh.state_dict().items())


def test_reinitialized_names_the_module_that_cannot() -> None:
    class Stubborn(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

    with pytest.raises(InputError, match=r"'1' \(Stubborn\)"):
        reinitialized(torch.nn.Sequential(torch.nn.Linear(2, 2), Stubborn()), seed=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_building_leaves_the_generators_of_cuda_alone() -> None:
    before = torch.cuda.get_rng_state()
    reinitialized(build("resnet9", num_classes=2, width=2, seed=0).cuda(), seed=1)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_normalized_standardises_and_carries_its_numbers_as_buffers() -> None:
    model = Normalized(torch.nn.Identity(), (0.5, 0.25), (0.5, 0.125))
    images = torch.full((1, 2, 1, 1), 0.5)
    assert model(images).flatten().tolist() == [0.0, 2.0]
    assert set(model.state_dict()) == {"mean", "std"}
    assert not list(model.parameters())


def test_whitening_decorrelates_patches() -> None:
    model = build("fastnet", num_classes=2, in_channels=1, width=8, seed=0)
    images = torch.nn.functional.avg_pool2d(torch.rand(50, 1, 20, 20), 3, 1) - 0.5
    whiten(model, images)
    assert model.training
    maps = model.get_submodule("whitening")(images)[:, :4].transpose(0, 1).flatten(1)
    covariance = maps @ maps.T / maps.shape[1]
    assert torch.allclose(covariance - torch.diag(covariance.diag()), torch.zeros(4, 4), atol=1e-3)
    assert (covariance.diag() > 0.5).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet99"}, "did you mean"),
        ({"name": "resnet9", "num_classes": 1}, "num_classes must be at least 2, found 1"),
        ({"name": "resnet9", "width": 0}, "width must be at least 1, found 0"),
        ({"name": "resnet9", "in_channels": 0}, "in_channels must be at least 1, found 0"),
        ({"name": "fastnet", "image_size": 8}, "image_size must be at least 9, found 8"),
        ({"name": "resnet9", "normalization": ((0.5,), (1.0,))}, "1 means for 3 channels"),
        ({"name": "resnet9", "normalization": ((0.5,) * 3, (0.0,) * 3)}, "must be positive"),
    ],
)
def test_what_cannot_be_built(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**{"num_classes": 2, "seed": 0, **arguments})
