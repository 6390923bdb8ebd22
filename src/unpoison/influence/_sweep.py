"""`Sweeper`: passes over examples that give a visitor each tracked layer's input and output gradient.

One forward and one backward of the summed per-example losses give, in evaluation mode, the output gradients
of each example. The backward pass is detached from all parameters, so that automatic differentiation computes
no parameter gradients (a third of a usual backward pass) and stops before the first tracked layer. A visitor
forms what it needs of the parameter gradients itself, layer by layer, while the backward pass runs, in chunks
of examples that fit `workspace_bytes`. The tensors of a layer are released as soon as it has been visited.

The user's model is left as it was found, also when an error is raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from unpoison.errors import InputError
from unpoison.influence._layers import DiagonalLayer, KroneckerLayer, Layer, Scratch
from unpoison.models import fastest_layout, preserved
from unpoison.tasks import Batch

Function = Callable[[nn.Module, Batch], Tensor]


class Visitor(ABC):
    """What is computed from each layer of each batch."""

    @abstractmethod
    def kronecker(self, index: int, start: int, activations: Tensor, output_gradients: Tensor) -> None:
        """Examples `start`... of the batch, in layer `index`: Float[c k t i] and Float[c k t o]."""

    @abstractmethod
    def diagonal(self, index: int, start: int, gradient: Tensor) -> None:
        """Examples `start`... of the batch, in layer `index`: Float[c k o i]."""


def where(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device of a model's parameters and the type to compute in: theirs, but at least float32."""
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    if first is None:
        raise InputError("the model has no floating-point parameters, so nothing has influence on it")
    return first.device, torch.promote_types(first.dtype, torch.float32)


def default_workspace(device: torch.device) -> int:
    """Bytes of per-example gradients at a time: the size of a processor's cache, or much more on a GPU."""
    return 1 << 30 if device.type == "cuda" else 8 << 20


@final
@dataclasses.dataclass
class _Calls:
    inputs: list[Tensor | None] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    received: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)


@final
class Sweeper:
    """Runs batches through a model whose `layers` report to a visitor. Use inside `with`."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], *, workspace_bytes: int | None) -> None:
        self.model, self.layers = model, layers
        self.device, self.dtype = where(model)
        self.workspace = default_workspace(self.device) if workspace_bytes is None else workspace_bytes
        if self.workspace < 1:
            raise InputError(f"workspace_bytes must be positive, found {workspace_bytes}")
        self.reached = [0] * len(layers)
        self.scratch = Scratch()
        self._calls: list[_Calls] = []
        self._leaves: list[Tensor] = []
        self._batch = 0
        self._visitor: Visitor | None = None
        self._layout: torch.memory_format | None = None
        self._deciding = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Sweeper:
        with contextlib.ExitStack() as stack:
            stack.enter_context(preserved(self.model))
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            for index, layer in enumerate(self.layers):
                handle = layer.module.register_forward_hook(
                    self._forward_hook(index), prepend=True, with_kwargs=True
                )
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._forget()
        self._stack.close()

    def batch(self, batch: Batch, function: Function, visitor: Visitor) -> Tensor:
        """One forward and backward of the sum of `function`; its detached values Float[b]."""
        try:
            return self._run(self._placed(batch), function, visitor)
        finally:
            self._forget()

    def _run(self, batch: Batch, function: Function, visitor: Visitor) -> Tensor:
        self._calls = [_Calls() for _ in self.layers]
        self._batch, self._visitor = len(batch[0]), visitor
        with torch.inference_mode(False), torch.enable_grad():
            values = function(self.model, batch)
            if values.shape != (self._batch,):
                raise InputError(
                    f"the task's function must give one number an example, shape [{self._batch}], "
                    f"found {list(values.shape)}"
                )
            if not self._leaves:
                raise InputError("no tracked module was reached by the forward pass; check `modules`")
            if values.requires_grad:
                torch.autograd.backward(values.sum(), inputs=self._leaves)
        for index in range(len(self.layers)):
            self._visit(index)  # of calls whose output did not contribute to every value
        return values.detach()

    def _placed(self, batch: Batch) -> Batch:
        placed = tuple(part.to(self.device, non_blocking=True) for part in batch)
        return tuple(
            part.contiguous(memory_format=self._layout_of(part)) if part.ndim == 4 else part
            for part in placed
        )

    def _layout_of(self, images: Tensor) -> torch.memory_format:
        if self._layout is None:
            self._deciding = True
            try:
                self._layout = fastest_layout(self.model, images)
            finally:
                self._deciding = False
        return self._layout

    def _forget(self) -> None:
        self._calls, self._leaves, self._visitor = [], [], None

    def _forward_hook(self, index: int) -> Callable[..., Tensor | None]:
        layer = self.layers[index]

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if self._deciding:
                return None
            inputs = args[0] if args else kwargs["input"]
            if len(inputs) != self._batch or inputs.ndim < 2 - (not inputs.is_floating_point()):
                raise InputError(
                    f"module {layer.name}: its input's first dimension must count the batch's {self._batch} "
                    f"examples, found shape {list(inputs.shape)}; leave it out of `modules`"
                )
            replaced = None
            if not output.requires_grad:
                leaf = output.detach().requires_grad_()
                self._leaves.append(leaf)
                output = replaced = (
                    leaf.clone()
                )  # in-place operations may follow, which a leaf does not allow
            calls = self._calls[index]
            place = len(calls.inputs)
            calls.inputs.append(inputs.detach())
            calls.versions.append(inputs._version)
            self.reached[index] += self._batch * layer.positions(output)
            hook_on_gradient: Callable[..., Any] = output.register_hook  # untyped in torch
            hook_on_gradient(lambda gradient: self._receive(index, place, gradient))
            return replaced

        return hook

    def _receive(self, index: int, place: int, gradient: Tensor) -> None:
        calls = self._calls[index]
        inputs = calls.inputs[place]
        assert inputs is not None
        if inputs._version != calls.versions[place]:
            raise InputError(
                f"module {self.layers[index].name}: its input is changed in place after its call; "
                "leave it out of `modules` or let that operation make a copy"
            )
        calls.inputs[place] = None
        if inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        calls.received.append((inputs, gradient.to(self.dtype)))
        if len(calls.received) == len(calls.inputs):
            self._visit(index)

    @torch.no_grad()
    def _visit(self, index: int) -> None:
        received, self._calls[index].received = self._calls[index].received, []
        layer, visitor = self.layers[index], self._visitor
        if not received or visitor is None:
            return
        groups, outputs, inputs = layer.shape
        positions = sum(layer.positions(gradient) for _, gradient in received)
        an_example = groups * (positions * (inputs + outputs) + 2 * outputs * inputs) * self.dtype.itemsize
        step = max(1, self.workspace // an_example)
        for start in range(0, self._batch, step):
            rows = slice(start, start + step)
            if isinstance(layer, KroneckerLayer):
                parts = [
                    (
                        layer.activations(x[rows], self.scratch, f"patches {place}"),
                        layer.output_gradients(g[rows]),
                    )
                    for place, (x, g) in enumerate(received)
                ]
                if len(parts) == 1:
                    visitor.kronecker(index, start, *parts[0])
                else:  # a module called several times: its positions are those of all calls
                    visitor.kronecker(
                        index, start, torch.cat([a for a, _ in parts], 2), torch.cat([g for _, g in parts], 2)
                    )
            elif isinstance(layer, DiagonalLayer):
                total = layer.gradient(received[0][0][rows], received[0][1][rows])
                for x, g in received[1:]:
                    total = total + layer.gradient(x[rows], g[rows])
                visitor.diagonal(index, start, total)
