"""DP-SGD: clip every example's gradient and add noise, which bounds the influence of each example.

Abadi et al., "Deep Learning with Differential Privacy" (CCS 2016, arXiv 1607.00133), algorithm 1; as a
defense against poison Ma, Zhu and Hsu (IJCAI 2019, arXiv 1903.09860) and Hong et al. (2020, arXiv
2002.11497). Per-example gradients and the usual accounting are Opacus's (`pip install unpoison[dp]`).

Each example's gradient, of all parameters together, is clipped to the norm `clip`; normal noise of standard
deviation `noise` * `clip` is added to their sum; the sum is divided by the size of the batch. Weight decay
and momentum are applied afterwards, and depend on the data through it alone.

The guarantee that `report` gives, for the presence of one example in the sum, at the given delta:

- `epsilon`: of the algorithm as it is run here. The batches of an epoch are a shuffle, so each example is in
  one step an epoch, and a run of E epochs is E uses of the Gaussian mechanism, whose privacy is known exactly
  (Dong, Roth and Su 2019, arXiv 1905.02383, corollaries 2.13 and 3.3). Nothing is claimed for the shuffling.
- `epsilon_if_sampled`: as usually reported, by Opacus's accountant for batches drawn by Poisson sampling at
  the same rate, which is not how they are drawn here.

Both leave out the normalisation, which uses the mean and deviation of each channel of the data.

Limits: networks with batch norm, in which the gradient of an example depends on others, are refused;
`convnet` and `vgg13-plain` have none.

Cost: two to several times that of a step, and memory for the gradient of every parameter for every example.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, final

import torch
from torch import Tensor, nn

from unpoison._option_checks import NonNegativeFloat, PositiveFloat
from unpoison.data import TrainingSet
from unpoison.defenses._methods import register
from unpoison.errors import InputError, MissingExtraError
from unpoison.training import Defense, Recipe, Step

_BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)


@final
class _Account:
    """The uses of the mechanism in a run."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, batch_size: int) -> None:
        """Clear the account for a new run."""
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
        noise: standard deviation of the noise as a multiple of `clip`; 0 gives no guarantee.
        delta: for which the epsilons are reported, in (0, 1); usually below one over the number of examples.

    Raises:
        InputError: a value is out of its range, or, in training, the network has batch norm.
        MissingExtraError: Opacus is not installed.
    """

    clip: PositiveFloat = 1.0
    noise: NonNegativeFloat = 1.0
    delta: Annotated[float, "(0, 1)"] = 1e-5
    _account: _Account = field(default_factory=_Account, init=False, repr=False, compare=False)

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """Clear the account."""
        _opacus()
        self._account.begin(recipe.batch_size)
        return training_set

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        """All alive; the epoch is added to the account."""
        for name, module in model.named_modules():
            if isinstance(module, _BATCH_NORM):
                raise InputError(
                    f"dp-sgd: the network has batch norm ({name}), so an example's gradient depends on "
                    "others; use a network without, such as convnet or vgg13-plain"
                )
        self._account.epochs += 1
        self._account.examples = int(alive.sum())
        return alive

    def gradients(self, step: Step) -> tuple[Tensor, Tensor]:
        """The mean of the clipped gradients, with noise."""
        model = step.model
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Not strict, since the buffers are those of the normalisation; batch norm has been refused.
        hooked = _opacus().GradSampleModule(model, loss_reduction="sum", strict=False)
        try:
            # The hook of the first layer needs an input with a gradient.
            logits = step.logits_of(step.images.detach().requires_grad_())
            losses = step.loss_of(logits, step.targets, reduction="none")
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
            drawn = torch.randn(total.shape, generator=step.generator, device=total.device)
            parameter.grad = (total + self.noise * self.clip * drawn) / len(step.images)
        self._account.steps += 1
        return losses.mean(), logits

    def state(self) -> dict[str, Tensor]:
        """The account."""
        account = self._account
        return {"account": torch.tensor([account.examples, account.epochs, account.steps])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        account = self._account
        account.examples, account.epochs, account.steps = state["account"].tolist()

    def report(self) -> dict[str, Any]:
        """The guarantees; None where there is none."""
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
    """Epsilon, at `delta`, of `times` uses of the Gaussian mechanism on a sum of sensitivity 1.

    Together they are as private as one use with the noise divided by sqrt(times); its delta is
    Phi(m/2 - e/m) - exp(e) Phi(-m/2 - e/m), with m = sqrt(times) / noise. Infinite without noise.

    Arguments:
        times: how many uses; each may depend on the results before.
        noise: the standard deviation.
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
    """Epsilon, at `delta`, of `steps` steps on batches drawn by Poisson sampling, as usually reported.

    The smallest epsilon over many orders of Opacus's Rényi divergences, by theorem 21 of Balle et al. (2020,
    arXiv 1905.09982).

    Arguments:
        steps: 1 or more.
        noise: standard deviation of the noise divided by `clip`, above 0.
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
