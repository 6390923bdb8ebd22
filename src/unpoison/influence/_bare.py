"""Parameters without a layer of their own: class tokens, position embeddings, scales of a block.

What a network does with such a parameter is in its own code. Within `carried` a module that owns one finds in
its place a tensor with one copy of it for each example, whose gradient is then that of each example. The
copies lie in a dimension of length 1 of the parameter, or in new first dimensions: so that adding,
multiplying, expanding and concatenating do what they did.

Whether that is so is tried with two examples before it is relied on: with other numbers in the copy of the
second example the outputs of the first must stay what they were, and those of the second become what they are
with the other numbers in both copies. Where this fails (a table that is indexed, a scale that is reshaped, a
product with a matrix), or the outputs do not depend on the parameter, it is not tracked.

Cost: a few forward passes of two examples for each parameter. Memory: a copy of it for each example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs, count_of
from unpoison._memory import is_allocation_failure

_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError)


@final
class Carrier(nn.Module):
    """Stands for one parameter; called with Float[b], it gives a copy for each of b examples.

    Arguments:
        weight: the parameter.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.dimension: int | None = None
        """Where the network wants the copies; None as long as that is not known."""
        self.leading = 0
        """How many dimensions of length 1 come before those of the parameter."""

    def forward(self, rows: Tensor) -> Tensor:
        """Float[b ...]: the copies in the first dimension."""
        shape = (1,) * self.leading + tuple(self.weight.shape)
        dimension = self.dimension or 0
        rest = shape[:dimension] + shape[dimension + 1 :]
        return self.weight.detach().reshape(1, *rest).expand(len(rows), *rest)

    def placed(self, copies: Tensor) -> Tensor:
        """The copies as the network wants them."""
        return copies.movedim(0, self.dimension or 0)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where the copies may lie: (leading dimensions, dimension of the copies)."""
        inside = [(0, place) for place, size in enumerate(self.weight.shape) if size == 1]
        return [*inside, (1, 0), (2, 0), (3, 0)]


@contextlib.contextmanager
def carried(model: nn.Module, packed: Mapping[int, nn.Module]) -> Iterator[None]:
    """Within the block modules that own a parameter of a `Carrier` compute with its copies.

    Arguments:
        model: any network; left as it was.
        packed: the carriers among other modules, by the `id` of the parameter.
    """
    owned = [
        (module, name, carrier)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if isinstance(carrier := packed.get(id(parameter)), Carrier)
    ]
    if not owned:
        yield
        return
    exchange = _Exchange(model, owned)
    with contextlib.ExitStack() as stack:
        stack.callback(exchange.back)
        handles = [model.register_forward_pre_hook(exchange.begin, with_kwargs=True, prepend=True)]
        for module in dict.fromkeys(module for module, _, _ in owned):
            handles.append(module.register_forward_pre_hook(exchange.to_copies))
            handles.append(module.register_forward_hook(exchange.from_copies, always_call=True))
        for handle in handles:
            stack.callback(handle.remove)
        yield


@final
class _Exchange:
    """Puts copies in the place of parameters while their modules compute."""

    def __init__(self, model: nn.Module, owned: list[tuple[nn.Module, str, Carrier]]) -> None:
        self.model, self.owned = model, owned
        self.count = 0
        self.tried = False
        # While a carrier is tried: which numbers both examples have.
        self.trial: tuple[Carrier, Literal["other", "second other"]] | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass: count its examples; before the first, find where copies may lie."""
        inputs: Inputs = args[0] if args else kwargs
        self.count = count_of(inputs)
        if not self.tried:
            self.tried = True
            with torch.no_grad():
                self._place(args, kwargs)
            self.count = count_of(inputs)

    def to_copies(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a module computes."""
        for owner, name, carrier in self.owned:
            if owner is not module:
                continue
            rows = torch.zeros(self.count, device=carrier.weight.device)
            copies: Tensor | None = None
            if self.trial is not None:
                if self.trial[0] is carrier:
                    copies = _tried(carrier.forward(rows), self.trial[1])
            elif carrier.dimension is not None:
                copies = carrier(rows)
            if copies is not None:
                module._parameters[name] = carrier.placed(copies)  # type: ignore[assignment]

    def from_copies(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it has computed, also where it failed."""
        for owner, name, carrier in self.owned:
            if owner is module:
                module._parameters[name] = carrier.weight

    def back(self) -> None:
        """Every parameter in its place."""
        for owner, name, carrier in self.owned:
            owner._parameters[name] = carrier.weight

    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find for each carrier where the network wants the copies."""
        rows = [0, 1 % self.count]

        def chosen(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and value.ndim else value

        two = [chosen(one) for one in args], {name: chosen(one) for name, one in kwargs.items()}
        carriers = list(dict.fromkeys(carrier for _, _, carrier in self.owned))
        for carrier in carriers:
            carrier.dimension = None
        plain = self._outputs(two, None)
        found: dict[Carrier, tuple[int, int]] = {}
        for carrier in carriers:
            for place in carrier.places:
                carrier.leading, carrier.dimension = place
                other, second = (self._outputs(two, (carrier, kind)) for kind in ("other", "second other"))
                if _apart(plain, other, second):
                    found[carrier] = place
                    break
            carrier.leading, carrier.dimension = 0, None
        for carrier, (leading, dimension) in found.items():
            carrier.leading, carrier.dimension = leading, dimension

    def _outputs(self, two: tuple[list[Any], dict[str, Any]], trial: Any) -> list[Tensor]:
        """What the network gives for two examples; nothing where it fails."""
        self.trial = (_NOTHING, "other") if trial is None else trial
        self.count = 2
        try:
            return [one for one in _tensors(self.model(*two[0], **two[1])) if len(one) == 2]
        except _FAILURES as error:
            if is_allocation_failure(error):
                raise
            return []
        finally:
            self.trial = None


_NOTHING = Carrier(nn.Parameter(torch.empty(0)))


def _tried(copies: Tensor, kind: str) -> Tensor:
    """The copies with other numbers for both examples, or for the second alone."""
    flat = copies[0].flatten()
    scale = flat.double().square().mean().sqrt().clamp(min=0.05).to(flat.dtype)
    wave = torch.cos(torch.arange(len(flat), device=flat.device, dtype=torch.float64) + 1).to(flat.dtype)
    other = (flat + scale * wave).view_as(copies[0])
    return torch.stack([copies[0] if kind == "second other" else other, other])


def _apart(plain: list[Tensor], other: list[Tensor], second: list[Tensor]) -> bool:
    """Whether each output depends on the copy of its own example, and on no other."""
    shapes = [[one.shape for one in outputs] for outputs in (plain, other, second)]
    if not plain or shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        return False
    depends = False
    for before, after, mixed in zip(plain, other, second, strict=True):
        moved, size = (float(one.double().abs().amax()) for one in (after - before, before))
        rounding = 16 * torch.finfo(before.dtype).eps * size
        expected = torch.stack([before[0], after[1]])
        if not float((mixed - expected).double().abs().amax()) <= 1e-3 * moved + rounding:
            return False
        depends = depends or moved > 4 * rounding
    return depends


def _tensors(output: Any) -> Iterator[Tensor]:
    """All floating-point tensors in what a network returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.ndim and output.numel():
            yield output
    elif isinstance(output, Mapping):
        for one in output.values():
            yield from _tensors(one)
    elif isinstance(output, tuple | list):
        for one in output:
            yield from _tensors(one)
    elif hasattr(output, "logits"):
        yield from _tensors(output.logits)
