"""Per-example gradients of every kind of layer against a loop over examples, and what is not tracked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from unpoison.data import TensorExamples
from unpoison.errors import InputError
from unpoison.influence import RelativeDamping, coverage, fit_factors, precondition, score
from unpoison.tasks import ClassificationTask

TASK = ClassificationTask()
CLASSES = 3


class Around(nn.Module):
    """The inputs in another shape, a layer, and a head on the mean of its output."""

    def __init__(self, shape: tuple[int, ...], layer: nn.Module, channels: int, last: bool = False) -> None:
        super().__init__()
        self.shape, self.layer, self.last = shape, layer, last
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs.reshape(len(inputs), *self.shape)).tanh()
        hidden = hidden if self.last else hidden.movedim(1, -1)
        return self.head(hidden.reshape(len(inputs), -1, hidden.shape[-1]).mean(1))


class Conv1D(nn.Module):
    """As in transformers: the weight is the transpose of a Linear's."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class LayerScale2d(LayerScale):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None]


class Attending(nn.Module):
    """A Linear and an attention, to itself or to other positions; sequences first or second."""

    def __init__(self, *, first: bool, own: bool = True, **options: Any) -> None:
        super().__init__()
        self.first, self.own, self.stem = first, own, nn.Linear(6, 4)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=not first, **options)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs.reshape(len(inputs), 4, 6))
        other = hidden[:, :3].tanh()
        if self.first:
            hidden, other = hidden.transpose(0, 1), other.transpose(0, 1)
        keys = hidden if self.own else other
        mixed = self.mix(hidden, keys, keys)[0]
        return self.head((hidden + mixed).mean(0 if self.first else 1))


class Encoder(nn.Module):
    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.first = first
        layer = nn.TransformerEncoderLayer(6, 2, 5, dropout=0.0, batch_first=not first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.reshape(len(inputs), 4, 6)
        hidden = self.body(hidden.transpose(0, 1) if self.first else hidden)
        return self.head(hidden.mean(0 if self.first else 1))


class Windows(nn.Module):
    """Layers on parts of an example that are folded into the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.LayerNorm(4)
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        windows = self.conv(inputs.reshape(-1, 2, 4)).movedim(1, -1)
        hidden = self.inner(self.norm(windows)).tanh()
        return self.head(hidden.reshape(len(inputs), -1, 5).sum(1))


class Tied(nn.Module):
    """Two Linear with one weight and a bias of their own each, two convolutions with one weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 8), nn.Linear(24, 8)
        self.second.weight = self.first.weight
        self.conv, self.again = nn.Conv1d(2, 4, 3), nn.Conv1d(2, 4, 3, padding=1, stride=2)
        self.again.weight, self.again.bias = self.conv.weight, self.conv.bias
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        parts = inputs.reshape(len(inputs), 2, 12)
        more = self.conv(parts).mean(2) + self.again(parts).mean(2)
        hidden = self.first(inputs).tanh() + self.second(inputs.flip(1)).tanh()
        return self.head(hidden + more.repeat(1, 2))


class Recurrent(nn.Module):
    """A recurrent layer on sequences of 4; the last states count as well."""

    def __init__(self, kind: type[nn.Module], *, start: bool = False, **options: Any) -> None:
        super().__init__()
        self.stem, self.start = nn.Linear(6, 5), start
        self.layer: Any = kind(5, 4, **options)
        wide = (options.get("proj_size") or 4) * (1 + bool(options.get("bidirectional")))
        self.head, self.ends = nn.Linear(wide, CLASSES), nn.LazyLinear(CLASSES, dtype=torch.float64)
        self.double()(torch.zeros(2, 24, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs.reshape(len(inputs), 4, 6))
        if not self.layer.batch_first:
            hidden = hidden.transpose(0, 1)
        state = None
        if self.start:
            sides = self.layer.num_layers * (1 + self.layer.bidirectional)
            state = hidden.new_full((sides, len(inputs), 4), 0.3)
        output, last = self.layer(hidden, state)
        last = torch.cat(last, -1) if isinstance(last, tuple) else last
        if not self.layer.batch_first:
            output = output.transpose(0, 1)
        return self.head(output.mean(1)) + self.ends(last.transpose(0, 1).flatten(1))


class Celled(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.cell, self.head = kind(6, 4, **options), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        state: Any = None
        for part in inputs.reshape(len(inputs), 4, 6).unbind(1):
            state = self.cell(part, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Crossed(nn.Module):
    """Bilinear on positions and on vectors, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.at, self.of = nn.Bilinear(3, 4, 5), nn.Bilinear(5, 24, CLASSES, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        parts = inputs.reshape(len(inputs), 4, 6)
        return self.of(self.at(parts[..., :3], parts[..., 2:]).tanh().sum(1), inputs)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.rand(5)), nn.Linear(5, 5)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.scale * self.inner(hidden)


class Lone(nn.Module):
    """As in vision transformers: a token that is expanded, positions that are added, scales of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.of_maps = nn.Conv1d(4, 4, 3, padding=1), nn.Parameter(torch.rand(4, 1))
        self.stem, self.token = nn.Linear(6, 5), nn.Parameter(torch.randn(1, 1, 5))
        self.places, self.more = nn.Parameter(torch.randn(1, 5, 5)), nn.Parameter(torch.randn(5, 5))
        self.first = nn.Parameter(torch.randn(5, 1, 5))
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(5, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        parts = inputs.reshape(len(inputs), 4, 6)
        hidden = self.stem(parts + self.of_maps * self.conv(parts))
        hidden = torch.cat([self.token.expand(len(inputs), -1, -1), hidden], 1) + self.places + self.more
        hidden = (hidden.transpose(0, 1).tanh() * self.first).transpose(0, 1)
        return self.head(self.blocks(hidden).mean(1))


class Halved(nn.Linear):
    """Not what a Linear computes."""

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight / 2, self.bias)


class Doubled(nn.Linear):
    """A class of its own that computes what a Linear does."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.t() + self.bias


NETS: dict[str, Callable[[], nn.Module]] = {
    "Conv1d": lambda: Around((2, 12), nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2), 4),
    "Conv1d, groups": lambda: Around(
        (4, 6), nn.Conv1d(4, 4, 3, groups=2, padding_mode="circular", padding=1), 4
    ),
    "Conv3d": lambda: Around((2, 2, 2, 3), nn.Conv3d(2, 4, (1, 2, 2), padding=(1, 0, 1)), 4),
    "Conv3d, groups": lambda: Around(
        (2, 2, 2, 3), nn.Conv3d(2, 4, 2, groups=2, stride=(1, 1, 2), bias=False), 4
    ),
    "ConvTranspose1d": lambda: Around((4, 6), nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2), 6),
    "ConvTranspose2d": lambda: Around(
        (3, 4, 2), nn.ConvTranspose2d(3, 4, (3, 2), stride=(2, 3), padding=(2, 0), output_padding=(1, 2)), 4
    ),
    "ConvTranspose3d": lambda: Around((3, 2, 2, 2), nn.ConvTranspose3d(3, 2, 2, dilation=2, bias=False), 2),
    "Conv1D of transformers": lambda: Around((4, 6), Conv1D(5, 6), 5, last=True),
    "LayerScale": lambda: Around((4, 6), LayerScale(6), 6, last=True),
    "LayerScale2d": lambda: Around((6, 2, 2), LayerScale2d(6), 6),
    "RMSNorm": lambda: Around((4, 6), nn.RMSNorm(6), 6, last=True),
    "InstanceNorm": lambda: Around((4, 6), nn.InstanceNorm1d(4, affine=True), 4),
    "BatchNorm1d of vectors": lambda: Around((24,), nn.BatchNorm1d(24), 24, last=True),
    "LayerNorm of maps": lambda: Around((4, 6), nn.LayerNorm((4, 6)), 6, last=True),
    "attention": lambda: Attending(first=False),
    "attention, sequence first": lambda: Attending(first=True),
    "attention without bias": lambda: Attending(first=False, bias=False, add_zero_attn=True),
    "attention to others": lambda: Attending(first=False, own=False),
    "attention to others, sequence first": lambda: Attending(first=True, own=False),
    "encoder": lambda: Encoder(first=False),
    "encoder, sequence first": lambda: Encoder(first=True),
    "windows": Windows,
    "tied": Tied,
    "LSTM": lambda: Recurrent(nn.LSTM, batch_first=True),
    "LSTM, sequence first, two layers, both directions": lambda: Recurrent(
        nn.LSTM, num_layers=2, bidirectional=True
    ),
    "LSTM with a projection": lambda: Recurrent(nn.LSTM, num_layers=2, proj_size=3, bidirectional=True),
    "GRU": lambda: Recurrent(nn.GRU, batch_first=True, num_layers=2, start=True),
    "GRU, sequence first, without bias": lambda: Recurrent(nn.GRU, bidirectional=True, bias=False),
    "RNN": lambda: Recurrent(nn.RNN, batch_first=True, nonlinearity="relu", start=True),
    "RNN of tanh": lambda: Recurrent(nn.RNN),
    "LSTMCell": lambda: Celled(nn.LSTMCell),
    "GRUCell": lambda: Celled(nn.GRUCell, bias=False),
    "RNNCell": lambda: Celled(nn.RNNCell, nonlinearity="relu"),
    "Bilinear": Crossed,
    "PReLU": lambda: Around((4, 6), nn.Sequential(nn.PReLU(), nn.PReLU(4)), 4),
    "PReLU of vectors": lambda: Around((24,), nn.PReLU(24), 24, last=True),
    "lone parameters": Lone,
    "a class of its own": lambda: Around((4, 6), Doubled(6, 5), 5, last=True),
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make().double()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                nn.init.uniform_(parameter, 0.2, 1.0)
    return model.eval()


def drawn(count: int = 6) -> TensorExamples:
    generator = torch.Generator().manual_seed(5)
    return TensorExamples(
        torch.randn(count, 24, generator=generator, dtype=torch.float64), torch.arange(count) % CLASSES
    )


def loop(model: nn.Module, function: Any, batch: tuple[Tensor, ...], names: list[str]) -> Tensor:
    """Float[b p]: gradients of one example after the other over the parameters `names`."""
    parameters, rows = dict(model.named_parameters()), []
    for index in range(len(batch[0])):
        value = function(model, tuple(part[index : index + 1] for part in batch)).sum()
        parts = torch.autograd.grad(value, [parameters[name] for name in names])
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten(1) for value in values.values()], 1)


@pytest.mark.parametrize("count", [4, 6])  # sequences have four positions
@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_a_loop_over_examples(name: str, count: int) -> None:
    model, examples = seeded(NETS[name]), drawn(count)
    outputs = model(examples.tensors[0])
    factors = fit_factors(model, examples, TASK, seed=1, modules=["*"], batch_size=count)
    batch = examples.batch(0, count)
    plain = precondition(model, None, batch, TASK, modules=["*"]).by_parameter(model)
    assert set(plain) == set(dict(model.named_parameters()))
    assert coverage(model, list(factors.layers)).share == 1
    torch.testing.assert_close(flat(plain), loop(model, TASK.measurement, batch, list(plain)))
    queries = precondition(model, factors, examples.batch(1, 2), TASK, damping=RelativeDamping(0.2))
    gradients = loop(model, TASK.loss, batch, list(plain))
    for batch_size in (count, 2):
        scores = score(model, queries, examples, TASK, batch_size=batch_size, workspace_bytes=3000)
        torch.testing.assert_close(scores.values, flat(queries.by_parameter(model)) @ gradients.T)
    assert torch.equal(model(examples.tensors[0]), outputs)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_by_default_matrix_products_are_tracked_and_the_rest_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.stem = nn.Parameter(torch.zeros(1, 6)), nn.Linear(24, 6)
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.norm(self.stem(inputs) + self.token))

    model, examples = seeded(Net), drawn()
    found = coverage(model, list(fit_factors(model, examples, TASK, seed=0).layers))
    assert found.untracked == ("token", "norm.weight", "norm.bias")
    assert found.share == pytest.approx(1 - 18 / (18 + 24 * 6 + 6 + 6 * CLASSES + CLASSES))
    every = coverage(model, list(fit_factors(model, examples, TASK, seed=0, modules=["*"]).layers))
    assert every.untracked == ()
    some = fit_factors(model, examples, TASK, seed=0, modules=["n*", "head"])
    assert list(some.layers) == ["norm", "head"]
    with pytest.raises(InputError, match=r"no module that can be tracked matches 'x\*'"):
        fit_factors(model, examples, TASK, seed=0, modules=["x*"])


class Careless(nn.Module):
    """Parameters in whose place no copies can be put."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.head = what, nn.Linear(6, CLASSES)
        self.own = nn.Parameter(torch.rand({"matrix": (24, 6), "unused": (6,)}.get(what, (1, 6))))
        self.stem = nn.Linear(24, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        if self.what == "first row":
            hidden = hidden * self.own[0]
        elif self.what == "mean":
            hidden = hidden + self.own.mean()
        elif self.what == "matrix":
            hidden = hidden + inputs @ self.own
        elif self.what == "shape":
            assert self.own.shape[0] == 1
            hidden = hidden + self.own
        return self.head(hidden)


@pytest.mark.parametrize("what", ["first row", "mean", "matrix", "unused", "shape"])
def test_a_parameter_whose_gradient_cannot_be_told_apart_is_not_tracked(what: str) -> None:
    model, examples = seeded(lambda: Careless(what)), drawn()
    outputs, names = model(examples.tensors[0]), list(model.state_dict())
    factors = fit_factors(model, examples, TASK, seed=0, modules=["*"])
    assert coverage(model, list(factors.layers)).untracked == ("own",)
    assert factors.unreached == ("own",)
    with pytest.raises(InputError, match="not reached by the forward pass, or not by gradients: own"):
        fit_factors(model, examples, TASK, seed=0, modules=["own", "stem"])
    assert torch.equal(model(examples.tensors[0]), outputs)
    assert list(model.state_dict()) == names
    assert all(isinstance(one, nn.Parameter) for one in model._parameters.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_network_that_fails_gets_its_parameters_back() -> None:
    class Failing(Lone):
        fails = False

        def forward(self, inputs: Tensor) -> Tensor:
            output = super().forward(inputs)
            if self.fails:
                raise RuntimeError("out of order")
            return output

    model, examples = seeded(Failing), drawn()
    own = {name: id(one) for name, one in model.named_parameters()}
    model.fails = True
    with pytest.raises(InputError, match="out of order"):
        fit_factors(model, examples, TASK, seed=0, modules=["*"])
    assert {name: id(one) for name, one in model.named_parameters()} == own


def test_recurrent_layers_and_bilinear_are_tracked_by_default_and_by_their_names() -> None:
    model, examples = seeded(lambda: Recurrent(nn.LSTM, bidirectional=True)), drawn()
    factors = fit_factors(model, examples, TASK, seed=0)
    assert coverage(model, list(factors.layers)).share == 1
    some = fit_factors(model, examples, TASK, seed=0, modules=["layer"])
    names = [f"layer.weight_{part}_l0{end}" for end in ("", "_reverse") for part in ("ih", "hh")]
    assert list(some.layers) == names
    crossed = seeded(Crossed)
    assert coverage(crossed, list(fit_factors(crossed, examples, TASK, seed=0).layers)).share == 1


def test_packed_sequences_are_not_tracked() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            lengths = torch.full((len(inputs),), 3)
            packed = nn.utils.rnn.pack_padded_sequence(inputs.reshape(-1, 4, 6), lengths, batch_first=True)
            return self.head(self.layer(packed)[1][0])

    model = seeded(Packed)
    factors = fit_factors(model, drawn(), TASK, seed=0)
    assert list(factors.layers) == ["head"]
    assert len(coverage(model, list(factors.layers)).untracked) == 4


def test_a_class_that_computes_something_else_is_not_tracked() -> None:
    model, examples = seeded(lambda: Around((4, 6), Halved(6, 5), 5, last=True)), drawn()
    factors = fit_factors(model, examples, TASK, seed=0)
    assert list(factors.layers) == ["head"]
    assert coverage(model, list(factors.layers)).untracked == ("layer.weight", "layer.bias")
    with pytest.raises(InputError, match="Halved computes something else"):
        fit_factors(model, examples, TASK, seed=0, modules=["layer", "head"])


def test_a_parametrised_layer_is_tracked_by_the_weight_that_it_computes_with() -> None:
    model = seeded(lambda: Around((24,), parametrizations.weight_norm(nn.Linear(24, 5)), 5, last=True))
    factors = fit_factors(model, drawn(), TASK, seed=0)
    assert coverage(model, list(factors.layers)).share == 1


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_a_part_that_no_gradient_reaches_is_not_tracked(how: str) -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(24, 6), nn.Linear(6, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            if how == "detach":
                return self.head(self.body(inputs).tanh().detach())
            with torch.no_grad():
                hidden = self.body(inputs).tanh()
            return self.head(hidden)

    model, examples = seeded(Probe), drawn()
    factors = fit_factors(model, examples, TASK, seed=0)
    assert list(factors.layers) == ["head"]
    assert factors.unreached == ("body",)
    assert coverage(model, list(factors.layers)).untracked == ("body.weight", "body.bias")
    with pytest.raises(InputError, match="not by gradients: body"):
        fit_factors(model, examples, TASK, seed=0, modules=["body", "head"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_scored_as_single_precision_up_to_rounding(dtype: torch.dtype) -> None:
    model, examples = seeded(lambda: Around((24,), nn.Linear(24, 5), 5, last=True)), drawn(12)

    def scores(network: nn.Module) -> Tensor:
        queries = precondition(network, None, examples.batch(0, 1), TASK)
        return score(network, queries, examples, TASK).values

    exact = scores(model.float())
    found = scores(model.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.05 * float(exact.abs().max()))


def test_neither_inference_mode_nor_autocast_of_the_caller_changes_a_number() -> None:
    model, examples = seeded(Tied).float(), drawn()

    def scores() -> Tensor:
        factors = fit_factors(model, examples, TASK, seed=0)
        return score(model, precondition(model, factors, examples.batch(0, 2), TASK), examples, TASK).values

    expected = scores()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scores(), expected)
