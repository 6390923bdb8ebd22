"""Clipping and noise: of the batch's gradient, and of each example's against a loop over examples."""

from __future__ import annotations

import builtins
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison import defenses
from unpoison.defenses import DPSGD, NoisyGradient
from unpoison.defenses.dp_sgd import gaussian_epsilon
from unpoison.errors import InputError, MissingExtraError
from unpoison.models import build
from unpoison.training import Step, train

sys.path.insert(0, str(Path(__file__).parent))
from runs import RECIPE, check_run, some_set

PLAIN = replace(RECIPE, model="convnet", width=2)


def loss_of(logits: Tensor, wanted: Tensor, *, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits, wanted, reduction=reduction)


def gradients(defense: Any, model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    training_set = some_set(10)
    step = Step(
        model=model,
        images=training_set.images.float() / 255,
        targets=training_set.labels,
        logits_of=model,
        loss_of=loss_of,
        generator=torch.Generator().manual_seed(0),
    )
    loss, logits = defense.gradients(step)
    assert logits.shape == (10, 3)
    found = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
        parameter.grad = None
    return loss, found


def network() -> nn.Module:
    return build(
        "convnet",
        num_classes=3,
        in_channels=1,
        width=2,
        seed=0,
        image_size=(12, 12),
        normalization=((0.4,), (0.3,)),
    )


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def by_example(model: nn.Module) -> list[Tensor]:
    training_set = some_set(10)
    return [
        flat(
            list(
                torch.autograd.grad(
                    loss_of(model(training_set.images[[place]].float() / 255), training_set.labels[[place]]),
                    list(model.parameters()),
                )
            )
        )
        for place in range(10)
    ]


def test_dp_sgd_clips_each_example() -> None:
    model = network()
    alone = by_example(model)
    norms = sorted(float(gradient.norm()) for gradient in alone)
    clip = norms[4] * 1.001
    clipped = [gradient * min(1.0, clip / (float(gradient.norm()) + 1e-6)) for gradient in alone]
    _, found = gradients(DPSGD(clip=clip, noise=0), model)
    torch.testing.assert_close(flat(found), torch.stack(clipped).mean(0), rtol=1e-4, atol=1e-6)
    _, unclipped = gradients(DPSGD(clip=1e6, noise=0), model)
    torch.testing.assert_close(flat(unclipped), torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6)


def test_dp_sgd_adds_noise_to_the_sum() -> None:
    model = network()
    _, quiet = gradients(DPSGD(clip=0.5, noise=0), model)
    _, loud = gradients(DPSGD(clip=0.5, noise=20), model)
    difference = flat(loud) - flat(quiet)
    assert float(difference.std()) == pytest.approx(20 * 0.5 / 10, rel=0.1)


def test_dp_sgd_leaves_nothing_on_the_model() -> None:
    model = network()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    gradients(DPSGD(), model)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert not module._forward_hooks
        assert not module._backward_hooks
    assert all("grad_sample" not in vars(parameter) for parameter in model.parameters())


def test_dp_sgd_defends_a_run_and_keeps_an_account(tmp_path: Path) -> None:
    trained = check_run(lambda: DPSGD(clip=1.0, noise=0.8), tmp_path, PLAIN)
    told = trained.defense
    assert told is not None
    assert (told["epochs"], told["steps"], told["delta"]) == (3, 9, 1e-5)
    assert told["epsilon"] == pytest.approx(gaussian_epsilon(3, 0.8, 1e-5))
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(9):
        accountant.step(noise_multiplier=0.8, sample_rate=16 / 40)
    assert told["epsilon_if_sampled"] == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01)


def test_without_noise_nothing_is_promised() -> None:
    told = train(some_set(), replace(PLAIN, epochs=1), seed=0, defense=DPSGD(noise=0)).defense
    assert told is not None
    assert told["epsilon"] is None
    assert told["epsilon_if_sampled"] is None


@pytest.mark.parametrize(("times", "noise", "delta"), [(1, 1.0, 1e-5), (40, 6.0, 1e-6), (3, 0.5, 0.01)])
def test_the_exact_epsilon_against_the_integral(times: int, noise: float, delta: float) -> None:
    """delta is the integral of (p - exp(epsilon) q)+ over the two normal densities."""
    strength = math.sqrt(times) / noise
    epsilon = gaussian_epsilon(times, noise, delta)
    x = torch.linspace(-12, 12 + strength, 2_000_001, dtype=torch.float64)
    p, q = ((-((x - at) ** 2) / 2).exp() / math.sqrt(2 * math.pi) for at in (strength, 0.0))
    assert float(torch.trapezoid((p - math.exp(epsilon) * q).clamp(min=0), x)) == pytest.approx(
        delta, rel=1e-4
    )
    assert gaussian_epsilon(0, noise, delta) == 0


def test_batch_norm_is_refused() -> None:
    with pytest.raises(InputError, match=r"the network has batch norm \(.*such as convnet"):
        train(some_set(), RECIPE, seed=0, defense=DPSGD())


def test_without_opacus_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fake(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("opacus"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(MissingExtraError, match=r"pip install 'unpoison\[dp\]'"):
        DPSGD().begin(some_set(), PLAIN, seed=0)


def test_the_batchs_gradient_is_clipped_and_noisy(tmp_path: Path) -> None:
    model = network()
    _, plain = gradients(NoisyGradient(clip=1e6, noise=0), model)
    torch.testing.assert_close(flat(plain), torch.stack(by_example(model)).mean(0), rtol=1e-4, atol=1e-6)
    _, clipped = gradients(NoisyGradient(clip=0.01, noise=0), model)
    torch.testing.assert_close(flat(clipped), flat(plain) * 0.01 / flat(plain).norm(), rtol=1e-3, atol=1e-7)
    _, noisy = gradients(NoisyGradient(clip=0.01, noise=2), model)
    assert float((flat(noisy) - flat(clipped)).std()) == pytest.approx(0.02, rel=0.1)
    assert defenses.get("noisy-gradient", preset="sleeper-agent") == NoisyGradient(clip=1.0, noise=0.01)
    check_run(lambda: NoisyGradient(clip=0.1, noise=0.1), tmp_path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DPSGD(clip=0), "dp-sgd: clip must be a number"),
        (lambda: DPSGD(delta=1), "dp-sgd: delta must be a number"),
        (lambda: NoisyGradient(noise=-1), "noisy-gradient: noise must be a number"),
        (lambda: defenses.get("noisy-gradient", preset="wb"), "no preset 'wb'"),
    ],
)
def test_it_refuses(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()
