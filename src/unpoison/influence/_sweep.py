"""`Sweeper`: passes over examples that give a visitor each tracked layer's input and output gradient.

One forward and one backward of the summed per-example losses give, in evaluation mode, the output gradients
of each example. The backward pass is detached from all parameters, so that automatic differentiation computes
no parameter gradients (a third of a usual backward pass) and stops before the first tracked layer. A visitor
forms what it needs of the parameter gradients itself, layer by layer, while the backward pass runs, in chunks
of examples that fit `workspace_bytes`. The tensors of a layer are released as soon as it has been visited.

A batch is run in parts whose activations fit a quarter of the memory that may be taken (1 GiB at most on a
processor, where more is no faster): the first few examples tell what an example keeps for the backward pass.

Which rows of a layer's input belong to an example is found out where it is not plain: sequences that come
first, or rows that fold several parts of an example (windows), are recognised by two small forward passes of
two and of three examples. A layer whose input mixes examples or does not depend on them, which no gradient
reaches, or which computes something else than torch's layer of its class, is not tracked; `Sweeper.reasons`
says why.

The user's model is left as it was found, also when an error is raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from unpoison._inputs import count_of, differentiable, placed, rows_of
from unpoison._memory import allowed_memory
from unpoison.errors import InputError
from unpoison.influence._diagonal_layers import OF_MAPS, DiagonalLayer, EmbeddingLayer, TableRows
from unpoison.influence._layers import CONVOLUTIONS, TRANSPOSED, KroneckerLayer, Layer, Scratch
from unpoison.influence._steps import in_steps
from unpoison.models import fastest_layout, preserved, usual_mode
from unpoison.tasks import Batch

Function = Callable[[nn.Module, Batch], Tensor]


class Visitor(ABC):
    """What is computed from each layer of each batch."""

    def whole(self, index: int, inputs: Tensor, output_gradient: Tensor) -> bool:
        """A whole batch in layer `index`: its module's input and output gradient, where it is called once.

        Returns:
            Whether that was all the visitor needs; it is given chunks of the batch otherwise.
        """
        return False

    def table_rows(self, index: int, start: int, rows: TableRows) -> bool:
        """Examples `start`... of the batch, in layer `index`, an Embedding: all of a forward pass.

        Returns:
            Whether that was all the visitor needs; it is given dense gradients otherwise.
        """
        return False

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


def activation_bytes(device: torch.device, memory: int | None = None) -> int:
    """Bytes that the activations of a forward pass may take of so much memory; by default what is allowed."""
    allowed = (allowed_memory(device) if memory is None else memory) // 4
    return allowed if device.type == "cuda" else min(allowed, 1 << 30)


_Made = TypeVar("_Made")

FIRST = 5
"""Examples of the first forward pass, which tells how many fit; few dimensions have this length by chance."""
CHUNK = 256 << 20
"""Bytes of such a chunk at most."""
AT_ONCE = 16
"""Examples of a chunk at least, where they fit: a layer's factors and queries are read once a chunk."""


@final
@dataclasses.dataclass
class _Call:
    """One call of a module: its input, and which module of the layer it was."""

    inputs: Tensor | None
    version: int
    which: int
    rows: _Rows


@final
@dataclasses.dataclass
class _Calls:
    made: list[_Call] = dataclasses.field(default_factory=list)
    received: list[tuple[Tensor, Tensor, int]] = dataclasses.field(default_factory=list)


@final
@dataclasses.dataclass(frozen=True)
class _Rows:
    """Where a layer's input counts examples: in dimension 0 or 1; `fold` rows of dimension 0 an example."""

    dimension: int = 0
    fold: int = 1


class _UnclearError(Exception):
    """A layer was called with an input that does not tell which rows are an example's."""


@final
class Sweeper:
    """Runs batches through a model whose `layers` report to a visitor. Use inside `with`.

    Arguments:
        model: left as it was.
        layers: the tracked ones.
        workspace_bytes: of per-example gradients at a time.
        memory: what decides how many examples are read at a time; what may be taken now by default. Equal
            for equal pieces, and so for equal rounding.

    Attributes:
        reached: how many positions each layer has been given a gradient for.
        reasons: why layers are not tracked, by their place.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        *,
        workspace_bytes: int | None,
        memory: int | None = None,
    ) -> None:
        self.model, self.layers, self._memory = model, layers, memory
        self.device, self.dtype = where(model)
        self.workspace = default_workspace(self.device) if workspace_bytes is None else workspace_bytes
        if self.workspace < 1:
            raise InputError(f"workspace_bytes must be positive, found {workspace_bytes}")
        # Layers with large gradients get more than the cache holds, since their products read still more.
        self._chunk = (
            max(self.workspace, min(CHUNK, (memory or allowed_memory(self.device)) // 16))
            if workspace_bytes is None
            else self.workspace
        )
        self.reached = [0] * len(layers)
        self.reasons: dict[int, str] = {}
        self.scratch = Scratch()
        self._calls: list[_Calls] = []
        self._leaves: list[Tensor] = []
        self._batch, self._offset = 0, 0
        self._fits: int | None = None
        self._visitor: Visitor | None = None
        self._layout: torch.memory_format | None = None
        self._quiet = False
        self._rows: dict[int, _Rows] = {}
        self._probed: dict[int, Tensor] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Sweeper:
        with contextlib.ExitStack() as stack:
            stack.enter_context(usual_mode(self.device))
            stack.enter_context(preserved(self.model))
            for name, parameter in self.model.named_parameters():
                if parameter.is_inference():
                    raise InputError(
                        f"model: parameter {name} was made under torch.inference_mode and cannot be "
                        "differentiated; load the state_dict into a network that is made outside of it"
                    )
                parameter.requires_grad_(False)
            packed: dict[int, nn.Module] = {}
            for index, layer in enumerate(self.layers):
                for which, module in enumerate(layer.modules):
                    packed[id(module._parameters.get("weight"))] = module
                    handle = module.register_forward_hook(
                        self._forward_hook(index, which), prepend=True, with_kwargs=True
                    )
                    stack.callback(handle.remove)
            stack.enter_context(in_steps(self.model, packed))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._forget()
        self._stack.close()

    def batch(self, batch: Batch, function: Function, visitor: Visitor) -> Tensor:
        """One forward and backward of the sum of `function`; its detached values Float[b]."""
        ready = self._placed(batch)
        count = count_of(ready[0])
        values: list[Tensor] = []
        try:
            fits, self._offset = self._fitting(ready, function), 0
            while self._offset < count or not values:
                stop = self._offset + fits
                part = tuple(rows_of(one, slice(self._offset, stop)) for one in ready)
                values.append(self._clear(self._run, part, function, visitor))
                self._offset = stop
            return torch.cat(values)
        finally:
            self._forget()

    def _clear(self, run: Callable[..., _Made], batch: Batch, function: Function, *rest: Any) -> _Made:
        """`run` on a batch, where need be again once it is known where layers count examples."""
        try:
            return run(batch, function, *rest)
        except _UnclearError:
            self._probe(batch, function)
            return run(batch, function, *rest)

    def _run(self, batch: Batch, function: Function, visitor: Visitor) -> Tensor:
        self._visitor = visitor
        values = self._forward(batch, function)
        if values.requires_grad:
            torch.autograd.backward(values.sum(), inputs=self._leaves)
        for index in range(len(self.layers)):
            self._visit(index)  # of calls whose output did not contribute to every value
        return values.detach()

    def _forward(self, batch: Batch, function: Function) -> Tensor:
        self._calls = [_Calls() for _ in self.layers]
        self._leaves = []
        self._batch = count_of(batch[0])
        with torch.enable_grad():
            values = function(self.model, batch)
        if values.shape != (self._batch,):
            raise InputError(
                f"the task's function must give one number an example, shape [{self._batch}], "
                f"found {list(values.shape)}"
            )
        if not self._leaves:
            told = next(iter(self.reasons.values()), "none was reached by the forward pass")
            raise InputError(f"no module can be tracked ({told}); check `modules`")
        return values

    def _fitting(self, batch: Batch, function: Function) -> int:
        """How many examples a forward pass may have, by what one of the first few keeps.

        That pass is repeated: rounding depends on the number of examples, and what is said of an example must
        not depend on whether a process has read it first.
        """
        if self._fits is None:
            few = tuple(rows_of(one, slice(FIRST)) for one in batch)
            an_example = self._clear(self._kept_bytes, few, function) / max(1, self._batch)
            self._forget()
            self._fits = max(1, int(activation_bytes(self.device, self._memory) / max(an_example, 1)))
        return self._fits

    def _kept_bytes(self, batch: Batch, function: Function) -> int:
        """The bytes of what a forward pass keeps for the backward pass and for the visitor."""
        kept: dict[int, torch.UntypedStorage] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
            return tensor.detach()  # a node that kept its own output would never be freed

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._forward(batch, function)
        for calls in self._calls:
            for call in calls.made:
                if call.inputs is not None:
                    note(call.inputs)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(storage.nbytes() for storage in kept.values())

    def _placed(self, batch: Batch) -> Batch:
        inputs, *rest = (placed(part, self.device) for part in batch)
        if isinstance(inputs, Tensor) and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=self._layout_of(inputs))
        return (differentiable(inputs), *rest)

    def _layout_of(self, images: Tensor) -> torch.memory_format:
        if self._layout is None:
            self._quiet = True
            try:
                self._layout = fastest_layout(self.model, images)
            finally:
                self._quiet = False
        return self._layout

    def _forget(self) -> None:
        self._calls, self._leaves, self._visitor, self._probed = [], [], None, None

    @torch.no_grad()
    def _probe(self, batch: Batch, function: Function) -> None:
        """Decide where every layer's input counts examples, by forward passes of two and of three."""
        count, seen = count_of(batch[0]), []
        for rows in ((0, 1), (0, 1, 2)):
            chosen = torch.tensor([row % count for row in rows], device=self.device)
            self._probed = {}
            function(self.model, tuple(rows_of(part, chosen) for part in batch))
            seen.append(self._probed)
        self._probed = None
        for index, layer in enumerate(self.layers):
            if index in seen[0] and index in seen[1] and index not in self.reasons:
                found = _rows_between(seen[0][index], seen[1][index])
                if isinstance(found, str):
                    self.reasons[index] = f"module {layer.name}: {found}"
                else:
                    self._rows[index] = found

    def _forward_hook(self, index: int, which: int) -> Callable[..., Tensor | None]:
        layer = self.layers[index]

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if self._quiet or index in self.reasons:
                return None
            inputs = args[0] if args else next(iter(kwargs.values()))
            if self._probed is not None:
                self._probed.setdefault(index, inputs.detach().clone())
                return None
            if not torch.is_grad_enabled():  # the caller's own no_grad: no gradient reaches the parameters
                return None
            if not self.reached[index] and not self._computes(layer, module, inputs, output):
                self.reasons[index] = (
                    f"module {layer.name}: {type(module).__name__} computes something else than torch's layer"
                )
                return None
            rows = self._rows_of(index, module, inputs)
            replaced = None
            if not output.requires_grad:
                leaf = output.detach().requires_grad_()
                self._leaves.append(leaf)
                output = replaced = (
                    leaf.clone()
                )  # in-place operations may follow, which a leaf does not allow
            calls = self._calls[index]
            place = len(calls.made)
            calls.made.append(_Call(inputs.detach(), inputs._version, which, rows))
            hook_on_gradient: Callable[..., Any] = output.register_hook  # untyped in torch
            hook_on_gradient(lambda gradient: self._receive(index, place, gradient))
            return replaced

        return hook

    @torch.no_grad()
    def _computes(self, layer: Layer, module: nn.Module, inputs: Tensor, output: Tensor) -> bool:
        """Whether a module of a class of its own computes what its layer does."""
        try:
            expected = layer.plain(module, inputs)
        except (RuntimeError, ValueError, TypeError):
            return False
        if expected is None:
            return True
        slack = 1e-2 if output.dtype.itemsize == 2 else 1e-4
        return expected.shape == output.shape and torch.allclose(expected, output, rtol=slack, atol=slack)

    def _rows_of(self, index: int, module: nn.Module, inputs: Tensor) -> _Rows:
        b, shape = self._batch, inputs.shape
        known = self._rows.get(index)
        if known is None:
            maps = isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, *OF_MAPS))
            # A second dimension of the same length may be the one that counts examples.
            unclear = not maps and inputs.ndim > 1 + inputs.is_floating_point() and shape[1] == b
            if shape[:1] != (b,) or unclear:
                raise _UnclearError
            return _Rows()
        length = shape[known.dimension] if len(shape) > known.dimension else 0
        if length != b * known.fold:
            raise InputError(
                f"module {self.layers[index].name}: its input must count the batch's {b} examples in one "
                f"dimension, found shape {list(shape)}; leave it out of `modules`"
            )
        return known

    def _receive(self, index: int, place: int, gradient: Tensor) -> None:
        calls = self._calls[index]
        call = calls.made[place]
        inputs = call.inputs
        assert inputs is not None
        if inputs._version != call.version:
            raise InputError(
                f"module {self.layers[index].name}: its input is changed in place after its call; "
                "leave it out of `modules` or let that operation make a copy"
            )
        call.inputs = None
        if inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        gradient = gradient.to(self.dtype)
        if call.rows.dimension == 1:
            inputs, gradient = inputs.transpose(0, 1), gradient.transpose(0, 1)
        calls.received.append((inputs, gradient, call.which))
        if len(calls.received) == len(calls.made):
            self._visit(index)

    @torch.no_grad()
    def _visit(self, index: int) -> None:
        received, self._calls[index].received = self._calls[index].received, []
        layer, visitor = self.layers[index], self._visitor
        if not received or visitor is None:
            return
        groups, outputs, inputs = layer.shape
        fold = self._rows.get(index, _Rows()).fold
        positions = fold * sum(layer.positions(gradient) for _, gradient, _ in received)
        self.reached[index] += self._batch * positions
        once = len(received) == 1 and fold == 1
        if once and isinstance(layer, KroneckerLayer) and visitor.whole(index, *received[0][:2]):
            return
        if isinstance(layer, EmbeddingLayer):
            tokens = torch.cat([x.reshape(self._batch, -1) for x, _, _ in received], 1)
            gradients = torch.cat([g.reshape(self._batch, -1, inputs) for _, g, _ in received], 1)
            if visitor.table_rows(index, self._offset, layer.rows(tokens, gradients)):
                return
        an_example = groups * (positions * (inputs + outputs) + 2 * outputs * inputs) * self.dtype.itemsize
        fitting = self.workspace // max(an_example, 1)
        step = max(1, fitting, min(AT_ONCE, self._chunk // max(an_example, 1)))
        for start in range(0, self._batch, step):
            rows = slice(start * fold, (start + step) * fold)
            if isinstance(layer, KroneckerLayer):
                parts = [
                    (
                        _by_example(
                            layer.activations(x[rows], self.scratch, f"patches {place}", which), fold
                        ),
                        _by_example(layer.output_gradients(g[rows], which), fold),
                    )
                    for place, (x, g, which) in enumerate(received)
                ]
                if len(parts) == 1:
                    visitor.kronecker(index, self._offset + start, *parts[0])
                else:  # a module called several times: its positions are those of all calls
                    joined = (torch.cat([pair[side] for pair in parts], 2) for side in (0, 1))
                    visitor.kronecker(index, self._offset + start, *joined)
            elif isinstance(layer, DiagonalLayer):
                total = layer.gradient(received[0][0][rows], received[0][1][rows])
                for x, g, _ in received[1:]:
                    total = total + layer.gradient(x[rows], g[rows])
                if fold > 1:
                    total = total.view(-1, fold, *layer.shape).sum(1)
                visitor.diagonal(index, self._offset + start, total)


def _by_example(rows: Tensor, fold: int) -> Tensor:
    """Float[b k t n] of Float[b*fold k t' n]: the positions of all rows of an example."""
    if fold == 1:
        return rows
    return rows.reshape(-1, fold, *rows.shape[1:]).transpose(1, 2).flatten(2, 3)


def _rows_between(two: Tensor, three: Tensor) -> _Rows | str:
    """Where an input counts examples, from those of two and of three, of which two are the same."""
    grown = [place for place, (a, b) in enumerate(zip(two.shape, three.shape, strict=False)) if a != b]
    if two.ndim != three.ndim or not grown:
        return "its input does not depend on the examples of the batch"
    (place, *more), length = grown, two.shape[grown[0]]
    if not more and place == 0 and length % 2 == 0 and three.shape[0] == 3 * length // 2:
        fold, slack = length // 2, 3e-2 if two.dtype.itemsize == 2 else 1e-3
        same = two.double(), three[:length].double()  # unless rows are ordered otherwise
        if fold == 1 or torch.allclose(*same, rtol=slack, atol=slack, equal_nan=True):
            return _Rows(0, fold)
    elif not more and place == 1 and (length, three.shape[1]) == (2, 3):
        return _Rows(1)
    return "its input does not keep the examples of the batch apart"
