"""A pretended accelerator: tensors that report the device `DEVICE` and are computed on the CPU.

Within `pretended_accelerator()`, `tensor.to(DEVICE)` and `device=DEVICE` give such tensors. An operation on
tensors of both devices raises `MixedDevices`, as it fails on an accelerator, and so does a generator of the
other device. In one point this is stricter than PyTorch, which moves an index between the devices silently,
at the price of a synchronisation: here an index must lie where its tensor lies.

How: a wrapper subclass whose operators, below autograd, are run on the CPU (`__torch_dispatch__`), a dispatch
mode for factories, and a function mode for indexing and for data from Python. Tried and left:
`FakeTensorMode`, which cannot run code whose flow depends on data; a Python backend for `PrivateUse1`, whose
registration is global to the process, final and experimental, and comes too late for the threads of
autograd's engine.

What it sees: every operator of forward and backward passes, hooks, `torch.func`, optimizers and in-place
updates; `.numpy()` of a device tensor. Results equal those of the CPU bit for bit, so tests compare them.

What it does not see: branches on `device.type == "cuda"`; operators that are missing, slow, nondeterministic
or otherwise rounded on an accelerator; host reads (`item`, `tolist`, `bool`), which are legal; CPU tensors
without dimensions, which PyTorch takes for numbers; work of other processes.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("privateuseone", 0)
_autocast = torch.autocast
_Generator = torch.Generator
# Operators whose purpose is to move data from one device to the other.
_TRANSFERS = (torch.ops.aten.copy_.default,)
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class MixedDevices(RuntimeError):
    """An operation met tensors of two devices."""


class Pretended(Tensor):
    """A tensor on `DEVICE`; `elem` holds its values on the CPU."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> Pretended:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            # For autograd, which needs support of the device in C++; Python sees `DEVICE`.
            device="meta",
        )

    def __init__(self, elem: Tensor) -> None:
        self.elem = elem

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise MixedDevices(f"NumPy cannot read a tensor on {DEVICE}")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].elem = args[1].elem
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                copied = Pretended(self.elem.clone(memory_format=torch.preserve_format))
                if getattr(self, "_is_param", False):
                    copied = torch.nn.Parameter(copied, self.requires_grad)  # type: ignore[assignment]
                copied.requires_grad_(self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.elem!r})"


class PretendedGenerator(_Generator):
    """A generator of `DEVICE` or of the CPU; its numbers are the CPU's."""

    pretended: torch.device

    def __new__(cls, device: Any = "cpu") -> PretendedGenerator:
        made = super().__new__(cls, device="cpu" if _is_ours(device) else device)
        made.pretended = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.pretended


class _Operators(TorchDispatchMode):
    """Runs operators on the CPU, and wraps what lies on the device."""

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What PyTorch does in C++ above its operators: indexing, and `device=` of data from Python."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("generator"), PretendedGenerator):
            _check_generator(kwargs, args)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            _check_index(args[0], args[1])
        if func is torch.Tensor.new_tensor and isinstance(args[0], Pretended):
            data, others = (args[1], args[2:]) if args[1:] else (kwargs.pop("data"), ())
            return torch.tensor(data, *others, **{"dtype": args[0].dtype, **kwargs}).to(DEVICE)
        if func is torch.quantile and isinstance(args[0], Pretended):
            # It creates tensors on the device that C++ sees.
            return _run(func, args, kwargs)
        if func in _PRODUCTS and isinstance(args[0], Pretended) and (args[0].ndim, args[1].ndim) == (1, 2):
            # It removes a dimension in place, which a wrapper cannot follow.
            return torch.mm(args[0][None], args[1])[0]
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_ours(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": None}).to(DEVICE)
        if func is torch.Tensor.to and isinstance(args[0], Pretended):
            # Already there: PyTorch returns the tensor itself.
            args = (args[0], *(None if _is_ours(one) else one for one in args[1:]))
            kwargs = {key: None if _is_ours(one) else one for key, one in kwargs.items()}
            if args[1:] and all(one is None for one in args[1:]) and not kwargs:
                return args[0]
        return func(*args, **kwargs)


def _is_ours(device: Any) -> bool:
    # Within `torch.func` tensors are wrapped once more, and show the device that C++ sees.
    return isinstance(device, torch.device | str) and torch.device(device).type in (DEVICE.type, "meta")


@contextlib.contextmanager
def pretended_accelerator() -> Iterator[torch.device]:
    """Within the block there is a device `DEVICE`."""

    def autocast(device_type: str, **options: Any) -> Any:
        return contextlib.nullcontext() if device_type == DEVICE.type else _autocast(device_type, **options)

    torch.Generator, torch.autocast = PretendedGenerator, autocast  # type: ignore[misc, assignment]
    # PyTorch imports the module of a device before it uses it.
    sys.modules["torch.privateuseone"] = types.ModuleType("torch.privateuseone")
    try:
        with _Operators(), _Functions():
            yield DEVICE
    finally:
        torch.Generator, torch.autocast = _Generator, _autocast  # type: ignore[misc]
        del sys.modules["torch.privateuseone"]


def moved_to_cpu(tensor: Tensor) -> Tensor:
    """The values of a tensor of either device, outside of the block."""
    return tensor.elem if isinstance(tensor, Pretended) else tensor


def _check_index(tensor: Any, index: Any) -> None:
    for part in index if isinstance(index, tuple | list) else (index,):
        ours = isinstance(part, Pretended)
        if isinstance(part, Tensor) and part.ndim and ours != isinstance(tensor, Pretended):
            raise MixedDevices(f"an index on {part.device} for a tensor on {tensor.device}")


def _check_generator(kwargs: dict[str, Any], args: Any) -> None:
    # Operators are given the generator without its Python class, so it is checked above them.
    asked, generator = kwargs.get("device"), kwargs["generator"]
    here = any(isinstance(one, Pretended) for one in args) if asked is None else _is_ours(asked)
    if _is_ours(generator.pretended) != here:
        found = DEVICE if here else "cpu"
        raise MixedDevices(f"a generator on {generator.pretended} for a tensor on {found}")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    ours = [one for one in flat if isinstance(one, Pretended)]
    if ours and func not in _TRANSFERS:
        for one in flat:
            if isinstance(one, Tensor) and not isinstance(one, Pretended) and one.ndim:
                raise MixedDevices(f"{func}: tensors on {DEVICE} and on {one.device}, {tuple(one.shape)}")
    asked = kwargs.get("device")
    here = bool(ours) if asked is None else _is_ours(asked)
    wrappers = {id(one.elem): one for one in ours}
    plain = [one.elem if isinstance(one, Pretended) else one for one in flat]
    args, kwargs = tree_unflatten(plain, spec)
    if asked is not None and here:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*args, **kwargs)

    def wrapped(one: Any) -> Any:
        if not isinstance(one, Tensor) or not here:
            return one
        return wrappers[id(one)] if id(one) in wrappers else Pretended(one)

    return tree_map(wrapped, result)
