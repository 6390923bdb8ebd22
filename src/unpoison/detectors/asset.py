"""ASSET: two opposite losses cancel on clean examples, so that what is left of them marks the poison.

Pan, Zeng, Lyu, Lin and Jia, "ASSET: Robust Backdoor Data Detection Across a Multiplicity of Deep Learning
Paradigms" (USENIX Security 2023, arXiv 2302.11408). A detector network is trained, in each step on a batch of
the suspicious set and one of clean examples (the base set, 1,000 in the paper):

1. concentration (the inner loop): a network of two layers learns to tell the penultimate features of the
   suspicious batch from those of the base batch. Clean examples of the one are like those of the other;
   poison is what it can tell. The half of the suspicious batch that it is surest of goes on;
2. offset (the outer loop): the detector network descends the loss on the base batch and ascends it on what
   goes on. On clean examples the two cancel; on poison the ascent alone is left. The loss needs no label: the
   variance of an example's outputs;
3. decision: the losses of all suspicious examples under the detector network are two groups. A mixture of two
   normal distributions is fitted to them, and the examples of the higher one are flagged.

The score is the logarithm of the odds of the higher group. Nothing is flagged where one normal distribution
explains the losses as well (Bayesian information criterion), or where the higher group has more than half of
the examples.

Departures: the loss is log(1 + variance), so that the ascent stays finite. The detector network starts as a
copy of the given model, which is also where features are read. The condition under which nothing is flagged
is ours, and so are learning rates and sizes of batches. Without a `reference` the base set is drawn from the
suspicious set, so that what it holds of the poison is offset, too. Presets: `original` makes ten passes over
the set, the paper's number as we remember it; `quick`, ours and the default, a fixed number of steps.

Cost: two forward passes over the set and one over the base set, and forward and backward passes of 1.5
`batch_size` examples a step. Memory: the features of all examples, a copy of the model with gradients and
momentum, the activations of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from unpoison._global_randomness import own_randomness
from unpoison._inputs import joined, placed
from unpoison._option_checks import PositiveFloat, PositiveInt, check_options
from unpoison._seeds import derive_seed, generator
from unpoison.data import Examples
from unpoison.detectors._estimates import Measured
from unpoison.detectors._findings import Findings
from unpoison.detectors._methods import register
from unpoison.detectors._search import Search, Searcher
from unpoison.detectors._trainable import finite_answers, random_order, trainable_copy
from unpoison.influence import Parts
from unpoison.models import logits_of
from unpoison.registry import Presets
from unpoison.training import in_training_mode, training_bytes

_HIDDEN: Final = 128
_INNER_RATE: Final = 0.01
_CLIPPED: Final = 1.0
_ROUNDS: Final = 300
_LEAST_VARIANCE: Final = 1e-6


@final
@register(
    name="asset",
    title="ASSET",
    summary="Flags examples whose loss is left where two opposite losses cancel on clean ones.",
    paper="Pan et al. 2023, arXiv 2302.11408",
    cost="training a copy of the model",
    presets=("quick", "original"),
    can_find_nothing=True,
    uses_reference=True,
)
@dataclass(frozen=True, kw_only=True)
class Asset(Searcher):
    """Flag the examples that two opposite losses separate.

    Arguments:
        steps: of the outer loop; None for `epochs` over the set.
        epochs: passes over the set, where `steps` is None.
        inner_steps: of the inner loop, in each step.
        concentrated: the share of a suspicious batch that goes on.
        base_size: how many clean examples are used at most.
        learning_rate: of the outer loop's stochastic gradient descent.
        momentum: of it.
        module: the module whose input is read as features; the network's last layer by default.
        batch_size: suspicious examples a step, and as many clean ones; also of a scoring pass.
    """

    PRESETS: ClassVar[Presets] = {"quick": {}, "original": {"steps": None}}

    steps: PositiveInt | None = 300
    epochs: PositiveInt = 10
    inner_steps: PositiveInt = 4
    concentrated: Annotated[float, "(0, 1]"] = 0.5
    base_size: PositiveInt = 1000
    learning_rate: PositiveFloat = 0.005
    momentum: Annotated[float, "[0, 1)"] = 0.9
    module: str | None = None
    batch_size: PositiveInt = 128

    def __post_init__(self) -> None:
        check_options(self.method.name, self)

    def memory_needed(self, measured: Measured) -> Parts:
        """See `Detector.memory_needed`."""
        copied = sum(one.nbytes for one in (*measured.model.parameters(), *measured.model.buffers()))
        step = training_bytes(measured.model, measured.activations, batch_size=2 * self.batch_size)
        features = measured.features(self, measured.examples + self.base_size)
        return {"copy of the model": copied, "features": features["features"], **step}

    def search(self, search: Search) -> Findings:
        """See the module's docstring."""
        clean = search.clean
        order = random_order(search.seed, self.method.name, "base", count=len(clean))
        most = self.base_size if search.reference is not None else max(1, len(clean) // 3)
        base = clean.subset(order[: min(self.base_size, most)])
        network = self._separated(search, base)
        logits = finite_answers(network, search.training_set, self.batch_size)
        losses = variance_loss(logits.double())
        odds = higher_group(losses)
        how = "the losses are two groups, by a mixture of two normal distributions, and it is in the higher"
        if odds is None:
            # The order of the losses is kept, below the threshold.
            odds, how = losses - losses.max() - 1, "the losses are one group"
        return search.findings(
            scores=odds.clamp(-1e6, 1e6),
            threshold=0.0,
            how=how,
            words="keep a loss where two opposite losses cancel on clean ones",
            evidence={"loss": losses},
        )

    def _separated(self, search: Search, base: Examples) -> nn.Module:
        """The detector network."""
        name, suspicious = self.method.name, search.training_set
        reader = search.reader(self.module, self.batch_size)
        features = reader.all().float()
        known = reader.of(base).all().float()
        mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
        features, known = (features - mean) / scale, (known - mean) / scale
        search.lap("features")
        classifier = _classifier(features.shape[1], search.seed, features.device)
        inner = torch.optim.Adam(classifier.parameters(), lr=_INNER_RATE)
        network = trainable_copy(search.model)
        parameters = [one for one in network.parameters() if one.requires_grad]
        outer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=self.momentum)
        steps = self.steps or self.epochs * math.ceil(len(suspicious) / self.batch_size)
        in_training_mode(network)
        rows = self._rows(len(suspicious), steps, search.seed, "suspicious")
        base_rows = self._rows(len(base), steps, search.seed, "base steps")
        seed = derive_seed(search.seed, name, "network")
        with own_randomness(search.device, seed=seed, deterministic=True), torch.enable_grad():
            for step, (own, others) in enumerate(zip(rows, base_rows, strict=True), 1):
                chances = _told_apart(classifier, inner, features, known, own, others, self.inner_steps)
                kept = own[chances.topk(max(1, round(self.concentrated * len(own)))).indices.cpu()]
                given = joined([suspicious.at(kept)[0], base.at(others)[0]])
                logits = logits_of(network, placed(given, search.device)).float()
                losses = variance_loss(logits)
                loss = losses[len(kept) :].mean() - losses[: len(kept)].mean()
                outer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(parameters, _CLIPPED)
                outer.step()
                if search.progress is not None:
                    search.progress("offset", step, steps)
        search.lap("offset")
        return network.eval()

    def _rows(self, count: int, steps: int, seed: int, name: str) -> Iterator[Tensor]:
        """Int64[b] of each step, pass after pass."""
        size = min(self.batch_size, count)
        passes = math.ceil(steps * size / count)
        orders = [random_order(seed, self.method.name, name, one, count=count) for one in range(passes)]
        yield from torch.split(torch.cat(orders)[: steps * size], size)


def variance_loss(logits: Tensor) -> Tensor:
    """Float[b]: log(1 + variance) of the outputs of each example of Float[b classes].

    >>> variance_loss(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))
    tensor([0.0000, 0.6931])
    """
    return logits.var(1, correction=0).log1p()


def higher_group(values: Tensor) -> Tensor | None:
    """Float64[n]: the log-odds that each of Float64[n] values is of the higher of two groups.

    None where one normal distribution explains the values as well, or the higher group has most of them.

    >>> values = torch.cat([torch.linspace(0, 1, 50), torch.linspace(8, 9, 5)]).double()
    >>> (higher_group(values) > 0).sum()
    tensor(5)
    """
    if len(values.unique()) < 4:  # type: ignore[no-untyped-call]
        return None
    spread = float(values.std(correction=0))
    if not spread > 1e-9:
        return None
    values = (values - values.mean()) / spread
    higher, lower = _two_normals(values)
    likelihood = float(torch.logaddexp(higher.log_density, lower.log_density).sum())
    alone = -0.5 * len(values) * (1 + math.log(2 * math.pi))
    # Two means, two variances and a share, in place of a mean and a variance.
    if not likelihood - alone > 1.5 * math.log(len(values)):
        return None
    odds = higher.log_density - lower.log_density
    # A wide distribution is likelier at both ends: the lower end is not of the higher group.
    odds = torch.where(values < lower.mean, odds.clamp(max=-1e-6), odds)
    return odds if 0 < int((odds > 0).sum()) <= len(values) / 2 else None


@final
@dataclass(frozen=True, eq=False)
class _Normal:
    """A part of a mixture: its mean, and Float64[n], the logarithm of its share times its density."""

    mean: float
    log_density: Tensor


def _two_normals(values: Tensor) -> tuple[_Normal, _Normal]:
    """The higher and the lower part of a mixture of two normal distributions, by expectation-maximisation.

    Starts from the half of the range that a value is in; values are in units of their deviation.
    """
    belonging = (values > (values.min() + values.max()) / 2).double()
    parts: list[_Normal] = []
    for _ in range(_ROUNDS):
        parts = []
        for weight in (belonging, 1 - belonging):
            total = weight.sum().clamp(min=1e-9)
            mean = (weight * values).sum() / total
            variance = (weight * (values - mean).square()).sum() / total + _LEAST_VARIANCE
            density = -0.5 * ((values - mean).square() / variance + (2 * math.pi * variance).log())
            parts.append(_Normal(float(mean), density + (total / len(values)).log()))
        updated = (parts[0].log_density - parts[1].log_density).sigmoid()
        if float((updated - belonging).abs().max()) < 1e-6:
            break
        belonging = updated
    higher, lower = sorted(parts, key=lambda part: -part.mean)
    return higher, lower


def _classifier(width: int, seed: int, device: torch.device) -> nn.Module:
    """Two layers, from features to one logit."""
    with torch.random.fork_rng(devices=[]):
        layers = nn.Sequential(nn.Linear(width, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1))
    draw = generator(seed, "asset", "classifier")
    for layer in (layers[0], layers[2]):
        assert isinstance(layer, nn.Linear)
        bound = 1 / math.sqrt(layer.in_features)
        nn.init.uniform_(layer.weight, -bound, bound, generator=draw)
        nn.init.uniform_(layer.bias, -bound, bound, generator=draw)
    return layers.to(device)


def _told_apart(
    classifier: nn.Module,
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    known: Tensor,
    own: Tensor,
    others: Tensor,
    steps: int,
) -> Tensor:
    """Float[b]: how sure the classifier is of each of the suspicious rows, after some steps on the batch."""
    inputs = torch.cat([features[own.to(features.device)], known[others.to(known.device)]])
    targets = torch.zeros(len(inputs), device=inputs.device)
    targets[: len(own)] = 1
    for _ in range(steps):
        loss = functional.binary_cross_entropy_with_logits(classifier(inputs)[:, 0], targets)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
    with torch.no_grad():
        sure: Tensor = classifier(inputs[: len(own)])[:, 0]
    return sure
