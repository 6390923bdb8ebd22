"""The kinds of layers: how a per-example gradient is formed from a layer's input and output gradient.

A Kronecker layer (Linear, convolution, the packed projection of attention) sees `a` Float[b k t i] and `g`
Float[b k t o]: for each of b examples and each of k groups, t positions of i inputs and o outputs. The
gradient of one example is `sum_t g_t a_t^T`, Float[k o i]. A bias is one more input that is always 1. The
groups of a grouped convolution are blocks of their own, each with its own covariances; nothing is averaged
over groups. Modules that share one weight are one layer, whose positions are those of all calls.

The i inputs of a convolution are ordered (kernel position, channel): with channels last, patches are then
copied in runs of `kernel width * channels` numbers, and activations and output gradients are not copied at
all. Of a transposed convolution a are the inputs and g the patches of the output gradient.

A diagonal layer (`_diagonal_layers`) has few parameters or none that interact through a matrix product; its
curvature is the exact diagonal of the Fisher matrix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional


@final
class Scratch:
    """Buffers that are reused for each chunk, because allocating memory is slow.

    A buffer of `take` is overwritten by the next `take` of the same name.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape, with the type and device of `like`."""
        count = math.prod(shape)
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or len(buffer) < count
            or buffer.dtype != like.dtype
            or buffer.device != like.device
        ):
            self._buffers[name] = buffer = like.new_empty(count)
        return buffer[:count].view(*shape)


@final
@dataclass(frozen=True)
class Member:
    """A module of a layer: the one whose calls are read, and the model's names of its parameters."""

    module: nn.Module
    weight: str
    bias: str | None


class Layer(ABC):
    """Tracked parameters. `shape` is (k, o, i): groups, outputs a group, inputs a group with the biases.

    Attributes:
        name: of its first module.
        modules: those whose calls are read; several that share a weight.
        parameters: the names of its parameters in the model.
        by_default: whether it is tracked where no modules are named.
    """

    name: str
    modules: tuple[nn.Module, ...]
    parameters: tuple[str, ...]
    shape: tuple[int, int, int]
    kronecker: bool
    by_default: bool

    @abstractmethod
    def positions(self, output: Tensor) -> int:
        """How many positions t an output of a module has for one row of its first dimension."""

    @abstractmethod
    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """Float[m k o i] as Float[m, *parameter.shape] by the name of the parameter."""

    def plain(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """What a module of torch's own class gives for these inputs; None if `module` surely computes it.

        A class that derives from one of torch's may compute something else, which is then not tracked.
        """
        return None


class KroneckerLayer(Layer):
    """A layer whose per-example gradient is a sum of outer products.

    The last inputs are 1 for the biases: one input for each bias, 0 in the calls of the other modules.
    """

    kronecker = True
    by_default = True

    def __init__(self, name: str, members: Sequence[Member], groups: int, outputs: int, inputs: int) -> None:
        self.name, self.modules, self.inputs = name, tuple(one.module for one in members), inputs
        self.biases = tuple(dict.fromkeys(one.bias for one in members if one.bias is not None))
        self._columns = [None if one.bias is None else self.biases.index(one.bias) for one in members]
        self.weight = members[0].weight
        self.parameters = (self.weight, *self.biases)
        self.shape = (groups, outputs, inputs + len(self.biases))

    @abstractmethod
    def activations(self, inputs: Tensor, scratch: Scratch, name: str, which: int = 0) -> Tensor:
        """Float[b k t i] from the input of module `which`, perhaps in the buffer `name` of `scratch`."""

    @abstractmethod
    def output_gradients(self, output_gradient: Tensor, which: int = 0) -> Tensor:
        """Float[b k t o] from the gradient with respect to the output of module `which`."""

    @abstractmethod
    def weight_gradient(self, gradient: Tensor) -> Tensor:
        """Float[m, *weight.shape] from Float[m k o i], without the biases."""

    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """The weight, then the biases."""
        result = {self.weight: self.weight_gradient(gradient[..., : self.inputs])}
        for place, bias in enumerate(self.biases):
            result[bias] = gradient[..., self.inputs + place].flatten(1)
        return result

    def _fill_bias(self, activations: Tensor, which: int) -> None:
        """Set the last inputs of Float[b k t i], in place."""
        column = self._columns[which]
        if len(self.biases) > 1:
            activations[..., self.inputs :] = 0
        if column is not None:
            activations[..., self.inputs + column] = 1


def outer(activations: Tensor, output_gradients: Tensor, scratch: Scratch) -> Tensor:
    """Float[b k o i] of Float[b k t i] and Float[b k t o], in a buffer of `scratch`."""
    b, k, _, i = activations.shape
    result = scratch.take("gradient", (b, k, output_gradients.shape[3], i), activations)
    if k == 1:
        torch.bmm(output_gradients[:, 0].transpose(1, 2), activations[:, 0], out=result[:, 0])
        return result
    return torch.matmul(output_gradients.transpose(-1, -2), activations)


@final
class LinearLayer(KroneckerLayer):
    """`nn.Linear` on [b, ..., i]; the gradient is summed over the dimensions in between.

    Also the Conv1D of transformers (GPT-2), whose weight is `transposed`, and the packed projection of
    `nn.MultiheadAttention`, for which it reads an `nn.Linear` in its place.
    """

    def __init__(self, name: str, members: Sequence[Member], *, transposed: bool = False) -> None:
        weight = members[0].module.weight
        assert isinstance(weight, Tensor)
        self.transposed = transposed
        outputs, inputs = weight.shape[::-1] if transposed else weight.shape
        super().__init__(name, members, 1, outputs, inputs)

    def positions(self, output: Tensor) -> int:
        """The product of the dimensions between the first and the last."""
        return output[0].numel() // output.shape[-1] if len(output) else 0

    def activations(self, inputs: Tensor, scratch: Scratch, name: str, which: int = 0) -> Tensor:
        """Float[b 1 t i]."""
        flat = inputs.reshape(len(inputs), 1, -1, inputs.shape[-1])
        if not self.biases:
            return flat
        result = scratch.take(name, (*flat.shape[:-1], self.shape[2]), flat)
        result[..., : self.inputs] = flat
        self._fill_bias(result, which)
        return result

    def output_gradients(self, output_gradient: Tensor, which: int = 0) -> Tensor:
        """Float[b 1 t o]."""
        return output_gradient.reshape(len(output_gradient), 1, -1, output_gradient.shape[-1])

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        """The only group."""
        return gradient[:, 0].transpose(1, 2) if self.transposed else gradient[:, 0]

    def plain(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """The product with the weight, and the bias."""
        if self.transposed or type(module).forward is nn.Linear.forward:
            return None
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        return functional.linear(inputs, weight, bias if isinstance(bias, Tensor) else None)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _patches(image: Tensor, module: nn.Module, groups: int) -> Tensor:
    """A view Float[b k *positions *kernel channels] of Float[b *size channels], contiguous."""
    kernel, stride, dilation = (_sizes(module, name) for name in ("kernel_size", "stride", "dilation"))
    size, channels = image.shape[1:-1], image.shape[-1]
    positions = [
        (length - gap * (width - 1) - 1) // step + 1
        for length, width, step, gap in zip(size, kernel, stride, dilation, strict=True)
    ]
    steps = image.stride()[1:-1]
    return image.as_strided(
        (len(image), groups, *positions, *kernel, channels // groups),
        (
            image.stride(0),
            channels // groups,
            *(one * step for one, step in zip(stride, steps, strict=True)),
            *(one * step for one, step in zip(dilation, steps, strict=True)),
            1,
        ),
    )


def _sizes(module: nn.Module, name: str) -> tuple[int, ...]:
    values: tuple[int, ...] = getattr(module, name)
    return values


@final
class ConvLayer(KroneckerLayer):
    """`nn.Conv1d` to `nn.Conv3d` with any stride, padding, padding mode, dilation and number of groups."""

    def __init__(self, name: str, members: Sequence[Member]) -> None:
        conv = members[0].module
        assert isinstance(conv, CONVOLUTIONS)
        self.conv, channels = conv, conv.in_channels // conv.groups
        super().__init__(
            name,
            members,
            conv.groups,
            conv.out_channels // conv.groups,
            math.prod(conv.kernel_size) * channels,
        )

    def positions(self, output: Tensor) -> int:
        """The size of the output."""
        return math.prod(output.shape[2:])

    def activations(self, inputs: Tensor, scratch: Scratch, name: str, which: int = 0) -> Tensor:
        """Float[b k t i]: the patches."""
        conv = self.modules[which]
        assert isinstance(conv, CONVOLUTIONS)
        groups = conv.groups
        around = conv._reversed_padding_repeated_twice
        if max(around) == 0:
            image = inputs.movedim(1, -1).contiguous()
        elif conv.padding_mode == "zeros":
            b, c, *size = inputs.shape
            pairs = [around[2 * place : 2 * place + 2] for place in reversed(range(len(size)))]
            padded_size = [low + length + high for length, (low, high) in zip(size, pairs, strict=True)]
            image = scratch.take("image", (b, *padded_size, c), inputs).zero_()
            inside = [slice(low, low + length) for length, (low, _) in zip(size, pairs, strict=True)]
            image[(slice(None), *inside)] = inputs.movedim(1, -1)
        else:
            padded = functional.pad(inputs, tuple(around), mode=conv.padding_mode)
            image = padded.movedim(1, -1).contiguous()
        once = {*conv.kernel_size, *conv.stride} == {1}
        if groups == 1 and once and not self.biases:
            return image.view(len(image), 1, -1, image.shape[-1])
        patches = _patches(image, conv, groups)
        dimensions = len(conv.kernel_size)
        positions, kernel = patches.shape[2 : 2 + dimensions], patches.shape[2 + dimensions :]
        row = self.shape[2]
        result = scratch.take(name, (len(image), groups, math.prod(positions), row), image)
        target = result.as_strided(
            patches.shape,
            (
                result.stride(0),
                result.stride(1),
                *(row * step for step in _contiguous(positions)),
                *_contiguous(kernel),
            ),
        )
        target.copy_(patches)
        self._fill_bias(result, which)
        return result

    def output_gradients(self, output_gradient: Tensor, which: int = 0) -> Tensor:
        """Float[b k t o]."""
        return _by_position(output_gradient, self.conv.groups)

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        """Back to the order (channel, kernel position)."""
        conv = self.conv
        weight = gradient.reshape(
            len(gradient), conv.out_channels, *conv.kernel_size, conv.in_channels // conv.groups
        )
        return weight.movedim(-1, 2)

    def plain(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """The convolution with the weight, and the bias."""
        assert isinstance(module, CONVOLUTIONS)
        base = next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
        own = type(module)
        if own.forward is base.forward and own._conv_forward is base._conv_forward:
            return None
        output: Tensor = base._conv_forward(module, inputs, module.weight, module.bias)  # type: ignore[arg-type]
        return output


@final
class TransposedConvLayer(KroneckerLayer):
    """`nn.ConvTranspose1d` to `nn.ConvTranspose3d`, without the bias."""

    def __init__(self, name: str, member: Member) -> None:
        conv = member.module
        assert isinstance(conv, TRANSPOSED)
        self.conv = conv
        outputs = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
        only = Member(conv, member.weight, None)
        super().__init__(name, [only], conv.groups, outputs, conv.in_channels // conv.groups)

    def positions(self, output: Tensor) -> int:
        """The size of the input."""
        conv = self.conv
        around = zip(
            output.shape[2:],
            _sizes(conv, "padding"),
            _sizes(conv, "output_padding"),
            conv.dilation,
            conv.kernel_size,
            conv.stride,
            strict=True,
        )
        return math.prod((n + 2 * p - more - d * (k - 1) - 1) // s + 1 for n, p, more, d, k, s in around)

    def activations(self, inputs: Tensor, scratch: Scratch, name: str, which: int = 0) -> Tensor:
        """Float[b k t i]: the inputs."""
        return _by_position(inputs, self.conv.groups)

    def output_gradients(self, output_gradient: Tensor, which: int = 0) -> Tensor:
        """Float[b k t o]: patches of the output gradient, one for each input position."""
        conv = self.conv
        ends = zip(_sizes(conv, "padding"), _sizes(conv, "output_padding"), strict=True)
        around = [side for low, more in reversed(list(ends)) for side in (low, low - more)]
        image = functional.pad(output_gradient, around).movedim(1, -1).contiguous()
        patches = _patches(image, conv, conv.groups)
        positions = patches.shape[2 : 2 + len(conv.kernel_size)]
        return patches.reshape(len(image), conv.groups, math.prod(positions), -1)

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        """Back to the order (input channel, output channel, kernel position)."""
        conv = self.conv
        outputs = conv.out_channels // conv.groups
        parts = gradient.reshape(len(gradient), conv.groups, *conv.kernel_size, outputs, -1)
        weight = parts.movedim((-1, -2), (2, 3))
        return weight.reshape(len(gradient), conv.in_channels, outputs, *conv.kernel_size)

    def plain(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """The transposed convolution with the weight, and the bias."""
        base = next(kind for kind in TRANSPOSED if isinstance(module, kind))
        if type(module).forward is base.forward:
            return None
        output: Tensor = base.forward(module, inputs)  # type: ignore[arg-type]
        return output


def _by_position(maps: Tensor, groups: int) -> Tensor:
    """Float[b k t c] of Float[b channels *size]."""
    b, channels = maps.shape[:2]
    last = maps.movedim(1, -1).reshape(b, -1, groups, channels // groups)
    return last.transpose(1, 2)


def _contiguous(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor of this shape."""
    return [math.prod(shape[place + 1 :]) for place in range(len(shape))]
