"""Kinds of network that people have, at tiny sizes, and what is expected of each verb."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from compat_datasets import COUNT, Bag, Rows, convolution, labels_of, of_values, pictures
from compat_harness import ONLY_IMAGES, Case, Kind, Refused, Works, table
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from unpoison.data import TrainingSet

NETWORKS: Final[list[Kind]] = []
kind = table(NETWORKS)
CLASSES: Final = 3
PROBABILITIES: Final = Refused("probabilit")
ALL_AT_ONCE: Final = (Works(), Refused("example by example.*per_example"))
"""Where torch cannot differentiate example by example, the message says what to set."""
SEEN_BY_ALL: Final = ("trace", "variations", "retrain", "fine_tune", "relabel", "scrub", "ssd")
"""The verbs that look at outputs; `scan` looks at features alone."""


def of_network(
    build: Callable[[], nn.Module],
    *,
    plain: Callable[[nn.Module], nn.Module] = lambda network: network,
    channels: int = 3,
    size: int = 8,
    classes: int = CLASSES,
    names: int | None = None,
    training: bool = False,
    **more: Any,
) -> Case:
    """A case whose dataset is a `TrainingSet`: only the network is unusual.

    Arguments:
        build: makes the network.
        plain: of the network, the same one with one tensor of logits.
        classes: logits of the plain network, and classes of the set where `names` does not say else.
    """
    images = pictures(channels, size)
    labels = labels_of() % min(classes, CLASSES)
    training_set = TrainingSet(images, labels, tuple(str(label) for label in range(names or classes)))
    query = images[2].flip(-1)
    return Case(
        open=lambda: training_set,
        model=in_mode(build(), training),
        fresh=build,
        plain=plain,
        query=query,
        inputs=(images.float() / 255,),
        labels=labels,
        classes=classes,
        query_inputs=(query[None].float() / 255,),
        training_set=TrainingSet(images, labels, tuple(str(label) for label in range(classes))),
        **more,
    )


def in_mode(network: nn.Module, training: bool) -> nn.Module:
    """The network in train or eval mode, where it has modes."""
    with contextlib.suppress(NotImplementedError):  # what torch.export gives
        network.train(training)
    return network


class Returning(nn.Module):
    """A network that returns something made of its logits and its inputs."""

    def __init__(
        self, make: Callable[[Tensor, Tensor], Any], classes: int = CLASSES, network: Any = None
    ) -> None:
        super().__init__()
        self.net, self.make = network or convolution(classes=classes), make

    def forward(self, images: Tensor) -> Any:
        return self.make(self.net(images), images)


class Through(nn.Module):
    """A plain network: `take` of what another one returns."""

    def __init__(self, network: nn.Module, take: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network, self.take = network, take

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return self.take(self.network(*inputs, **named))


def returning(make: Callable[[Tensor, Tensor], Any], take: Callable[[Any], Tensor], **more: Any) -> Case:
    """A case of a network that returns `make(logits, images)`, from which `take` gives the logits."""
    return of_network(lambda: Returning(make), plain=lambda network: Through(network, take), **more)


def every_output(expected: Any) -> dict[str, Any]:
    """Expectations of the verbs that look at outputs."""
    return dict.fromkeys(SEEN_BY_ALL, expected) | {"coverage": expected}


# What networks return.


class Answer(NamedTuple):
    loss: Tensor | None
    logits: Tensor


@kind("one tensor of logits")
def tensor_output(folder: Path) -> Case:
    return of_network(convolution)


@kind("a tuple (logits, features)")
def tuple_output(folder: Path) -> Case:
    return returning(lambda logits, images: (logits, images.flatten(1)), lambda outputs: outputs[0])


@kind("a list [logits]")
def list_output(folder: Path) -> Case:
    return returning(lambda logits, images: [logits], lambda outputs: outputs[0])


@kind('a dict {"logits": ...}')
def dict_output(folder: Path) -> Case:
    return returning(
        lambda logits, images: {"features": images, "logits": logits}, lambda outputs: outputs["logits"]
    )


@kind("a dict with one tensor of another name")
def odd_dict_output(folder: Path) -> Case:
    return returning(lambda logits, images: {"prediction": logits}, lambda outputs: outputs["prediction"])


@kind("a dict in which nothing is called logits", **every_output(Refused("logits")))
def unclear_dict(folder: Path) -> Case:
    return returning(lambda logits, images: {"a": logits, "b": 2 * logits}, lambda outputs: outputs["a"])


@kind("a named tuple (loss=None, logits)")
def named_tuple(folder: Path) -> Case:
    return returning(lambda logits, images: Answer(None, logits), lambda outputs: outputs.logits)


@kind("a ModelOutput of transformers", needs=["transformers"])
def model_output(folder: Path) -> Case:
    from transformers.modeling_outputs import ImageClassifierOutput

    return returning(
        lambda logits, images: ImageClassifierOutput(logits=logits), lambda outputs: outputs.logits
    )


@kind("auxiliary outputs in train mode alone (Inception)")
def auxiliary(folder: Path) -> Case:
    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.aux = convolution(), convolution()

        def forward(self, images: Tensor) -> Any:
            return (self.net(images), self.aux(images)) if self.training else self.net(images)

    def plain(network: nn.Module) -> nn.Module:
        return Through(network, lambda outputs: outputs[0] if isinstance(outputs, tuple) else outputs)

    return of_network(Inception, plain=plain)


def _two_logits(outputs: Tensor) -> Tensor:
    one = outputs.reshape(len(outputs), 1)
    return torch.cat([torch.zeros_like(one), one], 1)


@kind("a binary head: one logit, [b, 1]")
def one_logit(folder: Path) -> Case:
    return of_network(lambda: convolution(classes=1), plain=lambda net: Through(net, _two_logits), classes=2)


@kind("a binary head: one logit, [b]")
def one_logit_flat(folder: Path) -> Case:
    def build() -> nn.Module:
        return Returning(lambda logits, images: logits[:, 0], classes=1)

    return of_network(build, plain=lambda net: Through(net, _two_logits), classes=2)


@kind("more logits than classes (1,000 for 3)")
def more_logits(folder: Path) -> Case:
    def build() -> nn.Module:
        network = convolution(classes=1000)
        with torch.no_grad():
            network[-1].bias[CLASSES:] -= 9  # the others are not what the network answers
        return network

    case = of_network(build, classes=1000, names=3)
    case.training_set = case.open()  # labels are drawn from the classes of the set
    return case


@kind(
    "fewer logits than classes",
    scan=(Works(), Refused("logit|class")),
    **every_output(Refused("logit|class|output")),
)
def fewer_logits(folder: Path) -> Case:
    return of_network(lambda: convolution(classes=2), classes=3)


@kind("probabilities (softmax inside)", **every_output(PROBABILITIES))
def probabilities(folder: Path) -> Case:
    return of_network(lambda: nn.Sequential(convolution(), nn.Softmax(1)))


@kind("one probability (sigmoid inside)", **every_output(PROBABILITIES))
def one_probability(folder: Path) -> Case:
    return of_network(lambda: nn.Sequential(convolution(classes=1), nn.Sigmoid()), classes=2)


@kind("log-probabilities (log-softmax inside)")
def log_probabilities(folder: Path) -> Case:
    return of_network(
        lambda: nn.Sequential(convolution(), nn.LogSoftmax(1)), plain=lambda network: network[0]
    )


@kind("maps of logits [b, c, 1, 1]", **every_output((Works(), Refused("shape|logit"))))
def maps(folder: Path) -> Case:
    def build() -> nn.Module:
        return Returning(lambda logits, images: logits[..., None, None])

    return of_network(build, plain=lambda net: Through(net, lambda outputs: outputs.flatten(1)))


@kind("logits for each position [b, t, c]", **every_output(Refused("shape|logit")))
def positions(folder: Path) -> Case:
    return of_network(lambda: Returning(lambda logits, images: logits[:, None].expand(-1, 4, -1)))


# Precision.


@kind("float64")
def double(folder: Path) -> Case:
    return of_network(lambda: convolution().double(), plain=lambda net: copy.deepcopy(net).float())


@kind(
    "bfloat16",
    **{verb: Works(0.3) for verb in (*SEEN_BY_ALL, "scan")},
)
def brain(folder: Path) -> Case:
    return of_network(lambda: convolution().bfloat16(), plain=lambda net: copy.deepcopy(net).float())


@kind("float16", **{verb: Works(0.3) for verb in (*SEEN_BY_ALL, "scan")})
def half(folder: Path) -> Case:
    return of_network(lambda: convolution().half(), plain=lambda net: copy.deepcopy(net).float())


class Mixed(nn.Module):
    """A body in bfloat16 and a head in float32, as large networks are fine-tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16)).bfloat16()
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images.bfloat16()).float().relu())
        return logits


@kind("bfloat16 body and float32 head")
def mixed_precision(folder: Path) -> Case:
    return of_network(Mixed)


@kind("int8, dynamically quantised", every=(Works(), Refused("quantis|quantiz|int8|parameters")))
def quantised(folder: Path) -> Case:
    def build() -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(convolution(), {nn.Linear}, torch.qint8)

    return of_network(build)


# How the verbs are called.


@kind("called under no_grad")
def under_no_grad(folder: Path) -> Case:
    return of_network(convolution, wrapped=torch.no_grad)


@kind("called under inference_mode")
def under_inference_mode(folder: Path) -> Case:
    return of_network(convolution, wrapped=torch.inference_mode)


@kind("called under autocast to bfloat16")
def under_autocast(folder: Path) -> Case:
    return of_network(convolution, wrapped=lambda: torch.autocast("cpu", dtype=torch.bfloat16))


@kind("made under inference_mode", every=(Works(), Refused("inference")))
def made_under_inference(folder: Path) -> Case:
    with torch.inference_mode():
        network = convolution()
    case = of_network(convolution)
    case.model = network
    case.plain = lambda net: _copied(net) if net is network else net
    return case


def _copied(network: nn.Module) -> nn.Module:
    twin = convolution()
    twin.load_state_dict({name: value.clone() for name, value in network.state_dict().items()})
    return twin


@kind("given in train mode, with dropout and batch norm")
def train_mode(folder: Path) -> Case:
    return of_network(_with_norm, training=True)


# Frozen and unused parts.


class Frozen(nn.Module):
    """A body under no_grad and a head, as a linear probe has."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(192, 16), nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.body(images.flatten(1)).relu()
        logits: Tensor = self.head(features)
        return logits


class Detached(Frozen):
    """The same with `detach`, which is known to work."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images.flatten(1)).relu().detach())
        return logits


def _detached(network: nn.Module) -> nn.Module:
    twin = Detached()
    twin.load_state_dict(network.state_dict())
    return twin


@kind("a part under no_grad in `forward`")
def part_under_no_grad(folder: Path) -> Case:
    return of_network(Frozen, plain=_detached)


@kind("a part that is detached in `forward`")
def detached(folder: Path) -> Case:
    return of_network(Detached)


@kind("frozen parts (requires_grad=False)")
def frozen(folder: Path) -> Case:
    def build() -> nn.Module:
        network = convolution()
        network[0].requires_grad_(False)
        return network

    return of_network(build)


@kind(
    "everything frozen",
    fine_tune=Refused("frozen|requires a gradient"),
    relabel=Refused("frozen"),
    scrub=Refused("frozen"),
    retrain=(Works(), Refused("frozen|requires a gradient")),
    ssd=Refused("frozen|requires a gradient"),
)
def all_frozen(folder: Path) -> Case:
    return of_network(lambda: convolution().requires_grad_(False))


@kind("heads that are not used")
def unused(folder: Path) -> Case:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.heads = convolution(), nn.ModuleList([nn.Linear(4, 2), nn.Conv2d(3, 2, 1)])

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.net(images)
            return logits

    return of_network(Heads)


@kind("no parameters at all", every=Refused("parameters|Linear"))
def nothing(folder: Path) -> Case:
    return of_network(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))


# Wrappers.


@kind("DataParallel")
def data_parallel(folder: Path) -> Case:
    return of_network(lambda: nn.DataParallel(convolution()), plain=lambda net: net.module)


@kind("AveragedModel (EMA, SWA)")
def averaged(folder: Path) -> Case:
    from torch.optim.swa_utils import AveragedModel

    return of_network(lambda: AveragedModel(convolution()), plain=lambda net: net.module)


@kind("torch.compile")
def compiled(folder: Path) -> Case:
    return of_network(lambda: torch.compile(convolution(), backend="eager"), plain=lambda net: net._orig_mod)


@kind("TorchScript", every=Refused("TorchScript|script"))
def scripted(folder: Path) -> Case:
    return of_network(lambda: torch.jit.trace(convolution(), torch.zeros(2, 3, 8, 8)))


@kind("torch.fx GraphModule")
def graph(folder: Path) -> Case:
    return of_network(lambda: torch.fx.symbolic_trace(convolution()))


@kind("torch.export", every=(Works(), Refused("export|Linear|Guard")))
def exported(folder: Path) -> Case:
    return of_network(lambda: torch.export.export(convolution(), (torch.zeros(COUNT, 3, 8, 8),)).module())


@kind("LightningModule", needs=["lightning"])
def lightning_module(folder: Path) -> Case:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolution()

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.net(images)
            return logits

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

    return of_network(Classifier)


@kind("peft LoRA", needs=["peft", "transformers"])
def lora(folder: Path) -> Case:
    import peft

    def build() -> nn.Module:
        config = peft.LoraConfig(r=2, target_modules=["1"], modules_to_save=["3"])
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        return peft.get_peft_model(network, config)

    return of_network(build)


@kind("with the user's own forward hooks")
def hooked(folder: Path) -> Case:
    def build() -> nn.Module:
        network = convolution()
        network[0].register_forward_hook(lambda module, inputs, output: output * 0.5)
        return network

    return of_network(build)


@kind("gradient checkpointing", ssd=ALL_AT_ONCE)
def checkpointed(folder: Path) -> Case:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolution()

        def forward(self, images: Tensor) -> Tensor:
            hidden = checkpoint(self.net[:3], images, use_reentrant=False)
            logits: Tensor = self.net[3:](hidden)
            return logits

    return of_network(Checkpointed, plain=lambda net: net.net)


# Layers.


def _with_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(216, CLASSES),
    )


@kind("batch norm and in-place activations")
def batch_norm(folder: Path) -> Case:
    return of_network(_with_norm)


@kind("batch norm without running statistics", every=Refused("batch norm|batch"))
def batch_norm_mixing(folder: Path) -> Case:
    return of_network(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6, track_running_stats=False),
            nn.Flatten(),
            nn.Linear(216, CLASSES),
        )
    )


@kind("group, instance and layer norm")
def other_norms(folder: Path) -> Case:
    return of_network(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.GroupNorm(2, 6),
            nn.InstanceNorm2d(6, affine=True),
            nn.Flatten(),
            nn.LayerNorm(216),
            nn.Linear(216, CLASSES),
        )
    )


class Recurrent(nn.Module):
    """The rows of an image one after the other."""

    def __init__(self, layer: type[nn.RNNBase], *, batch_first: bool) -> None:
        super().__init__()
        self.rnn, self.first = layer(24, 8, batch_first=batch_first), batch_first
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.permute(0, 2, 1, 3).flatten(2)
        outputs = self.rnn(rows if self.first else rows.transpose(0, 1))[0]
        logits: Tensor = self.head(outputs[:, -1] if self.first else outputs[-1])
        return logits


@kind("LSTM")
def lstm(folder: Path) -> Case:
    return of_network(lambda: Recurrent(nn.LSTM, batch_first=True))


@kind("GRU, sequence first", ssd=ALL_AT_ONCE)
def gru(folder: Path) -> Case:
    return of_network(lambda: Recurrent(nn.GRU, batch_first=False))


class Attending(nn.Module):
    """A small vision transformer of torch's own layers, with a position embedding."""

    def __init__(self, *, batch_first: bool = True, encoder: bool = True) -> None:
        super().__init__()
        self.first, self.stem = batch_first, nn.Linear(12, 8)
        self.positions = nn.Parameter(torch.randn(16, 8) * 0.1)
        if encoder:
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
            self.mix: nn.Module = nn.TransformerEncoder(layer, 2)
        else:
            self.mix = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, 2, stride=2).transpose(1, 2)
        patches = patches if self.first else patches.transpose(0, 1)
        if self.first:
            hidden = self.stem(patches) + self.positions
        else:
            hidden = self.stem(patches) + self.positions[:, None]
        if isinstance(self.mix, nn.MultiheadAttention):
            hidden = self.mix(hidden, hidden, hidden, need_weights=False)[0]
        else:
            hidden = self.mix(hidden)
        logits: Tensor = self.head(hidden.mean(1 if self.first else 0))
        return logits


def _batch_first(network: nn.Module) -> nn.Module:
    assert isinstance(network, Attending)
    encoder = not isinstance(network.mix, nn.MultiheadAttention)
    twin = Attending(batch_first=True, encoder=encoder)
    twin.load_state_dict(network.state_dict())
    return twin


@kind("MultiheadAttention (packed projections)")
def attention(folder: Path) -> Case:
    return of_network(lambda: Attending(encoder=False))


@kind("TransformerEncoder (its fast path in eval mode)")
def encoder(folder: Path) -> Case:
    return of_network(Attending)


@kind("TransformerEncoder, sequence first")
def encoder_sequence_first(folder: Path) -> Case:
    return of_network(lambda: Attending(batch_first=False), plain=_batch_first)


@kind("a Linear on sequences, sequence first")
def linear_sequence_first(folder: Path) -> Case:
    return of_network(lambda: Attending(batch_first=False, encoder=False), plain=_batch_first)


@kind("LayerScale and position embeddings")
def layer_scale(folder: Path) -> Case:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Linear(192, 16), nn.Linear(16, 16)
            self.gamma, self.shift = nn.Parameter(torch.full((16,), 0.1)), nn.Parameter(torch.zeros(16))
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.stem(images.flatten(1)) + self.shift
            logits: Tensor = self.head(self.norm(hidden + self.gamma * self.block(hidden).relu()))
            return logits

    return of_network(Scaled)


class Reshaped(nn.Module):
    """The image in another shape, a layer, and a head."""

    def __init__(self, shape: tuple[int, ...], layer: nn.Module, width: int) -> None:
        super().__init__()
        self.shape, self.layer, self.head = shape, layer, nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(images.reshape(len(images), *self.shape)).relu().flatten(1))
        return logits


@kind("Conv1d")
def conv1d(folder: Path) -> Case:
    return of_network(lambda: Reshaped((3, 64), nn.Conv1d(3, 4, 8, stride=8), 32))


@kind("Conv3d")
def conv3d(folder: Path) -> Case:
    return of_network(lambda: Reshaped((1, 3, 8, 8), nn.Conv3d(1, 4, (3, 4, 4), stride=(1, 4, 4)), 16))


@kind("ConvTranspose2d")
def transposed(folder: Path) -> Case:
    return of_network(lambda: Reshaped((12, 4, 4), nn.ConvTranspose2d(12, 2, 2, stride=2), 128))


@kind("Embedding of grey levels")
def embedding(folder: Path) -> Case:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(16, 4), nn.Linear(768, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head(self.table((images * 15).round().long().flatten(1)).flatten(1))
            return logits

    return of_network(Levels)


@kind("Bilinear and PReLU")
def bilinear(folder: Path) -> Case:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act, self.both = nn.Linear(192, 6), nn.PReLU(), nn.Bilinear(6, 6, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.act(self.stem(images.flatten(1)))
            logits: Tensor = self.both(hidden, hidden)
            return logits

    return of_network(Two)


def _parametrised(make: Callable[[nn.Module], Any]) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        def network() -> nn.Module:
            made = convolution()
            make(made[0])
            make(made[4])
            return made

        return of_network(network)

    return build


kind("weight norm (parametrisation)")(_parametrised(parametrizations.weight_norm))
kind("spectral norm (parametrisation)")(_parametrised(parametrizations.spectral_norm))


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(192, 8), nn.Linear(8, 192)
        self.decode.weight = nn.Parameter(torch.empty(192, 8))
        self.again, self.head = nn.Linear(192, 8), nn.Linear(192, CLASSES)
        nn.init.normal_(self.decode.weight, std=0.1)
        self.again.weight = self.encode.weight

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.decode(self.encode(images.flatten(1)).relu())
        logits: Tensor = self.head(self.decode(self.again(hidden).relu()))
        return logits


@kind("tied weights: two modules share one parameter")
def tied(folder: Path) -> Case:
    return of_network(Tied)


@kind("a module that is called several times")
def repeated(folder: Path) -> Case:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.step, self.head = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.stem(images.flatten(1))
            for _ in range(3):
                hidden = self.step(hidden).relu()
            logits: Tensor = self.head(hidden)
            return logits

    return of_network(Loop)


@kind(
    "parameters of its own, without layers (F.linear)",
    **dict.fromkeys(("scan", "trace", "variations", "coverage"), (Works(), Refused("Linear"))),
)
def functional_only(folder: Path) -> Case:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.randn(8, 192) * 0.1)
            self.two = nn.Parameter(torch.randn(CLASSES, 8))

        def forward(self, images: Tensor) -> Tensor:
            return F.linear(F.linear(images.flatten(1), self.one).relu(), self.two)

    return of_network(Functional)


@kind("lazy modules, not yet run", every=Refused("lazy|uninitiali"))
def lazy(folder: Path) -> Case:
    return of_network(lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(CLASSES)))


@kind("takes images of another size", every=Refused("shape|size|input"))
def other_size(folder: Path) -> Case:
    return of_network(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 196, CLASSES)))


@kind("takes another number of channels", every=Refused("channel|shape|input"))
def other_channels(folder: Path) -> Case:
    return of_network(lambda: convolution(channels=1))


@kind("flattens with view (refuses channels last)")
def viewing(folder: Path) -> Case:
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.conv(images).relu()
            logits: Tensor = self.head(hidden.view(len(hidden), -1))
            return logits

    return of_network(View)


# Networks of other packages.


def _tiny_vit(**options: Any) -> nn.Module:
    import timm

    network: nn.Module = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, num_classes=CLASSES, embed_dim=24, depth=2, num_heads=3, **options
    )
    return network


@kind("timm ViT", needs=["timm", "torchvision"])
def timm_vit(folder: Path) -> Case:
    return of_network(_tiny_vit, size=32)


@kind("timm ConvNeXt", needs=["timm", "torchvision"])
def timm_convnext(folder: Path) -> Case:
    import timm

    def build() -> nn.Module:
        network: nn.Module = timm.models.convnext.ConvNeXt(
            depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=CLASSES
        )
        return network

    return of_network(build, size=32)


@kind("timm ResNet", needs=["timm", "torchvision"])
def timm_resnet(folder: Path) -> Case:
    import timm

    def build() -> nn.Module:
        network: nn.Module = timm.models.resnet.ResNet(
            timm.models.resnet.BasicBlock,
            (1, 1, 1, 1),
            channels=(8, 8, 16, 16),
            stem_width=8,
            num_classes=CLASSES,
        )
        return network

    return of_network(build, size=32)


@kind("timm EfficientNet", needs=["timm", "torchvision"])
def timm_efficientnet(folder: Path) -> Case:
    import timm
    from timm.models import _efficientnet_builder as builder

    def build() -> nn.Module:
        blocks = builder.decode_arch_def([["ds_r1_k3_s1_e1_c8"], ["ir_r1_k3_s2_e2_c8_se0.25"]])
        network: nn.Module = timm.models.EfficientNet(
            blocks, num_classes=CLASSES, num_features=16, stem_size=8
        )
        return network

    return of_network(build, size=32)


@kind("timm ScaledStdConv2d: a Conv2d that standardises its weight (NFNet)", needs=["timm", "torchvision"])
def timm_standardised(folder: Path) -> Case:
    import timm

    def build() -> nn.Module:
        conv = timm.layers.ScaledStdConv2d(3, 6, 3, padding=0)
        return nn.Sequential(conv, nn.SiLU(), nn.Flatten(), nn.Linear(216, CLASSES))

    return of_network(build)


@kind("timm ViT with LayerScale", needs=["timm", "torchvision"])
def timm_layer_scale(folder: Path) -> Case:
    return of_network(lambda: _tiny_vit(init_values=0.1), size=32)


@kind("torchvision ShuffleNetV2", needs=["torchvision"])
def torchvision_shufflenet(folder: Path) -> Case:
    from torchvision.models import ShuffleNetV2

    return of_network(lambda: ShuffleNetV2([1, 1, 1], [8, 16, 16, 16, 32], CLASSES), size=32)


@kind("torchvision VisionTransformer", needs=["torchvision"])
def torchvision_vit(folder: Path) -> Case:
    from torchvision.models import vision_transformer

    def build() -> nn.Module:
        return vision_transformer.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES)

    return of_network(build, size=32)


def _logits(network: nn.Module) -> nn.Module:
    return Through(network, lambda outputs: outputs.logits)


@kind("transformers ViTForImageClassification", needs=["transformers"])
def transformers_vit(folder: Path) -> Case:
    import transformers

    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=CLASSES,
    )
    return of_network(lambda: transformers.ViTForImageClassification(config), plain=_logits, size=32)


class Named(nn.Module):
    """A network of token ids and a mask, called by name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.network(input_ids=ids, attention_mask=mask).logits
        return logits


def _texts(build: Callable[[], nn.Module]) -> Case:
    ids = torch.randint(2, 40, (COUNT, 10))
    mask = torch.ones_like(ids)
    query = {"input_ids": ids[2].flip(-1), "attention_mask": mask[2]}
    return of_values(
        (ids, mask),
        build(),
        lambda x, y: Rows(lambda i: {"input_ids": x[0][i], "attention_mask": x[1][i], "labels": int(y[i])}),
        query=query,
        plain=Named,
        fresh=build,
    )


@kind("transformers BertForSequenceClassification", needs=["transformers"], **ONLY_IMAGES)
def bert(folder: Path) -> Case:
    import transformers

    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    return _texts(lambda: transformers.BertForSequenceClassification(config).eval())


@kind("transformers GPT2ForSequenceClassification (Conv1D)", needs=["transformers"], **ONLY_IMAGES)
def gpt2(folder: Path) -> Case:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, num_labels=CLASSES, pad_token_id=0
    )
    return _texts(lambda: transformers.GPT2ForSequenceClassification(config).eval())


@kind("peft LoRA on BertForSequenceClassification", needs=["peft", "transformers"], **ONLY_IMAGES)
def lora_bert(folder: Path) -> Case:
    import peft
    import transformers

    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )

    def build() -> nn.Module:
        network = transformers.BertForSequenceClassification(config)
        return peft.get_peft_model(network, peft.LoraConfig(task_type="SEQ_CLS", r=2)).eval()

    return _texts(build)


@kind("a network of token ids (Embedding, mean, Linear)", **ONLY_IMAGES)
def bag(folder: Path) -> Case:
    return of_values(torch.randint(1, 50, (COUNT, 12)), Bag(), fresh=Bag)
