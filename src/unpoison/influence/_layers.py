"""The kinds of layers: how a per-example gradient is formed from a layer's input and output gradient.

A Kronecker layer (Linear, Conv2d) sees `a` Float[b k t i] and `g` Float[b k t o]: for each of b examples
and each of k groups, t positions of i inputs and o outputs. The gradient of one example is `sum_t g_t
a_t^T`, Float[k o i]. A bias is one more input that is always 1. The groups of a grouped convolution are
blocks of their own, each with its own covariances; nothing is averaged over groups.

The i inputs of a convolution are ordered (kernel row, kernel column, channel): with channels last,
patches are then copied in runs of `kernel width * channels` numbers, and activations and output gradients
are not copied at all.

A diagonal layer (normalisation, Embedding) has few parameters or none that interact through a matrix
product; its curvature is the exact diagonal of the Fisher matrix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from unpoison.errors import InputError

KRONECKER_TYPES = (nn.Linear, nn.Conv2d)
NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
TRACKABLE_TYPES = (*KRONECKER_TYPES, *NORM_TYPES, nn.Embedding)


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


class Layer(ABC):
    """One tracked module. `shape` is (k, o, i): groups, outputs a group, inputs a group with the bias."""

    name: str
    module: nn.Module
    shape: tuple[int, int, int]
    kronecker: bool

    @abstractmethod
    def positions(self, output: Tensor) -> int:
        """How many positions t an output of the module has for one example."""

    @abstractmethod
    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """Float[m k o i] as {"weight": Float[m, *weight.shape], "bias": ...}."""


class KroneckerLayer(Layer):
    """A layer whose per-example gradient is a sum of outer products."""

    kronecker = True
    bias: bool

    @abstractmethod
    def activations(self, inputs: Tensor, scratch: Scratch, name: str) -> Tensor:
        """Float[b k t i] from the module's input, perhaps in the buffer `name` of `scratch`."""

    @abstractmethod
    def output_gradients(self, output_gradient: Tensor) -> Tensor:
        """Float[b k t o] from the gradient with respect to the module's output."""


def outer(activations: Tensor, output_gradients: Tensor, scratch: Scratch) -> Tensor:
    """Float[b k o i] of Float[b k t i] and Float[b k t o], in a buffer of `scratch`."""
    b, k, _, i = activations.shape
    result = scratch.take("gradient", (b, k, output_gradients.shape[3], i), activations)
    if k == 1:
        torch.bmm(output_gradients[:, 0].transpose(1, 2), activations[:, 0], out=result[:, 0])
        return result
    return torch.matmul(output_gradients.transpose(-1, -2), activations)


class DiagonalLayer(Layer):
    """A layer whose per-example gradient is formed at once."""

    kronecker = False

    @abstractmethod
    def gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Float[b k o i]: the gradient of each example's loss."""


@final
class LinearLayer(KroneckerLayer):
    """`nn.Linear` on [b, ..., i]; the gradient is summed over the dimensions in between."""

    def __init__(self, name: str, module: nn.Linear) -> None:
        self.name, self.module, self.bias = name, module, module.bias is not None
        self.shape = (1, module.out_features, module.in_features + self.bias)

    def positions(self, output: Tensor) -> int:
        """The product of the dimensions between the first and the last."""
        return output[0].numel() // output.shape[-1] if len(output) else 0

    def activations(self, inputs: Tensor, scratch: Scratch, name: str) -> Tensor:
        """Float[b 1 t i]."""
        flat = inputs.reshape(len(inputs), 1, -1, inputs.shape[-1])
        return torch.cat([flat, flat.new_ones(()).expand(*flat.shape[:-1], 1)], -1) if self.bias else flat

    def output_gradients(self, output_gradient: Tensor) -> Tensor:
        """Float[b 1 t o]."""
        return output_gradient.reshape(len(output_gradient), 1, -1, output_gradient.shape[-1])

    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """The last input is the bias."""
        if not self.bias:
            return {"weight": gradient[:, 0]}
        return {"weight": gradient[:, 0, :, :-1], "bias": gradient[:, 0, :, -1]}


@final
class Conv2dLayer(KroneckerLayer):
    """`nn.Conv2d` with any stride, padding, padding mode, dilation and number of groups."""

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        self.name, self.module, self.bias = name, module, module.bias is not None
        self.conv = module
        height, width = module.kernel_size
        self.fan_in = height * width * module.in_channels // module.groups
        self.shape = (module.groups, module.out_channels // module.groups, self.fan_in + self.bias)

    def positions(self, output: Tensor) -> int:
        """Height times width of the output."""
        return output.shape[-1] * output.shape[-2]

    def activations(self, inputs: Tensor, scratch: Scratch, name: str) -> Tensor:
        """Float[b k t i]: the patches."""
        conv = self.conv
        groups, channels = conv.groups, conv.in_channels // conv.groups
        (kernel_h, kernel_w), (stride_h, stride_w) = conv.kernel_size, conv.stride
        dilation_h, dilation_w = conv.dilation
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        if max(left, right, top, bottom) == 0:
            image = inputs.permute(0, 2, 3, 1).contiguous()
        elif conv.padding_mode == "zeros":
            b, c, h, w = inputs.shape
            image = scratch.take("image", (b, h + top + bottom, w + left + right, c), inputs).zero_()
            image[:, top : top + h, left : left + w] = inputs.permute(0, 2, 3, 1)
        else:
            padded = functional.pad(inputs, (left, right, top, bottom), mode=conv.padding_mode)
            image = padded.permute(0, 2, 3, 1).contiguous()
        b, h, w, c = image.shape
        out_h = (h - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
        out_w = (w - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
        if groups == 1 and conv.kernel_size == (1, 1) and conv.stride == (1, 1) and not self.bias:
            return image.view(b, 1, h * w, c)
        patches = image.as_strided(
            (b, groups, out_h, out_w, kernel_h, kernel_w, channels),
            (h * w * c, channels, stride_h * w * c, stride_w * c, dilation_h * w * c, dilation_w * c, 1),
        )
        result = scratch.take(name, (b, groups, out_h * out_w, self.shape[2]), image)
        image_t, row_t = groups * out_h * out_w * self.shape[2], self.shape[2]
        target = result.as_strided(
            patches.shape,
            (image_t, out_h * out_w * row_t, out_w * row_t, row_t, kernel_w * channels, channels, 1),
        )
        target.copy_(patches)
        if self.bias:
            result[..., -1] = 1
        return result

    def output_gradients(self, output_gradient: Tensor) -> Tensor:
        """Float[b k t o]."""
        b, channels = output_gradient.shape[:2]
        groups = self.conv.groups
        last = output_gradient.permute(0, 2, 3, 1).reshape(b, -1, groups, channels // groups)
        return last.transpose(1, 2)

    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """Back to the order (channel, kernel row, kernel column)."""
        conv = self.conv
        weight = gradient[..., : self.fan_in].reshape(
            len(gradient), conv.out_channels, *conv.kernel_size, conv.in_channels // conv.groups
        )
        result = {"weight": weight.permute(0, 1, 4, 2, 3)}
        if self.bias:
            result["bias"] = gradient[..., -1].flatten(1)
        return result


@final
class NormLayer(DiagonalLayer):
    """The affine parameters of a normalisation layer, as Float[b 1 2 c]: weight, then bias."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        weight, bias = module.weight, module.bias
        if not isinstance(weight, Tensor):
            raise InputError(f"module {name}: has no affine parameters; leave it out of `modules`")
        if (
            isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
            and module.running_mean is None
        ):
            raise InputError(
                f"module {name}: batch norm without running statistics mixes the examples of a batch; "
                "leave it out of `modules`"
            )
        self.bias = isinstance(bias, Tensor)
        self.shape = (1, 1 + self.bias, weight.numel())

    def positions(self, output: Tensor) -> int:
        """One: the gradient is summed over positions as it is formed."""
        return 1

    def gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Float[b 1 2 c]."""
        module = self.module
        if isinstance(module, nn.LayerNorm):
            normal = functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
            shape = (len(inputs), -1, self.shape[2])
            scaled, plain = (
                (output_gradient * normal).reshape(shape).sum(1),
                output_gradient.reshape(shape).sum(1),
            )
        else:
            if isinstance(module, nn.GroupNorm):
                normal = functional.group_norm(inputs, module.num_groups, eps=module.eps)
            else:
                assert isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
                normal = functional.batch_norm(
                    inputs, module.running_mean, module.running_var, eps=module.eps
                )
            scaled = (
                (output_gradient * normal).flatten(2).sum(2) if inputs.ndim > 2 else output_gradient * normal
            )
            plain = output_gradient.flatten(2).sum(2) if inputs.ndim > 2 else output_gradient
        return torch.stack([scaled, plain] if self.bias else [scaled], 1)[:, None]

    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """The weight, then the bias."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        names = ("weight", "bias") if self.bias else ("weight",)
        return {name: gradient[:, 0, row].reshape(-1, *weight.shape) for row, name in enumerate(names)}


@final
class EmbeddingLayer(DiagonalLayer):
    """`nn.Embedding` as Float[b 1 v d]. Dense: an example costs as much memory as the table."""

    def __init__(self, name: str, module: nn.Embedding) -> None:
        self.name, self.module, self.embedding = name, module, module
        if module.max_norm is not None:
            raise InputError(
                f"module {name}: an Embedding with max_norm changes itself; leave it out of `modules`"
            )
        self.shape = (1, module.num_embeddings, module.embedding_dim)

    def positions(self, output: Tensor) -> int:
        """One: the gradient is summed over positions as it is formed."""
        return 1

    def gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Float[b 1 v d]."""
        b, (_, rows, width) = len(inputs), self.shape
        flat = output_gradient.reshape(b, -1, width)
        index = inputs.reshape(b, -1) + rows * torch.arange(b, device=inputs.device)[:, None]
        result = flat.new_zeros(b * rows, width).index_add_(0, index.flatten(), flat.flatten(0, 1))
        result = result.view(b, 1, rows, width)
        if self.embedding.padding_idx is not None:
            result[:, :, self.embedding.padding_idx] = 0
        return result

    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """The table."""
        return {"weight": gradient[:, 0]}


def tracked_layers(model: nn.Module, modules: object = None) -> list[Layer]:
    """The layers of `model` called `modules` (all Linear and Conv2d when None), in the order of the model.

    Raises:
        InputError: a name is unknown or its module of another kind, or two modules share a parameter.
    """
    known = dict(model.named_modules())
    if modules is None:
        names = [name for name, module in known.items() if isinstance(module, KRONECKER_TYPES)]
        if not names:
            raise InputError("the model has no Linear or Conv2d module; name the modules to track")
    else:
        names = list(modules)  # type: ignore[call-overload]
        if isinstance(modules, str) or not names or len(set(names)) != len(names):
            raise InputError("modules: give a sequence of one or more different module names")
        for name in names:
            if name not in known:
                raise InputError(f"modules: the model has no module {name!r}")
            if not isinstance(known[name], TRACKABLE_TYPES):
                kinds = ", ".join(kind.__name__ for kind in TRACKABLE_TYPES)
                raise InputError(
                    f"module {name}: cannot track a {type(known[name]).__name__}; can track {kinds}"
                )
        order = {name: place for place, name in enumerate(known)}
        names.sort(key=order.__getitem__)
    owners: dict[int, str] = {}
    for name, module in known.items():
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name and (name in names or other in names):
                raise InputError(
                    f"modules {other} and {name} share a parameter, so neither gradient is whole; "
                    "leave both out of `modules`"
                )
    return [_layer(name, known[name]) for name in names]


def _layer(name: str, module: nn.Module) -> Layer:
    if isinstance(module, nn.Linear):
        return LinearLayer(name, module)
    if isinstance(module, nn.Conv2d):
        return Conv2dLayer(name, module)
    if isinstance(module, nn.Embedding):
        return EmbeddingLayer(name, module)
    return NormLayer(name, module)
