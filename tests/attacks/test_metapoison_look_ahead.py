"""The meta-gradient of MetaPoison, held against finite differences and against a plain formulation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from unpoison.attacks.metapoison.batch_norm import with_fast_batch_norm
from unpoison.attacks.metapoison.look_ahead import LookAhead, SGDStep, StackedNetwork, Tensors, look_ahead
from unpoison.models import build
from unpoison.threats import TargetedMisclassification
from unpoison.training import Recipe

PLAIN = Recipe(model="convnet-bn", learning_rate=0.1, momentum=0, nesterov=False, weight_decay=0)
RICH = Recipe(
    model="convnet-bn",
    momentum=0.8,
    nesterov=True,
    weight_decay=0.01,
    decay_norm_and_bias=False,
    bias_learning_rate_factor=2,
    label_smoothing=0.1,
)
BATCH, POISONS, CLASSES = 7, 2, 3
GOAL = TargetedMisclassification(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 0, 1)


def smooth_net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        ).double()


def convnet(seed: int) -> nn.Module:
    return build("convnet-bn", num_classes=CLASSES, image_size=8, width=3, seed=seed).double()


class Case:
    """Networks, batches and a target, all drawn from a seed; `ahead` looks ahead with given pixels."""

    def __init__(self, make: Callable[[int], nn.Module], steps: int, recipe: Recipe, *, stacked: int = 1):
        draws = torch.Generator().manual_seed(steps)
        self.networks = [make(seed) for seed in range(stacked)]
        self.recipe = recipe
        self.stack = StackedNetwork(self.networks[0])
        shape = (stacked, BATCH, 3, 8, 8)
        self.images = [torch.rand(shape, generator=draws, dtype=torch.float64) for _ in range(steps + 1)]
        self.labels = [torch.randint(CLASSES, shape[:2], generator=draws) for _ in range(steps + 1)]
        self.targets = torch.rand(2, 3, 8, 8, generator=draws, dtype=torch.float64)
        self.pixels = torch.rand(stacked, POISONS, 3, 8, 8, generator=draws, dtype=torch.float64)
        self.rates = torch.linspace(0.1, 0.3, stacked, dtype=torch.float64)
        self.momenta = self.stacked(lambda network: dict(network.named_parameters()))
        self.momenta = {
            name: torch.randn(value.shape, generator=draws, dtype=value.dtype) * (recipe.momentum > 0)
            for name, value in self.momenta.items()
        }

    def stacked(self, group: Callable[[nn.Module], dict[str, Tensor]]) -> Tensors:
        parts = [group(network) for network in self.networks]
        return {name: torch.stack([part[name].detach() for part in parts]) for name in parts[0]}

    def objective(self, logits: Tensor) -> Tensor:
        return GOAL.margin(logits).mean(1)

    def ahead(self, pixels: Tensor, **options: object) -> LookAhead:
        first = torch.cat([pixels, self.images[0][:, POISONS:]], 1)
        return look_ahead(
            self.stack,
            self.stacked(lambda network: dict(network.named_parameters())),
            self.stacked(lambda network: dict(network.named_buffers())),
            self.momenta,
            list(zip([first, *self.images[1:]], self.labels, strict=True)),
            self.targets,
            self.objective,
            SGDStep(self.recipe, self.rates),
            **options,  # type: ignore[arg-type]
        )

    def gradient(self, **options: object) -> Tensor:
        pixels = self.pixels.clone().requires_grad_()
        (found,) = torch.autograd.grad(self.ahead(pixels, **options).loss.sum(), pixels)
        return found


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("recipe", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("loss_steps", ["all", "last"])
@pytest.mark.parametrize("target_in_batch", [True, False], ids=["in batch", "apart"])
def test_it_is_the_finite_difference_on_a_smooth_net(
    steps: int, recipe: Recipe, loss_steps: str, target_in_batch: bool
) -> None:
    case = Case(smooth_net, steps, recipe)
    options = {"loss_steps": loss_steps, "target_in_batch": target_in_batch}
    direction = torch.randn(
        case.pixels.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    above, below = (
        float(case.ahead(case.pixels + sign * 1e-5 * direction, **options).loss.detach().sum())
        for sign in (1, -1)
    )
    slope = float((case.gradient(**options) * direction).sum())
    assert abs(slope) > 1e-6
    assert slope == pytest.approx((above - below) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_it_is_plain_double_backward_on_convnet_bn(steps: int) -> None:
    case = Case(convnet, steps, PLAIN)
    network = case.networks[0].train()
    targets = case.targets

    def outputs(parameters: Tensors, images: Tensor) -> Tensor:
        buffers = {name: value.clone() for name, value in network.named_buffers()}
        result: Tensor = functional_call(network, {**parameters, **buffers}, (torch.cat([images, targets]),))
        return result

    def adversarial(pixels: Tensor) -> Tensor:
        parameters = {name: value.detach() for name, value in network.named_parameters()}
        losses = []
        batches = [
            torch.cat([pixels, case.images[0][0, POISONS:]]),
            *(images[0] for images in case.images[1:]),
        ]
        for (images, following), labels in zip(itertools.pairwise(batches), case.labels, strict=False):

            def loss(parameters: Tensors, images: Tensor = images, labels: Tensor = labels[0]) -> Tensor:
                return F.cross_entropy(outputs(parameters, images)[:BATCH], labels)

            gradients = grad(loss)(parameters)
            parameters = {name: value - 0.1 * gradients[name] for name, value in parameters.items()}
            logits = outputs(parameters, following)[BATCH:]
            losses.append((torch.maximum(logits[:, 0], logits[:, 2]) - logits[:, 1]).mean())
        return torch.stack(losses).mean()

    expected = grad(adversarial)(case.pixels[0])
    assert expected.abs().max() > 1e-6
    assert torch.allclose(case.gradient()[0], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("make", [smooth_net, convnet])
def test_a_stack_is_its_networks_one_by_one(make: Callable[[int], nn.Module]) -> None:
    together = Case(make, 2, RICH, stacked=3)
    found, ahead = together.gradient(), together.ahead(together.pixels)
    for place in range(3):
        alone = copy.copy(together)
        alone.networks = [together.networks[place]]
        alone.images = [images[place : place + 1] for images in together.images]
        alone.labels = [labels[place : place + 1] for labels in together.labels]
        alone.pixels = together.pixels[place : place + 1]
        alone.rates = together.rates[place : place + 1]
        alone.momenta = {name: value[place : place + 1] for name, value in together.momenta.items()}
        assert torch.allclose(alone.gradient()[0], found[place], rtol=1e-7, atol=1e-12)
        assert torch.allclose(alone.ahead(alone.pixels).logits[0], ahead.logits[place])


def test_the_gradient_is_right_for_poisons_that_are_learned_well() -> None:
    """In float32 with a probability of 1 - 1e-12 of every label, as in float64, where nothing cancels."""
    gradients = []
    for dtype in (torch.float64, torch.float32):
        case = Case(smooth_net, 1, PLAIN)
        images, labels = case.images[0][0], case.labels[0][0]
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)).double()
        draws = torch.Generator().manual_seed(5)
        aims = 28 * F.one_hot(labels, CLASSES) + torch.randn(BATCH, CLASSES, generator=draws).double()
        with torch.no_grad():
            network[1].weight.copy_(torch.linalg.lstsq(images.flatten(1), aims).solution.T)  # type: ignore[operator, union-attr]
            network[1].bias.zero_()  # type: ignore[operator, union-attr]
        network = network.to(dtype)
        pixels = images.to(dtype).requires_grad_()
        found = look_ahead(
            StackedNetwork(network),
            {name: value.detach()[None] for name, value in network.named_parameters()},
            {},
            {},
            [(pixels[None], labels[None]), (case.images[1].to(dtype), case.labels[1])],
            case.targets.to(dtype),
            lambda logits: GOAL.margin(logits).mean(1),
            SGDStep(PLAIN, torch.tensor([0.1], dtype=dtype)),
        )
        gradients.append(torch.autograd.grad(found.loss.sum(), pixels)[0].double().flatten(1))
    exact, found_ = gradients
    assert float(exact.abs().max()) < 1e-9
    cosines = F.cosine_similarity(exact * 1e12, found_ * 1e12, dim=1)
    assert float(cosines.min()) > 0.999


def test_looking_changes_nothing() -> None:
    case = Case(convnet, 2, RICH)
    parameters = case.stacked(lambda network: dict(network.named_parameters()))
    buffers = case.stacked(lambda network: dict(network.named_buffers()))
    before = [{name: value.clone() for name, value in group.items()} for group in (parameters, buffers)]
    batches = list(zip(case.images, case.labels, strict=True))
    step = SGDStep(RICH, case.rates)
    look_ahead(case.stack, parameters, buffers, case.momenta, batches, case.targets, case.objective, step)
    for group, copy_ in zip((parameters, buffers), before, strict=True):
        assert all(torch.equal(value, copy_[name]) for name, value in group.items())
        assert not any(value.requires_grad for value in group.values())


@pytest.mark.parametrize("recipe", [PLAIN, RICH], ids=["plain", "rich"])
def test_an_inner_step_is_that_of_torch(recipe: Recipe) -> None:
    network = smooth_net(0)
    weights = [value for value in network.parameters() if value.ndim > 1]
    others = [value for value in network.parameters() if value.ndim <= 1]
    factor, decay = recipe.bias_learning_rate_factor, recipe.weight_decay
    optimizer = torch.optim.SGD(
        [
            {"params": weights, "weight_decay": decay, "lr": 0.1},
            {"params": others, "weight_decay": decay * recipe.decay_norm_and_bias, "lr": 0.1 * factor},
        ],
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
    )
    parameters = {name: value.detach().clone()[None] for name, value in network.named_parameters()}
    momenta = {name: torch.zeros_like(value) for name, value in parameters.items()}
    step = SGDStep(recipe, torch.tensor([0.1], dtype=torch.float64))
    for turn in range(3):
        draws = torch.Generator().manual_seed(turn)
        gradients = [
            torch.randn(value.shape, generator=draws, dtype=value.dtype) for value in parameters.values()
        ]
        for value, gradient in zip(network.parameters(), gradients, strict=True):
            value.grad = gradient[0].clone()
        optimizer.step()
        parameters, momenta = step(parameters, momenta, gradients)
    for name, value in network.named_parameters():
        assert torch.allclose(parameters[name][0], value, rtol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fast_batch_norm_is_torch_s(layout: torch.memory_format) -> None:
    draws = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    own = nn.BatchNorm2d(3).double()
    own.load_state_dict({**own.state_dict(), "weight": drawn(3), "bias": drawn(3)})
    fast = with_fast_batch_norm(copy.deepcopy(own))
    assert type(fast) is not type(own)
    maps = (3 * drawn(4, 3, 5, 6) + 1).contiguous(memory_format=layout)
    outer, inner = drawn(4, 3, 5, 6), [drawn(4, 3, 5, 6), drawn(3), drawn(3)]
    found: list[list[Tensor]] = []
    for module in (own, fast):
        leaf = maps.clone().requires_grad_()
        leaves = [leaf, *module.parameters()]
        outputs = module(leaf)
        first = torch.autograd.grad((outputs.pow(3) * outer).sum(), leaves, create_graph=True)
        product = torch.stack([(part * other).sum() for part, other in zip(first, inner, strict=True)]).sum()
        second = torch.autograd.grad(product, leaves)
        found.append([outputs, *first, *second, *(value.double() for value in module.buffers())])
    for expected, value in zip(*found, strict=True):
        assert torch.allclose(value, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(fast.eval()(maps), own.eval()(maps))
    bare = nn.BatchNorm2d(3, affine=False)
    assert type(with_fast_batch_norm(bare)) is nn.BatchNorm2d
