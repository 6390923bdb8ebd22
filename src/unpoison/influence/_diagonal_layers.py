"""Layers whose curvature is a diagonal: normalisation, scales, Embedding, Bilinear, lone parameters."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from unpoison.errors import InputError
from unpoison.influence._bare import Carrier
from unpoison.influence._layers import Layer, Member

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
OF_MAPS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm)
"""Whose input has channels in its second dimension."""
NORMS = (*OF_MAPS, nn.LayerNorm, nn.RMSNorm)


class DiagonalLayer(Layer):
    """A layer whose per-example gradient is formed at once."""

    kronecker = False
    by_default = False

    @abstractmethod
    def gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Float[b k o i]: the gradient of each example's loss."""

    def positions(self, output: Tensor) -> int:
        """One: the gradient is summed over positions as it is formed."""
        return 1


@final
class NormLayer(DiagonalLayer):
    """The affine parameters of a normalisation layer, as Float[b 1 2 c]: weight, then bias."""

    def __init__(self, name: str, member: Member) -> None:
        module = member.module
        weight = module.weight
        if not isinstance(weight, Tensor):
            raise InputError(f"module {name}: has no affine parameters; leave it out of `modules`")
        if isinstance(module, BATCH_NORMS) and module.running_mean is None:
            raise InputError(
                f"module {name}: batch norm without running statistics mixes the examples of a batch; "
                "leave it out of `modules`"
            )
        self.name, self.modules, self._module = name, (module,), module
        self.parameters = (member.weight,) if member.bias is None else (member.weight, member.bias)
        self._weight_shape = weight.shape
        self.shape = (1, len(self.parameters), weight.numel())

    def gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Float[b 1 2 c]."""
        scaled = output_gradient * self._normalised(inputs)
        if isinstance(self._module, (nn.LayerNorm, nn.RMSNorm)):  # the last dimensions are scaled
            parts = [one.reshape(len(inputs), -1, self.shape[2]).sum(1) for one in (scaled, output_gradient)]
        else:  # the channels are
            parts = [one.flatten(2).sum(2) if one.ndim > 2 else one for one in (scaled, output_gradient)]
        return torch.stack(parts[: self.shape[1]], 1)[:, None]

    def _normalised(self, inputs: Tensor) -> Tensor:
        module = self._module
        if isinstance(module, nn.LayerNorm):
            return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.RMSNorm):
            return functional.rms_norm(inputs, list(module.normalized_shape), eps=module.eps)
        if isinstance(module, nn.GroupNorm):
            return functional.group_norm(inputs, module.num_groups, eps=module.eps)
        if isinstance(module, INSTANCE_NORMS):
            return functional.instance_norm(
                inputs,
                module.running_mean,
                module.running_var,
                use_input_stats=module.running_mean is None,
                eps=module.eps,
            )
        assert isinstance(module, BATCH_NORMS)
        return functional.batch_norm(inputs, module.running_mean, module.running_var, eps=module.eps)

    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """The weight, then the bias."""
        return {
            name: gradient[:, 0, row].reshape(-1, *self._weight_shape)
            for row, name in enumerate(self.parameters)
        }

    def plain(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """As torch's own class normalises."""
        base = next(kind for kind in NORMS if isinstance(module, kind))
        if getattr(type(module), "forward", None) is base.forward:
            return None
        output: Tensor = base.forward(module, inputs)  # type: ignore[arg-type]
        return output


@final
class ScaleLayer(DiagonalLayer):
    """A LayerScale: each channel times a number, Float[b 1 1 c]. Channels are last, in maps second."""

    def __init__(self, name: str, module: nn.Module, parameter: str, scale: Tensor) -> None:
        self.name, self.modules, self._scale = name, (module,), scale
        self.parameters, self.shape = (parameter,), (1, 1, scale.numel())
        self._in_maps = type(module).__name__.endswith("2d")

    def gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Float[b 1 1 c]."""
        product = inputs * output_gradient
        product = product.movedim(1, -1) if self._in_maps else product
        return product.reshape(len(inputs), -1, self.shape[2]).sum(1)[:, None, None]

    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """The scale."""
        return {self.parameters[0]: gradient[:, 0, 0].reshape(-1, *self._scale.shape)}

    def plain(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """The product, which is compared always, since the class is known by its name alone."""
        scale = self._scale.detach().flatten()
        return inputs * (scale.view(-1, *[1] * (inputs.ndim - 2)) if self._in_maps else scale)


@final
class BiasLayer(DiagonalLayer):
    """The bias of a transposed convolution, Float[b 1 1 c]."""

    by_default = True

    def __init__(self, name: str, module: nn.Module, parameter: str, channels: int) -> None:
        self.name, self.modules = name, (module,)
        self.parameters, self.shape = (parameter,), (1, 1, channels)

    def gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Float[b 1 1 c]."""
        return output_gradient.flatten(2).sum(2)[:, None, None]

    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """The bias."""
        return {self.parameters[0]: gradient[:, 0, 0]}


@final
@dataclass(frozen=True)
class TableRows:
    """The rows of a table that have a gradient, each once an example.

    Arguments:
        owners: Int64[u], the example.
        places: Int64[u], the row of the table.
        gradients: Float[u d].
    """

    owners: Tensor
    places: Tensor
    gradients: Tensor


@final
class EmbeddingLayer(DiagonalLayer):
    """`nn.Embedding` as Float[b 1 v d].

    `rows` has an example's tokens alone, where `gradient` costs as much memory as the table for each example.
    """

    def __init__(self, name: str, module: nn.Embedding, parameter: str) -> None:
        if module.max_norm is not None:
            raise InputError(
                f"module {name}: an Embedding with max_norm changes itself; leave it out of `modules`"
            )
        self.name, self.modules, self.parameters = name, (module,), (parameter,)
        self.embedding, self.shape = module, (1, module.num_embeddings, module.embedding_dim)

    def rows(self, inputs: Tensor, output_gradient: Tensor) -> TableRows:
        """The gradients of b examples, from their tokens Int64[b ...] and Float[b ... d]."""
        b, table = len(inputs), self.shape[1]
        keys = inputs.reshape(b, -1) + table * torch.arange(b, device=inputs.device)[:, None]
        keys, inverse = torch.unique(keys, return_inverse=True)
        flat = output_gradient.reshape(-1, self.shape[2])
        sums = flat.new_zeros(len(keys), self.shape[2]).index_add_(0, inverse.flatten(), flat)
        if self.embedding.padding_idx is not None:
            sums[keys % table == self.embedding.padding_idx] = 0
        return TableRows(keys // table, keys % table, sums)

    def gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Float[b 1 v d]."""
        found = self.rows(inputs, output_gradient)
        result = found.gradients.new_zeros(len(inputs), *self.shape)
        result[found.owners, 0, found.places] = found.gradients
        return result

    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """The table."""
        return {self.parameters[0]: gradient[:, 0]}

    def plain(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """The rows of the table."""
        if type(module).forward is nn.Embedding.forward:
            return None
        return functional.embedding(inputs, self.embedding.weight)


@final
class PReLULayer(DiagonalLayer):
    """The slopes of a PReLU, Float[b 1 1 c]: one for all, or one for each channel (the second dimension)."""

    def __init__(self, name: str, module: nn.PReLU, parameter: str) -> None:
        self.name, self.modules = name, (module,)
        self.parameters, self.shape = (parameter,), (1, 1, module.weight.numel())

    def gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Float[b 1 1 c]."""
        product = inputs.clamp(max=0) * output_gradient
        if self.shape[2] == 1:
            return product.flatten(1).sum(1)[:, None, None, None]
        return product.flatten(2).sum(2)[:, None, None] if product.ndim > 2 else product[:, None, None]

    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """The slopes."""
        return {self.parameters[0]: gradient[:, 0, 0]}

    def plain(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """As torch's own class computes."""
        if type(module).forward is nn.PReLU.forward:
            return None
        assert isinstance(module, nn.PReLU)
        return functional.prelu(inputs, module.weight)


def is_bilinear(module: nn.Module) -> bool:
    """Whether this is torch's own `nn.Bilinear`, with its weight as a parameter."""
    own = isinstance(module, nn.Bilinear) and type(module).forward is nn.Bilinear.forward
    return own and module._parameters.get("weight") is not None


@final
class BilinearProduct(nn.Module):
    """An `nn.Bilinear` of one input, in which its two inputs lie side by side."""

    def __init__(self, module: nn.Bilinear) -> None:
        super().__init__()
        self.weight, self.bias = module.weight, module.bias

    def forward(self, both: Tensor) -> Tensor:
        """Float[b, ..., outputs]."""
        first, second = torch.split(both, list(self.weight.shape[1:]), -1)
        return functional.bilinear(first, second, self.weight, self.bias)


@final
class BilinearLayer(DiagonalLayer):
    """`nn.Bilinear` as Float[b 1 o ij], and the bias as one more input. Dense, like its weight."""

    by_default = True

    def __init__(self, name: str, member: Member) -> None:
        self.name, self.modules = name, (member.module,)
        self.parameters = (member.weight,) if member.bias is None else (member.weight, member.bias)
        weight = member.module.weight
        assert isinstance(weight, Tensor)
        self._shape = weight.shape
        self.shape = (1, len(weight), weight[0].numel() + (member.bias is not None))

    def gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Float[b 1 o ij]: the products of the two inputs, summed over positions."""
        b = len(inputs)
        first, second = torch.split(inputs, list(self._shape[1:]), -1)
        products = (first[..., :, None] * second[..., None, :]).reshape(b, -1, self._shape[1:].numel())
        if self.shape[2] > products.shape[2]:
            products = torch.cat([products, products.new_ones(*products.shape[:2], 1)], 2)
        flat = output_gradient.reshape(b, -1, self._shape[0])
        return torch.bmm(flat.transpose(1, 2), products)[:, None]

    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """The weight, then the bias."""
        flat, inside = gradient[:, 0], self._shape[1:].numel()
        result = {self.parameters[0]: flat[..., :inside].reshape(-1, *self._shape)}
        if len(self.parameters) > 1:
            result[self.parameters[1]] = flat[..., inside]
        return result


@final
class ParameterLayer(DiagonalLayer):
    """A parameter without a layer of its own, Float[b 1 1 n]; see `_bare`."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.modules = name, (Carrier(parameter),)
        self.parameters, self.shape = (name,), (1, 1, parameter.numel())
        self._shape = parameter.shape

    def gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Float[b 1 1 n]: that of the example's copy."""
        return output_gradient.reshape(len(inputs), 1, 1, -1)

    def by_parameter(self, gradient: Tensor) -> dict[str, Tensor]:
        """The parameter."""
        return {self.parameters[0]: gradient[:, 0, 0].reshape(-1, *self._shape)}
