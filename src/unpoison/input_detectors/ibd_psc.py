"""IBD-PSC: the answer to an input with a trigger survives when the parameters of norm layers are amplified.

Hou, Feng, Hua, Luo, Zhang and Li, "IBD-PSC: Input-level Backdoor Detection via Parameter-oriented Scaling
Consistency" (ICML 2024, arXiv 2405.09786). Stages:

1. scale and shift of the last k batch-norm layers are multiplied by 1.5, for k = 1, 2, ... until the share of
   clean examples that the amplified model classifies wrongly is above 60 %;
2. five amplified models: of the last k, k + 1, ..., k + 4 layers;
3. the score of an input (PSC) is the mean over these models of the probability of the answer that the model
   gives unchanged. It is high for an input with a trigger, whose answer persists.

Presets: `calibrated` takes the rank among clean inputs; `original` flags a PSC above the published .9, which
controls no rate of false alarms.

Departures: layers are taken in the order of the forward pass; group and layer norms with parameters count as
batch norms do. A network with fewer layers than k + 4 has fewer models; one that never is wrong often enough
has those that amplify the most layers. Multiplying scale and shift multiplies the layer's output, so that is
what is done, and no parameter is touched.

Limits: a network without norm layers that have parameters is refused.

Cost: at most 6 forward passes an input, and one over the clean examples for each layer that is tried, which
are read once. Memory: these examples, and a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from torch import Tensor, nn

from unpoison._inputs import Inputs, placed
from unpoison._option_checks import Fraction, PositiveInt
from unpoison.errors import InputError
from unpoison.input_detectors._input_detector import InputDetector, Request, Scorer
from unpoison.input_detectors._methods import register
from unpoison.models import forward
from unpoison.registry import Presets

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@final
@register(
    name="ibd-psc",
    title="IBD-PSC",
    summary="Flags inputs whose answer stays certain when norm layers are amplified.",
    paper="Hou et al. 2024, arXiv 2405.09786",
    cost="6 forward passes an input",
    presets=("calibrated", "original"),
)
@dataclass(frozen=True, kw_only=True)
class IBDPSC(InputDetector):
    """Flag inputs whose answer stays certain when the norm layers of the model are amplified.

    Arguments:
        factor: what scale and shift are multiplied by.
        models: how many amplified models there are.
        error_rate: the share of clean examples above which a model is amplified enough.
        examples: how many clean examples that share is measured on.
        threshold: a PSC above which inputs are flagged, in place of the calibrated one.
        batch_size: inputs of a forward pass.
    """

    PRESETS: ClassVar[Presets] = {"calibrated": {}, "original": {"threshold": 0.9}}

    factor: Annotated[float, "(1, inf)"] = 1.5
    models: PositiveInt = 5
    error_rate: Fraction = 0.6
    examples: PositiveInt = 100
    threshold: Fraction | None = None
    batch_size: PositiveInt = 256

    @property
    def learns(self) -> int:
        """See `InputDetector.learns`."""
        return self.examples

    @property
    def fixed_threshold(self) -> float | None:
        """See `InputDetector.fixed_threshold`."""
        return self.threshold

    def prepare(self, request: Request) -> Scorer:
        """See the module's docstring."""
        layers = norm_layers(request.model, request.reference.at([0])[0], request.device)
        first = self._first(request, layers)
        counts = [first + one for one in range(self.models) if first + one <= len(layers)]

        def score(inputs: Inputs, predicted: Tensor) -> Tensor:
            total = torch.zeros(len(predicted), dtype=torch.float64, device=predicted.device)
            for count in counts:
                with amplified(layers[-count:], self.factor):
                    chances = request.logits(inputs).softmax(1)
                total += chances.gather(1, predicted[:, None])[:, 0]
            return total / len(counts)

        return score

    def _first(self, request: Request, layers: Sequence[nn.Module]) -> int:
        """How many of the last layers are amplified in the first model."""
        # Read once for all layers; there are few.
        batches = [
            (placed(inputs, request.device), labels.to(request.device))
            for inputs, labels in request.reference.in_batches(self.batch_size)
        ]
        for count in range(1, len(layers) + 1):
            with amplified(layers[-count:], self.factor):
                wrong = sum(int((request.logits(inputs).argmax(1) != own).sum()) for inputs, own in batches)
            if wrong > self.error_rate * len(request.reference):
                return count
        return max(1, len(layers) - self.models + 1)


def norm_layers(model: nn.Module, inputs: Inputs, device: torch.device) -> list[nn.Module]:
    """The norm layers with parameters, in the order in which a forward pass calls them first.

    Raises:
        InputError: there are none.
    """
    called: list[nn.Module] = []

    def note(module: nn.Module, *_: object) -> None:
        if module not in called:
            called.append(module)

    layers = [one for one in model.modules() if isinstance(one, _NORMS) and one.weight is not None]
    with contextlib.ExitStack() as stack:
        # A compiled network that has run without the hook would not call it.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in layers:
            stack.callback(layer.register_forward_hook(note).remove)
        forward(model, placed(inputs, device))
    if not called:
        raise InputError(
            "ibd-psc: amplifies norm layers, and the model has none with parameters; screen by strip or "
            "scale-up"
        )
    return called


@contextlib.contextmanager
def amplified(layers: Sequence[nn.Module], factor: float) -> Iterator[None]:
    """Within the block, scale and shift of the layers count `factor` times."""

    def multiply(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * factor

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in layers:
            stack.callback(layer.register_forward_hook(multiply).remove)
        yield
