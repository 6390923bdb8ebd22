"""`nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells in steps, so that their products can be read.

torch computes a whole sequence in one function. Within `recurrent_in_steps` each weight is held by a Linear
that is called for every position (the input weights once for all of them): the same numbers up to rounding.
A per-example gradient is then a sum over positions, as for any layer that is called several times.

Cost: a loop in Python over positions. Packed sequences and inputs without a batch are computed by torch's own
function, and their weights are not tracked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from unpoison.influence._layers import Member

SEQUENCES = (nn.RNN, nn.LSTM, nn.GRU)
CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)


def is_recurrent(module: nn.Module) -> bool:
    """Whether this is a recurrent layer or cell of torch's own, with its weights as parameters."""
    own = [kind for kind in (*SEQUENCES, *CELLS) if isinstance(module, kind)]
    return (
        bool(own)
        and type(module).forward is own[0].forward
        and all(name in module._parameters for names in _names(module) for name in names if name)
    )


def recurrent_members(module: nn.Module, prefix: str) -> list[tuple[str, Member]]:
    """Each weight with the Linear that holds it, by the weight's name in the module."""
    return [
        (weight, _member(module, weight, bias, prefix))
        for names in _names(module)
        for weight, bias in ((names[0], names[2]), (names[1], names[3]), (names[4], ""))
        if weight
    ]


def _names(module: nn.Module) -> list[tuple[str, str, str, str, str]]:
    """Input and hidden weight, their biases and the projection of each layer and direction; "" for none."""
    if isinstance(module, CELLS):
        biases = ("bias_ih", "bias_hh") if module.bias else ("", "")
        return [("weight_ih", "weight_hh", *biases, "")]
    assert isinstance(module, SEQUENCES)
    ends = ("", "_reverse") if module.bidirectional else ("",)
    return [
        (
            f"weight_ih_l{layer}{end}",
            f"weight_hh_l{layer}{end}",
            f"bias_ih_l{layer}{end}" if module.bias else "",
            f"bias_hh_l{layer}{end}" if module.bias else "",
            f"weight_hr_l{layer}{end}" if module.proj_size else "",
        )
        for layer in range(module.num_layers)
        for end in ends
    ]


def _member(module: nn.Module, weight: str, bias: str, prefix: str) -> Member:
    held, own = module.get_parameter(weight), module.get_parameter(bias) if bias else None
    linear = nn.Linear(held.shape[1], held.shape[0], bias=own is not None, device="meta")
    linear.weight = held
    if own is not None:
        linear.bias = own
    return Member(linear, f"{prefix}{weight}", f"{prefix}{bias}" if bias else None)


@contextlib.contextmanager
def recurrent_in_steps(model: nn.Module, packed: dict[int, nn.Module]) -> Iterator[None]:
    """Within the block recurrent layers of which a weight is tracked compute step by step.

    Arguments:
        model: any network; left as it was.
        packed: the Linear to call for a weight, by the `id` of the weight.
    """
    changed = []
    try:
        for module in model.modules():
            if not is_recurrent(module) or "forward" in vars(module):
                continue
            held = {one.weight: one.module for _, one in recurrent_members(module, "")}
            tracked = {name: packed.get(id(module.get_parameter(name))) for name in held}
            if any(one is not None for one in tracked.values()):
                linears = {name: tracked[name] or held[name] for name in held}
                directions = [
                    _Direction(*(linears.get(one) for one in (names[0], names[1], names[4])))
                    for names in _names(module)
                ]
                steps = _CellSteps if isinstance(module, CELLS) else _SequenceSteps
                object.__setattr__(module, "forward", steps(module, directions))
                changed.append(module)
        yield
    finally:
        for module in changed:
            object.__delattr__(module, "forward")


@final
@dataclass(frozen=True)
class _Direction:
    """What one layer computes with in one direction; `projection` of an LSTM with `proj_size`."""

    inputs: Any
    hidden: Any
    projection: Any = None

    def step(self, mode: str, given: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The next hidden and cell state, from the product of the input at this position."""
        h, c = state
        own = self.hidden(h)
        if mode == "LSTM":
            i, f, g, o = (given + own).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return h if self.projection is None else self.projection(h), c
        if mode == "GRU":
            (r, z, n), (r_own, z_own, n_own) = given.chunk(3, -1), own.chunk(3, -1)
            n = (n + (r + r_own).sigmoid() * n_own).tanh()
            return n + (z + z_own).sigmoid() * (h - n), c
        total = given + own
        return total.relu() if mode == "RNN_RELU" else total.tanh(), c


class _SequenceSteps:
    """The forward of one recurrent layer."""

    def __init__(self, module: nn.Module, directions: list[_Direction]) -> None:
        self.module, self.directions = module, directions

    def __call__(self, input: Any, hx: Any = None) -> Any:
        module: Any = self.module
        if not isinstance(input, Tensor) or input.ndim != 3:
            return type(module).forward(module, input, hx)
        x = input if module.batch_first else input.transpose(0, 1)
        count, layers = len(x), len(self.directions)
        if hx is None:
            first = x.new_zeros(layers, count, module.proj_size or module.hidden_size)
            cells = x.new_zeros(layers, count, module.hidden_size)
        else:
            first, cells = hx if module.mode == "LSTM" else (hx, hx)
        sides = 2 if module.bidirectional else 1
        last = []
        for layer in range(module.num_layers):
            outputs = []
            for side in range(sides):
                place = layer * sides + side
                output, state = self._over(x, place, (first[place], cells[place]), backwards=side == 1)
                outputs.append(output)
                last.append(state)
            x = torch.cat(outputs, -1)
            if module.dropout and module.training and layer < module.num_layers - 1:
                x = functional.dropout(x, module.dropout)
        output = x if module.batch_first else x.transpose(0, 1)
        h, c = (torch.stack(part) for part in zip(*last, strict=True))
        return output, ((h, c) if module.mode == "LSTM" else h)

    def _over(
        self, x: Tensor, place: int, state: tuple[Tensor, Tensor], *, backwards: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Hidden states [b t h] at all positions, and the last state."""
        direction, mode = self.directions[place], str(self.module.mode)
        given, found = direction.inputs(x), {}
        positions = range(x.shape[1])
        for position in reversed(positions) if backwards else positions:
            state = direction.step(mode, given[:, position], state)
            found[position] = state[0]
        return torch.stack([found[position] for position in positions], 1), state


class _CellSteps:
    """The forward of one recurrent cell."""

    def __init__(self, module: nn.Module, directions: list[_Direction]) -> None:
        self.module, self.directions = module, directions

    def __call__(self, input: Tensor, hx: Any = None) -> Any:
        module: Any = self.module
        if input.ndim != 2:
            return type(module).forward(module, input, hx)
        zeros = input.new_zeros(len(input), module.hidden_size)
        if isinstance(module, nn.LSTMCell):
            state = (zeros, zeros) if hx is None else hx
            return self.directions[0].step("LSTM", self.directions[0].inputs(input), state)
        mode = "GRU" if isinstance(module, nn.GRUCell) else f"RNN_{module.nonlinearity.upper()}"
        state = (zeros if hx is None else hx, zeros)
        return self.directions[0].step(mode, self.directions[0].inputs(input), state)[0]
