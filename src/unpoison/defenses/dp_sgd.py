"""DP-SGD: clip every example's gradient and add noise, so that no example has much to say.

Abadi et al., "Deep Learning with Differential Privacy" (CCS 2016, arXiv 1607.00133), algorithm 1; as a
defense against poison Ma, Zhu and Hsu (IJCAI 2019, arXiv 1903.09860) and Hong et al. (2020, arXiv
2002.11497).
Gradients by example and the usual accounting are Opacus's (`pip install unpoison[dp]`).

Each example's gradient, of all parameters together, is cut down to the norm `clip`; to their sum normal noise
of deviation `noise` * `clip` is added; the sum is divided by the size of the batch. Weight decay and momentum
come after it, and tell nothing of the data.

What is promised, as `report` tells it, for one example left out of the sum or not, at the given delta:

- `epsilon`: of what is done here. An epoch's batches are a shuffle, so each example is in one step an epoch,
  and a run of E epochs is E uses of the Gaussian mechanism, whose privacy is known exactly (Dong, Roth and Su
  2019, arXiv 1905.02383, corollaries 2.13 and 3.3). Nothing is claimed for the shuffling.
- `epsilon_if_sampled`: what is usually reported, by Opacus's accountant for batches drawn by Poisson sampling
  at the same rate, which is not how they are drawn.

Both leave out the normalisation, whose mean and deviation of each channel are taken from the data as they
are.

Limits: networks with batch norm, in which examples see each other, are refused; `convnet` and `vgg13-plain`
have none. Augmented copies are fine.

Cost: two to several times that of a step, and memory for the gradient of every parameter by every example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.defenses._methods import register
from unpoison.errors import InputError, MissingExtraError
from unpoison.training import Defense, Recipe

_BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)


@final
class _Account:
    """How often which mechanism was used."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, batch_size: int) -> None:
        """Nothing was used yet."""
        self.batch_size, self.examples, self.epochs, self.steps = batch_size, 0, 0, 0


@final
@register(
    name="dp-sgd",
    title="DP-SGD",
    summary="Clips the gradient of every example and adds noise to their sum; reports its epsilon.",
    paper="Abadi et al., CCS 2016, arXiv 1607.00133",
    cost="two to several times the training; needs a network without batch norm",
    extra="dp",
)
@dataclass(frozen=True, kw_only=True)
class DPSGD(Defense):
    """Gradients clipped by example, with noise on their sum.

    Arguments:
        clip: the largest norm of an example's gradient, above 0.
        noise: deviation of the noise as a multiple of `clip`; 0 promises nothing.
        delta: for which the epsilons are reported, in (0, 1); usually below one over the number of examples.

    Raises:
        InputError: a value is out of its range, or, in training, the network has batch norm.
        MissingExtraError: Opacus is not installed.
    """

    clip: float = 1.0
    noise: float = 1.0
    delta: float = 1e-5
    _account: _Account = field(default_factory=_Account, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least, most in (("clip", 1e-9, 1e9), ("noise", 0.0, 1e9), ("delta", 1e-300, 1 - 1e-9)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise InputError(f"dp-sgd: {name} must be a number in {least:g}..{most:g}, found {value!r}")

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """Open a new account."""
        _opacus()
        self._account.begin(recipe.batch_size)
        return training_set

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        """All of them; the epoch is entered in the account."""
        for name, module in model.named_modules():
            if isinstance(module, _BATCH_NORM):
                raise InputError(
                    f"dp-sgd: the network has batch norm ({name}), so an example's gradient depends on the "
                    "others; take one without, such as convnet or vgg13-plain"
                )
        self._account.epochs += 1
        self._account.examples = int(alive.sum())
        return alive

    def gradients(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        *,
        logits_of: Callable[[Tensor], Tensor],
        loss_of: Callable[..., Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The mean of the clipped gradients, with noise."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Not strict: the buffers are those of the normalisation; batch norm has been refused.
        hooked = _opacus().GradSampleModule(model, loss_reduction="sum", strict=False)
        try:
            # With a gradient of its own asked for, since the first layer's hook wants one to pass on.
            logits = logits_of(images.detach().requires_grad_())
            losses = loss_of(logits, targets, reduction="none")
            losses.sum().backward()  # type: ignore[no-untyped-call]
            by_example = [parameter.grad_sample for parameter in trainable]  # type: ignore[attr-defined]
        finally:
            hooked.to_standard_module()
            for owner in (*model.modules(), *trainable):
                for left in ("grad_sample", "activations", "max_batch_len"):
                    vars(owner).pop(left, None)
        norms = torch.stack([one.flatten(1).square().sum(1) for one in by_example]).sum(0).sqrt()
        factors = (self.clip / (norms + 1e-6)).clamp(max=1)
        for parameter, gradients in zip(trainable, by_example, strict=True):
            total = torch.einsum("b,b...->...", factors, gradients)
            drawn = torch.randn(total.shape, generator=generator, device=total.device)
            parameter.grad = (total + self.noise * self.clip * drawn) / len(images)
        self._account.steps += 1
        return losses.mean(), logits

    def state(self) -> dict[str, Tensor]:
        """The account."""
        account = self._account
        return {"account": torch.tensor([account.examples, account.epochs, account.steps])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        account = self._account
        account.examples, account.epochs, account.steps = state["account"].tolist()

    def report(self) -> dict[str, Any]:
        """What is promised; None where nothing is."""
        account = self._account
        exact = gaussian_epsilon(account.epochs, self.noise, self.delta)
        sampled: float | None = None
        if self.noise and account.steps:
            rate = min(1.0, account.batch_size / account.examples)
            sampled = sampled_epsilon(account.steps, self.noise, rate, self.delta)
        return {
            "epsilon": exact if math.isfinite(exact) else None,
            "epsilon_if_sampled": sampled,
            "delta": self.delta,
            "epochs": account.epochs,
            "steps": account.steps,
        }


def gaussian_epsilon(times: int, noise: float, delta: float) -> float:
    """Epsilon, at `delta`, of so many uses of the Gaussian mechanism on a sum of sensitivity 1.

    The uses together are as private as one with the noise divided by the root of their number; its delta is
    Phi(m/2 - e/m) - exp(e) Phi(-m/2 - e/m), with m = root(times) / noise.

    Arguments:
        times: how many, each may depend on the results before.
        noise: the deviation; infinity where it is 0.
        delta: in (0, 1).

    >>> round(gaussian_epsilon(1, 1.0, 1e-5), 3)
    4.377
    """
    if not times:
        return 0.0
    if noise == 0:
        return math.inf
    strength = math.sqrt(times) / noise

    def spent(epsilon: float) -> float:
        above, below = (
            float(torch.special.log_ndtr(torch.tensor(point, dtype=torch.float64)))
            for point in (strength / 2 - epsilon / strength, -strength / 2 - epsilon / strength)
        )
        return math.exp(above) - math.exp(min(epsilon + below, 0.0))

    low, high = 0.0, 1.0
    while spent(high) > delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


def sampled_epsilon(steps: int, noise: float, rate: float, delta: float) -> float:
    """Epsilon, at `delta`, of so many steps on batches drawn by Poisson sampling, as it is usually reported.

    Opacus's Rényi divergences at many orders, turned into epsilons by theorem 21 of Balle et al. (2020, arXiv
    1905.09982), of which the least counts.

    Arguments:
        steps: 1 or more.
        noise: deviation of the noise over the largest norm, above 0.
        rate: of the sampling, in (0, 1].
        delta: in (0, 1).
    """
    orders = [1 + tenth / 10 for tenth in range(1, 110)] + [float(order) for order in range(12, 257)]
    spent = _opacus().accountants.analysis.rdp.compute_rdp(
        q=rate, noise_multiplier=noise, steps=steps, orders=orders
    )
    return min(
        float(divergence) + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        for order, divergence in zip(orders, spent, strict=True)
    )


def _opacus() -> Any:
    try:
        import opacus
        import opacus.accountants.analysis.rdp
    except ImportError:
        raise MissingExtraError(
            "dp-sgd needs Opacus, which is not installed; pip install 'unpoison[dp]'"
        ) from None
    return opacus
