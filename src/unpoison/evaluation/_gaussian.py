"""The Gaussian Unlearning Score: does a model still correlate with noise that it was to forget?

Pawelczyk et al. 2024 (arXiv 2406.17216). For each image that the attack "gaussian-noise" changed, the
gradient of the loss in the clean image is held against the noise. Where the model does not depend on the
noise, the standardised inner product is a standard normal draw. The score is the mean of these; the test
counts those above the level that 1 % of such draws exceed: 1 % where the noise is forgotten, more where it is
not.

Cost: a forward and a backward pass over the changed images.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from unpoison._stable import cross_entropy
from unpoison._statistics import Proportion
from unpoison.attacks.gaussian_noise import GaussianNoise, noise_scores
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import device_of, logits_of, precision_of, preserved, usual_mode
from unpoison.threats import PoisonSet
from unpoison.training import Trained

LEVEL: Final = 0.01
"""The share of unrelated draws that the test takes for a memory."""
ATTACK: Final = "gaussian-noise"


@final
@dataclass(frozen=True)
class NoiseMemory:
    """What a model remembers of the noise.

    Arguments:
        score: the mean of the standardised inner products; 0 is expected where it was forgotten, with the
            standard error 1 / sqrt(n).
        remembered: the images whose inner product only 1 % of unrelated ones exceed.
    """

    score: float
    remembered: Proportion

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"score": self.score, "remembered": self.remembered.to_dict()}


def gaussian_unlearning_score(
    model: Trained | nn.Module, training_set: TrainingSet, poison: PoisonSet, *, batch_size: int = 256
) -> NoiseMemory:
    """How much a model remembers of Gaussian noise on some training images.

    Arguments:
        model: in any mode; left as it was.
        training_set: the clean one, without the noise.
        poison: crafted by "gaussian-noise" in it.
        batch_size: images a pass.

    Raises:
        InputError: the poison is of another attack.
    """
    if poison.attack != ATTACK:
        raise InputError(f"gaussian_unlearning_score: needs poison of {ATTACK}, found {poison.attack}")
    network = model.model if isinstance(model, Trained) else model
    clean = training_set.to("cpu").subset(poison.indices.cpu())
    gradients = _gradients(network, clean, batch_size)
    deviation = float(poison.configuration.get("deviation", GaussianNoise.deviation))
    scores = noise_scores(gradients, clean.images, poison.images, deviation=deviation)
    beyond = int((scores > NormalDist().inv_cdf(1 - LEVEL)).sum())
    return NoiseMemory(float(scores.mean()), Proportion(beyond, len(scores)))


def _gradients(network: nn.Module, examples: TrainingSet, batch_size: int) -> Tensor:
    """Float32[n c h w]: the gradient of each example's loss in its image."""
    device, rows = device_of(network), []
    with usual_mode(device), preserved(network), torch.enable_grad():
        network.eval()
        for start in range(0, len(examples), batch_size):
            images, labels = examples.batch(start, start + batch_size)
            given = images.to(device, precision_of(network)).requires_grad_()
            loss = cross_entropy(logits_of(network, given), labels.to(device), reduction="sum")
            [gradient] = torch.autograd.grad(loss, given)
            rows.append(gradient.float().cpu())
    return torch.cat(rows)
