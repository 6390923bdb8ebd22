"""Which parameters of a network are tracked, and which are not.

By default every layer that is a matrix product is tracked: Linear, Conv1d to Conv3d, their transposed kinds,
the Conv1D of transformers, the packed projection of `nn.MultiheadAttention`, recurrent layers and Bilinear.
Normalisation, LayerScale, PReLU, Embedding and parameters without a layer of their own (position embeddings,
class tokens) are tracked where `modules` names them, by name or by a pattern such as "*". What is left is not
tracked; `coverage` says which share that is.

A layer with a parametrisation (weight norm, LoRA merged into a weight) is tracked by the weight that it
computes with. Modules of one kind that share their weight are one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from unpoison.errors import InputError
from unpoison.influence._attention import packed_member
from unpoison.influence._diagonal_layers import (
    NORMS,
    BiasLayer,
    BilinearLayer,
    BilinearProduct,
    EmbeddingLayer,
    NormLayer,
    ParameterLayer,
    PReLULayer,
    ScaleLayer,
    is_bilinear,
)
from unpoison.influence._layers import (
    CONVOLUTIONS,
    TRANSPOSED,
    ConvLayer,
    Layer,
    LinearLayer,
    Member,
    TransposedConvLayer,
)
from unpoison.influence._recurrent import is_recurrent, recurrent_members
from unpoison.models import Normalized, OutputLogits

KINDS = (
    "Linear, Conv1d to Conv3d, ConvTranspose1d to ConvTranspose3d, MultiheadAttention with packed "
    "projections, RNN, LSTM, GRU and their cells, Bilinear, BatchNorm, InstanceNorm, GroupNorm, LayerNorm, "
    "RMSNorm, LayerScale, PReLU, Embedding, and parameters by their own names"
)
_SCALES = ("LayerScale", "LayerScale2d", "Dinov2LayerScale")


@final
@dataclass(frozen=True)
class Coverage:
    """How much of a network is tracked.

    Arguments:
        share: of the numbers in its parameters, in [0, 1].
        untracked: the names of the parameters that are not, in the order of the model; as its own network
            calls them where the model only reads their logits.
    """

    share: float
    untracked: tuple[str, ...]


def coverage(model: nn.Module, names: Sequence[str]) -> Coverage:
    """How much of the model the layers called `names` are (such as `Factors.layers`)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tracked = {
        id(parameters[one])
        for layer in tracked_layers(model, list(names))
        for name in layer.parameters
        for one in _stored(name, parameters)
    }
    own = dict(model.named_parameters())
    total = sum(one.numel() for one in own.values())
    inside = sum(one.numel() for one in own.values() if id(one) in tracked)
    outside = [name for name, one in own.items() if id(one) not in tracked]
    if isinstance(model, OutputLogits):
        outside = [name.removeprefix("network.") for name in outside]
    return Coverage(inside / total, tuple(outside))


def _stored(name: str, parameters: dict[str, nn.Parameter]) -> list[str]:
    """The parameters that a layer's weight is made of: itself, or the originals of a parametrisation."""
    if name in parameters:
        return [name]
    module, _, own = name.rpartition(".")
    prefix = f"{module}." if module else ""
    originals = (f"{prefix}parametrizations.{own}.", f"{prefix}{own}_")
    return [one for one in parameters if one.startswith(originals)]


def tracked_layers(model: nn.Module, modules: object = None) -> list[Layer]:
    """The layers of `model` called `modules`, or all that are tracked by default, in the order of the model.

    Arguments:
        model: any network.
        modules: names of modules, or of parameters that have no layer of their own; or patterns with `*`, `?`
            and `[]`, which take what can be tracked of what they match; all layers that are matrix products
            when None.

    Raises:
        InputError: a name is unknown, or its module is of another kind or shares a parameter with one; a
            pattern matches nothing.
    """
    found = _candidates(model)
    if modules is None:
        layers = [one for one in found.values() if isinstance(one, Layer)]
        layers = [one for one in layers if one.by_default]
        if not layers:
            raise InputError(
                "the model has no Linear, convolution or recurrent module; name what to track by `modules`, "
                'such as "*"'
            )
        return layers
    names = list(modules) if isinstance(modules, Sequence) and not isinstance(modules, str) else []
    if not names or len(set(names)) != len(names):
        raise InputError("modules: give a sequence of one or more different module names or patterns")
    known, chosen = dict(model.named_modules()), set()
    inside = "network." if isinstance(model, (Normalized, OutputLogits)) else ""
    for name in names:
        exact = name if name in found or name in known else inside + name
        if exact in found:
            layer = found[exact]
            if isinstance(layer, InputError):
                raise layer
            chosen |= {exact, f"{exact}.bias"}
        elif exact in known and is_recurrent(known[exact]):
            chosen |= {one for one in found if one.rpartition(".")[0] == exact}
        elif exact in known:
            raise InputError(
                f"module {name}: cannot track a {type(known[exact]).__name__}; can track {KINDS}"
            )
        elif not is_pattern(name):
            raise InputError(f"modules: the model has no module {name!r}")
        else:
            matched = {
                one
                for one, layer in found.items()
                if isinstance(layer, Layer) and (fnmatchcase(one, name) or fnmatchcase(one, inside + name))
            }
            if not matched:
                raise InputError(f"modules: no module that can be tracked matches {name!r}")
            chosen |= matched
    return [layer for name, layer in found.items() if name in chosen and isinstance(layer, Layer)]


def is_pattern(name: str) -> bool:
    """Whether `modules` may match nothing by this name without an error."""
    return any(sign in name for sign in "*?[")


def _candidates(model: nn.Module) -> dict[str, Layer | InputError]:
    """What can be tracked, by name, in the order of the model; or why a module of such a kind cannot be."""
    modules = dict(model.named_modules())
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    found: dict[str, Layer | InputError] = {}
    for name, module in modules.items():
        sharing = {one for parameter in module.parameters(recurse=False) for one in users[id(parameter)]}
        group = [one for one in modules if one in sharing] or [name]
        if not _can_be_tracked(module):
            found |= _bare_parameters(name, module, users)
            continue
        if group[0] != name and _alike(modules, group):
            continue  # the second is tracked with the first of its group
        try:
            if len(group) > 1 and not _alike(modules, group):
                raise InputError(
                    f"modules {' and '.join(group)} share a parameter and are of different kinds, so neither "
                    "gradient is whole; leave them out of `modules`"
                )
            for layer in _layers_of([(one, modules[one]) for one in group], users):
                found[layer.name] = layer
        except InputError as error:
            found[name] = error
    return found


def _bare_parameters(
    name: str, module: nn.Module, users: Mapping[int, Sequence[str]]
) -> dict[str, Layer | InputError]:
    """The own parameters of a module of no known kind; none of a parametrisation, whose layer is tracked."""
    found: dict[str, Layer | InputError] = {}
    if isinstance(module, ParametrizationList):
        return found
    for own, parameter in module.named_parameters(recurse=False):
        called = f"{name}.{own}" if name else own
        if len(users[id(parameter)]) > 1:
            found[called] = InputError(
                f"parameter {called}: modules {' and '.join(users[id(parameter)])} share it; leave it out of "
                "`modules`"
            )
        elif parameter.is_floating_point() and parameter.numel():
            found[called] = ParameterLayer(called, parameter)
    return found


def _can_be_tracked(module: nn.Module) -> bool:
    kinds = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *NORMS, nn.Embedding, nn.PReLU)
    return isinstance(module, kinds) or _special(module) is not None


def _special(module: nn.Module) -> str | None:
    """Kinds that are known by more than their class."""
    kind = type(module)
    if kind.forward is nn.MultiheadAttention.forward and isinstance(module, nn.MultiheadAttention):
        return "attention" if module.in_proj_weight is not None else None
    if kind.__name__ == "Conv1D" and hasattr(module, "nf"):  # of transformers, which is not imported
        return "Conv1D"
    if is_recurrent(module):
        return "recurrent"
    if is_bilinear(module):
        return "bilinear"
    return "scale" if kind.__name__ in _SCALES and len(module._parameters) == 1 else None


def _alike(modules: Mapping[str, nn.Module], group: Sequence[str]) -> bool:
    """Whether modules that share a parameter are of one kind and share the whole weight."""
    members = [modules[one] for one in group]
    first = members[0]
    return isinstance(first, (nn.Linear, *CONVOLUTIONS)) and all(
        type(one) is type(first)
        and one._parameters.get("weight") is first._parameters.get("weight")
        and getattr(one, "groups", 1) == getattr(first, "groups", 1)
        for one in members
    )


def _layers_of(group: Sequence[tuple[str, nn.Module]], users: Mapping[int, Sequence[str]]) -> Iterator[Layer]:
    """The layers of one module, or of several that share a weight."""

    def member(name: str, module: nn.Module) -> Member:
        bias = getattr(module, "bias", None)
        # A bias that is shared, too, goes by its first name.
        owner = users.get(id(bias), [name])[0]
        return Member(module, path(name, "weight"), path(owner, "bias") if isinstance(bias, Tensor) else None)

    def path(name: str, parameter: str) -> str:
        return f"{name}.{parameter}" if name else parameter

    name, module = group[0]
    special = _special(module)
    if special == "attention":
        assert isinstance(module, nn.MultiheadAttention)
        yield LinearLayer(name, [packed_member(module, path(name, "in_proj_"))])
    elif special == "Conv1D":
        yield LinearLayer(name, [member(name, module)], transposed=True)
    elif special == "scale":
        ((parameter, scale),) = module.named_parameters(recurse=False)
        yield ScaleLayer(name, module, path(name, parameter), scale)
    elif special == "recurrent":
        for weight, held in recurrent_members(module, path(name, "")):
            yield LinearLayer(path(name, weight), [held])
    elif special == "bilinear":
        assert isinstance(module, nn.Bilinear)
        own = member(name, module)
        yield BilinearLayer(name, Member(BilinearProduct(module), own.weight, own.bias))
    elif isinstance(module, nn.PReLU):
        yield PReLULayer(name, module, path(name, "weight"))
    elif isinstance(module, nn.Linear):
        yield LinearLayer(name, [member(*one) for one in group])
    elif isinstance(module, TRANSPOSED):
        yield TransposedConvLayer(name, member(name, module))
        if module.bias is not None:
            bias = path(name, "bias")
            yield BiasLayer(bias, module, bias, module.out_channels)
    elif isinstance(module, CONVOLUTIONS):
        yield ConvLayer(name, [member(*one) for one in group])
    elif isinstance(module, nn.Embedding):
        yield EmbeddingLayer(name, module, path(name, "weight"))
    else:
        yield NormLayer(name, member(name, module))
