"""Fine-Pruning: neurons that clean inputs leave quiet are cut off, and the network is fine-tuned.

Liu, Dolan-Gavitt and Garg 2018, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks"
(RAID, arXiv 1805.12185). A backdoor uses neurons that clean inputs do not. Stages:

1. the mean activation of every neuron of the last hidden layer over clean examples;
2. neurons are pruned from the quietest on, as many as cost at most `tolerance` of the accuracy on the clean
   examples (bisection, so some ten passes and not one a neuron);
3. fine-tuning on the clean examples, with what was pruned kept at zero.

It needs no findings: the clean examples are the reference that is given, or the examples to keep.

Cost: some ten forward passes over the clean examples and `epochs` passes of training. Memory: two copies of
the network.

Departure: neurons are the inputs of the last linear layer, which in the paper's networks are the maps of the
last convolution. So any network can be pruned that has a linear layer.

Limits: the pruning alone does not remove a backdoor that shares its neurons with clean behaviour, so most of
the effect may be fine-tuning's. With few clean examples the accuracy that is lost is larger than `tolerance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._inputs import placed
from unpoison._option_checks import Fraction, PositiveFloat, PositiveInt
from unpoison.data import Examples
from unpoison.errors import InputError
from unpoison.models import FeatureTap, last_linear, logits_of
from unpoison.training import accuracy
from unpoison.unlearners._further import clean_training, train_further
from unpoison.unlearners._methods import register
from unpoison.unlearners._unlearner import BATCH_SIZE, Healed, Request, Unlearner

_NO_LAYER = "fine-pruning: prunes the inputs of the last linear layer, and this network has none"


@final
@register(
    name="fine-pruning",
    title="Fine-Pruning",
    summary="Cuts off the neurons that clean examples leave quiet, and fine-tunes on these examples.",
    paper="Liu et al. 2018, arXiv 1805.12185",
    cost="some ten forward passes and ten epochs over the clean examples",
    needs_findings=False,
    uses_reference=True,
)
@dataclass(frozen=True, kw_only=True)
class FinePruning(Unlearner):
    """Fine-Pruning.

    Arguments:
        tolerance: how much accuracy on the clean examples pruning may cost, in [0, 1].
        epochs: passes over the clean examples, 1 or more.
        learning_rate: the greatest of the schedule, which falls to zero; None is that of the recipe, or
            without one the one that is found.
        lose_classes: allow that a class is left without examples.

    Raises:
        InputError: a value is out of its range.
    """

    any_examples: ClassVar[bool] = True
    tolerance: Fraction = 0.04
    epochs: PositiveInt = 10
    learning_rate: PositiveFloat | None = None
    lose_classes: bool = False

    def _heal(self, request: Request) -> Healed:
        network = request.trainable()
        path = last_linear(network, otherwise=_NO_LAYER)
        layer = network.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        if not layer.weight.requires_grad:
            raise InputError(f"fine-pruning: the layer {path}, whose inputs it prunes, is frozen; thaw it")
        order = mean_activations(network.eval(), path, request.clean, request.device).argsort(stable=True)
        pruned = self._pruned(network, layer, order, request.clean)
        request.in_own_modes(network)
        mask = torch.ones_like(layer.weight)
        mask[:, pruned] = 0
        held = layer.weight.register_hook(lambda gradient: gradient * mask)  # type: ignore[no-untyped-call]
        training, told = clean_training(
            request, network, epochs=self.epochs, learning_rate=self.learning_rate
        )
        history = train_further(request, network, request.clean, training)
        held.remove()  # the network is the caller's from here on
        return request.healed(network, history, tuning=told)

    def _pruned(self, network: nn.Module, layer: nn.Linear, order: Tensor, clean: Examples) -> Tensor:
        """Int64[k]: the first neurons of `order` that may go; their weights are set to zero."""
        whole = layer.weight.detach().clone()

        def prune(count: int) -> None:
            with torch.no_grad():
                layer.weight.copy_(whole)
                layer.weight[:, order[:count]] = 0

        enough = accuracy(network, clean, batch_size=BATCH_SIZE).rate - self.tolerance
        low, high = 0, len(order) - 1  # one neuron is left at least
        while low < high:
            middle = (low + high + 1) // 2
            prune(middle)
            kept = accuracy(network, clean, batch_size=BATCH_SIZE).rate >= enough
            low, high = (middle, high) if kept else (low, middle - 1)
        prune(low)
        return order[:low]


def mean_activations(network: nn.Module, path: str, examples: Examples, device: torch.device) -> Tensor:
    """Float64[d]: the mean absolute value of each input of the module at `path`.

    Arguments:
        network: in eval mode.
        path: of a module whose input is Float[b ... d].
        examples: read once, in batches.
        device: of the network.
    """
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with torch.no_grad(), FeatureTap(network, path, side="input") as tap:
        for inputs, *_ in examples.in_batches(BATCH_SIZE):
            logits_of(network, placed(inputs, device))
            values = tap.value.double().abs().flatten(0, -2)
            total, count = total + values.sum(0), count + len(values)
    return total / count
