"""STRIP: an input with a trigger is answered alike whatever image it is blended with.

Gao, Xu, Wang, Chen, Ranasinghe and Nepal, "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks"
(ACSAC 2019, arXiv 1902.06531). Stages:

1. N = 100 clean images are drawn once;
2. an input is superimposed with each of them: the sum of both, clipped to [0, 1];
3. the Shannon entropy (base 2) of the softmax of each of the N answers, and their mean. It is low where one
   strong feature decides whatever else is in the image.

The score is minus that mean. Departures: the paper fits a normal distribution to the entropies of clean
inputs and takes its quantile (at 1 %) for a threshold; here the rank among clean inputs decides, which
assumes no distribution. The N images are the same for all inputs, so that scores can be compared.

Limits: triggers that depend on the input (source-specific, dynamic) or that blending destroys (faint ones)
are not found, as the paper says. A model that is certain of everything has entropies of 0 throughout.

Cost: N + 1 forward passes an input and calibration example. Memory: N images, and a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from torch import Tensor

from unpoison._inputs import Inputs
from unpoison._option_checks import PositiveInt
from unpoison.input_detectors._input_detector import InputDetector, Request, Scorer
from unpoison.input_detectors._methods import register
from unpoison.registry import Presets


@final
@register(
    name="strip",
    title="STRIP",
    summary="Flags inputs whose answer hardly changes when other images are blended in.",
    paper="Gao et al. 2019, arXiv 1902.06531",
    cost="101 forward passes an input",
    changes_pixels=True,
    presets=("original",),
)
@dataclass(frozen=True, kw_only=True)
class Strip(InputDetector):
    """Flag inputs whose answers keep a low entropy under blending.

    Arguments:
        overlays: N, how many clean images are blended in; no more than half of the reference.
        weight: of the clean image in the sum.
        batch_size: inputs of a forward pass.
    """

    PRESETS: ClassVar[Presets] = {"original": {}}

    overlays: PositiveInt = 100
    weight: Annotated[float, "(0, 10]"] = 1.0
    batch_size: PositiveInt = 256

    @property
    def learns(self) -> int:
        """See `InputDetector.learns`."""
        return self.overlays

    def prepare(self, request: Request) -> Scorer:
        """See the module's docstring."""
        given, *_ = request.reference.at(range(len(request.reference)))
        overlays = request.pixels(given, self.method.name).to(request.device)

        def score(inputs: Inputs, predicted: Tensor) -> Tensor:
            images = request.pixels(inputs, self.method.name)
            total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
            for overlay in overlays:
                total -= entropy(request.logits((images + self.weight * overlay).clamp(0, 1)))
            return total / max(len(overlays), 1)

        return score


def entropy(logits: Tensor) -> Tensor:
    """Float64[b]: the Shannon entropy, in bits, of the softmax of Float[b classes].

    >>> entropy(torch.zeros(1, 4))
    tensor([2.], dtype=torch.float64)
    """
    logarithms = logits.double().log_softmax(1)
    return -(logarithms.exp() * logarithms).sum(1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
