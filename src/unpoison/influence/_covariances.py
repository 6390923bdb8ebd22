"""The covariances of a layer, A = E[a a^T] of its inputs and S = E[g g^T] of its output gradients, and their
eigenvectors.

Both are symmetric, so that their upper triangles alone are computed. The input of a convolution is a patch of
k positions with c channels, and A has a block of c x c numbers for each pair (u, v) of positions of the
kernel: the sum over output positions t of x[t + u] x[t + v]^T. Formed from patches that takes (k c)^2
multiplications an output position, nine times the forward pass for a 3x3 kernel. But blocks with the same
difference v - u are sums of the same products, over windows of the map that differ in a few lines at its
border. `PatchProducts` computes one sum for each difference (13 for a 3x3 kernel, in place of 81), and
subtracts the lines. The result is the same up to rounding, and patches are never formed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Tensor, nn

from unpoison.errors import InputError
from unpoison.influence._diagonal_layers import TableRows
from unpoison.influence._layers import ConvLayer, Layer, Scratch
from unpoison.influence._shards import Shard
from unpoison.influence._sweep import Sweeper, Visitor

_FEWEST_CHANNELS: Final = 16
_MOST_POSITIONS: Final = 25


@final
class Covariances(Visitor):
    """Sums of a a^T and g g^T; those of Kronecker layers, in their upper triangles alone."""

    def __init__(self, layers: Sequence[Layer], sweeper: Sweeper) -> None:
        def squares(layer: Layer, width: int) -> Tensor:
            groups = layer.shape[0] if layer.kronecker else 0
            return torch.zeros(groups, width, width, device=sweeper.device, dtype=sweeper.dtype)

        self.inputs = [squares(layer, layer.shape[2]) for layer in layers]
        self.outputs = [squares(layer, layer.shape[1]) for layer in layers]
        self.layers, self.workspace, self.scratch = layers, sweeper.workspace, sweeper.scratch
        self.patches = {
            index: PatchProducts(layer.conv, bool(layer.biases), self.inputs[index][0])
            for index, layer in enumerate(layers)
            if isinstance(layer, ConvLayer) and len(layer.modules) == 1
            if isinstance(layer.conv, nn.Conv2d) and _is_correlation(layer.conv)
        }

    def whole(self, index: int, inputs: Tensor, output_gradient: Tensor) -> bool:
        """A convolution without stride is summed from its maps."""
        if index not in self.patches:
            return False
        rows = output_gradient.movedim(1, -1).flatten(0, -2)
        add_gram_(self.outputs[index][0], rows)
        numbers = inputs[0].numel() * inputs.element_size()
        step = max(1, self.workspace // (2 * numbers))
        for start in range(0, len(inputs), step):
            part = slice(start, start + step)
            self.patches[index].add(inputs[part], output_gradient.shape[2:], self.scratch)
        return True

    def kronecker(self, index: int, start: int, activations: Tensor, output_gradients: Tensor) -> None:
        for total, part in ((self.inputs[index], activations), (self.outputs[index], output_gradients)):
            rows = part.transpose(0, 1).flatten(1, 2)
            if len(rows) == 1:  # a plain product uses all threads, a batch of one does not
                add_gram_(total[0], rows[0])
            else:
                total.baddbmm_(rows.transpose(1, 2), rows)

    def diagonal(self, index: int, start: int, gradient: Tensor) -> None:
        pass

    def table_rows(self, index: int, start: int, rows: TableRows) -> bool:
        """Nothing is needed of a diagonal layer."""
        return True

    def finish(self) -> None:
        """Put together what is kept by differences of positions."""
        for products in self.patches.values():
            products.finish()


def add_gram_(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows of Float[n i] to the upper triangle of Float[i i]; some below it, too."""
    width = rows.shape[1]
    step = max(128, -(-width // 8))
    for start in range(0, width, step):
        total[start : start + step, start:].addmm_(rows[:, start : start + step].t(), rows[:, start:])


def _is_correlation(conv: nn.Conv2d) -> bool:
    return (
        conv.groups == 1
        and set(conv.stride) == {1}
        and (conv.padding_mode == "zeros" or max(conv._reversed_padding_repeated_twice) == 0)
        and 1 < math.prod(conv.kernel_size) <= _MOST_POSITIONS
        and conv.in_channels >= _FEWEST_CHANNELS
    )


Window = tuple[int, int, int, int]
"""Rows and columns of a map: first and last + 1 of each."""
Difference = tuple[int, int]


@final
@dataclass
class _Plan:
    """Which sums are taken for maps of one size, and which blocks of A they are.

    Arguments:
        sums: by difference and window.
        of: for each pair of kernel positions (u <= v) what its block is: a sum, less others.
        own: the window of each kernel position.
        outputs: the number of output positions of an example.
    """

    sums: dict[tuple[Difference, Window], Tensor] = field(default_factory=dict)
    of: dict[tuple[int, int], list[tuple[Difference, Window]]] = field(default_factory=dict)
    own: list[Window] = field(default_factory=list)
    outputs: int = 0


@final
class PatchProducts:
    """The sum over all patches of a a^T, for a 2-D convolution of stride 1 with zero padding.

    Arguments:
        conv: the convolution.
        bias: whether a 1 is appended to each patch.
        total: Float[i i], whose upper triangle `finish` adds to.
    """

    def __init__(self, conv: nn.Conv2d, bias: bool, total: Tensor) -> None:
        self.total, self.bias, self.channels = total, bias, conv.in_channels
        left, _, top, _ = conv._reversed_padding_repeated_twice
        rows, columns = (
            [place * gap - low for place in range(width)]
            for width, gap, low in zip(conv.kernel_size, conv.dilation, (top, left), strict=True)
        )
        self.places = list(itertools.product(rows, columns))
        self.gap = columns[-1] - columns[0]
        self._size: tuple[int, ...] = ()
        self._plan = _Plan()
        self._ones = total.new_zeros(len(self.places) + 1, self.channels)

    def add(self, inputs: Tensor, outputs: torch.Size, scratch: Scratch) -> None:
        """Add the patches of Float[b c h w], whose outputs are of this size."""
        b, c, h, w = inputs.shape
        if self._size != (h, w, *outputs):
            self.finish()
            self._size, self._plan = (h, w, *outputs), self._planned(h, w, outputs)
        # Examples lie next to each other, so that a shift of the maps is a shift of rows. Columns of zeros at
        # the end of each line keep what is shifted past it from meeting the next line.
        maps = scratch.take("maps", (h, w + self.gap, b, c), inputs)
        maps[:, w:] = 0
        maps[:, :w] = inputs.permute(2, 3, 0, 1)
        flat = maps.view(-1, c)
        for (difference, window), total in self._plan.sums.items():
            down, right = difference
            top, bottom, left, end = window
            if window == _complete(difference, h, w):
                offset = (down * (w + self.gap) + right) * b
                total.addmm_(flat[: len(flat) - offset].t(), flat[offset:])
            else:
                one = maps[top:bottom, left:end].reshape(-1, c)
                other = maps[top + down : bottom + down, left + right : end + right].reshape(-1, c)
                total.addmm_(one.t(), other)
        if self.bias:
            for place, (top, bottom, left, end) in enumerate(self._plan.own):
                self._ones[place] += maps[top:bottom, left:end].sum((0, 1, 2))
            self._ones[-1, 0] += b * self._plan.outputs

    def _planned(self, h: int, w: int, outputs: torch.Size) -> _Plan:
        plan = _Plan(outputs=math.prod(outputs))
        wanted: dict[Difference, dict[tuple[int, int], Window]] = {}
        for (u, one), (v, other) in itertools.combinations_with_replacement(enumerate(self.places), 2):
            difference = (other[0] - one[0], other[1] - one[1])
            window = (
                max(0, one[0], -difference[0]),
                min(h, one[0] + outputs[0], h - difference[0]),
                max(0, one[1], -difference[1]),
                min(w, one[1] + outputs[1], w - difference[1]),
            )
            if window[0] < window[1] and window[2] < window[3]:
                wanted.setdefault(difference, {})[u, v] = window
            if u == v:
                plan.own.append(window)
        for difference, windows in wanted.items():
            lows, highs = (0, 2), (1, 3)
            around = [0] * 4
            for side in lows:
                around[side] = min(window[side] for window in windows.values())
            for side in highs:
                around[side] = max(window[side] for window in windows.values())
            for pair, window in windows.items():
                top, bottom, left, end = around
                parts = [
                    (top, bottom, left, end),
                    (top, window[0], left, end),
                    (window[1], bottom, left, end),
                    (window[0], window[1], left, window[2]),
                    (window[0], window[1], window[3], end),
                ]
                plan.of[pair] = [
                    (difference, part) for part in parts if part[0] < part[1] and part[2] < part[3]
                ]
                for key in plan.of[pair]:
                    if key not in plan.sums:
                        plan.sums[key] = self.total.new_zeros(self.channels, self.channels)
        return plan

    def finish(self) -> None:
        """Add what was summed to the total."""
        c, k = self.channels, len(self.places)
        blocks = self.total[: k * c, : k * c].view(k, c, k, c)
        for (u, v), (first, *less) in self._plan.of.items():
            block = blocks[u, :, v]
            block += self._plan.sums[first]
            for key in less:
                block -= self._plan.sums[key]
        if self.bias:
            self.total[: k * c, -1] += self._ones[:-1].flatten()
            self.total[-1, -1] += self._ones[-1, 0]
            self._ones.zero_()
        self._plan = _Plan()
        self._size = ()


def _complete(difference: Difference, h: int, w: int) -> Window:
    """Where a position and the one that is `difference` from it lie inside the map."""
    down, right = difference
    return (0, h - down, max(0, -right), min(w, w - right))


def eigenbases_(layer: Layer, pair: tuple[Tensor, Tensor], shard: Shard, place: int) -> None:
    """Replace A and S, whose upper triangles are read, by their eigenvectors.

    In a process group each layer is computed by one process. Float64[i i] takes four times its memory.
    """
    if place % shard.world != shard.rank:
        return
    for total in pair:
        for one in total:
            # Eigenvectors do not depend on the scale; divided by it the entries are of order 1.
            matrix = one.double()
            matrix /= matrix.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
            if not bool(torch.isfinite(matrix.triu()).all()):
                raise InputError(
                    f"module {layer.name}: activations or gradients are not finite; does its loss overflow?"
                )
            one.copy_(torch.linalg.eigh(matrix, UPLO="U")[1])
