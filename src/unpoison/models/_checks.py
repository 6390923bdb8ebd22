"""What a network must be for its gradients to be read, checked before anything is computed.

Every refusal is one line that says what was found, in which module, and what to give instead.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unpoison._inputs import Inputs, count_of, placed
from unpoison.errors import InputError
from unpoison.models._forward import (
    Values,
    device_of,
    forward,
    logits_in,
    logits_of,
)
from unpoison.models._preserved import preserved


def check_network(model: object, *, gradients: bool = True) -> None:
    """That the network is one whose layers can be read, and, with `gradients`, differentiated.

    Arguments:
        model: as it was given.
        gradients: False where outputs and features are read alone.

    Raises:
        InputError: it is not a `torch.nn.Module`; it is TorchScript or an exported program; it has lazy
            modules that have not run, no parameters, batch norm without running statistics, or, with
            `gradients`, quantised layers.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    for name, module in model.named_modules():
        told = _unreadable(module, gradients)
        if told is not None:
            raise InputError(f"model: {f'module {name} ' if name else ''}{told}")
    if next(model.parameters(), None) is None:
        raise InputError("model: has no parameters, so no training example has influence on it")


def _unreadable(module: nn.Module, gradients: bool) -> str | None:
    """What is wrong with one module by itself."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript, whose layers cannot be read; give the Python network that it was made from"
    if isinstance(module, torch.fx.GraphModule) and "eval" in vars(module):
        return "is an exported program, whose layers cannot be read; give the network that was exported"
    own = (*module._parameters.values(), *module._buffers.values())
    if any(is_lazy(one) for one in own if one is not None):
        return "is lazy and has not run yet; call the network on one batch first"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        return (
            "is batch norm without running statistics, which mixes the examples of a batch; "
            "set track_running_stats and train the network with it"
        )
    kind = type(module).__module__
    if gradients and kind.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        return "is quantised and has no gradients; give the network before quantisation"
    return None


def check_outputs(model: nn.Module, inputs: Inputs, *, classes: int) -> None:
    """That the model gives a logit for each class, as far as one forward pass shows.

    Arguments:
        model: left as it was.
        inputs: of a few dozen examples, as `forward` takes them.
        classes: how many classes the labels are of.

    Raises:
        InputError: the model fails on the inputs, returns no logits or fewer than classes, or probabilities.
    """
    given = placed(inputs, device_of(model))
    if isinstance(given, Tensor) and given.is_floating_point():
        given = given.detach().clone().requires_grad_()  # for the graph, also of a frozen network
    with preserved(model), torch.inference_mode(False), torch.enable_grad():
        output = forward(model, given)
    logits, count = logits_in(output), count_of(inputs)
    if len(logits) != count:
        raise InputError(f"model: returns {len(logits)} rows of logits for {count} inputs")
    if logits.shape[1] < classes:
        raise InputError(
            f"model: gives {logits.shape[1]} logits for {classes} classes; give the data that it was "
            "trained on, or a model for these classes"
        )
    if not isinstance(model, OutputLogits) and _look_like_probabilities(output, logits):
        raise InputError(
            "model: returns what looks like probabilities, not logits (all are in [0, 1] and add up to 1); "
            'leave the last softmax or sigmoid out, or give task=ClassificationTask(values="probabilities"), '
            'or "logits" if they are logits'
        )


def _look_like_probabilities(output: object, logits: Tensor) -> bool:
    if isinstance(output, Tensor) and output.numel() == len(logits):  # one number an example
        inside = bool(((output >= 0) & (output <= 1)).all())
        return inside and _made_by(output) == "SigmoidBackward0"
    found = logits.detach().double()
    slack = 8 * float(torch.finfo(logits.dtype).eps) * logits.shape[1] + 1e-5
    return bool((found >= 0).all()) and bool(((found.sum(1) - 1).abs() <= slack).all())


def _made_by(output: Tensor) -> str:
    """The last operation in the graph of a tensor, behind changes of its shape."""
    node = output.grad_fn
    while node is not None and node.name().startswith(_OF_SHAPE) and node.next_functions:
        node = node.next_functions[0][0]
    return "" if node is None else node.name()


_OF_SHAPE = (
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Squeeze",
    "Unsqueeze",
    "Select",
    "Slice",
    "ToCopy",
    "Clone",
)


@final
class OutputLogits(nn.Module):
    """A network behind the reading of its logits, for networks whose output is not clear by itself.

    Arguments:
        network: kept as the submodule `network`.
        output: the key, attribute or place of the logits in what it returns; the one that is guessed if None.
        values: what the numbers are.
    """

    def __init__(
        self, network: nn.Module, *, output: str | int | None = None, values: Values = "logits"
    ) -> None:
        super().__init__()
        self.network, self.output, self.values = network, output, values
        self.training = network.training

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Float[b classes] logits."""
        return logits_of(self.network, named if named else inputs[0], output=self.output, values=self.values)
