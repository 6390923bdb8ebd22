"""A network that is trained on a few examples, for the conformance tests of both kinds of detectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from unpoison.data import TrainingSet


class View(nn.Module):
    """Flattens with `view`, which rejects memory layouts that `nn.Flatten` accepts."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.view(len(maps), -1)


def trained(examples: TrainingSet) -> nn.Module:
    """A convolution, a batch norm and a linear layer after 15 steps on all examples, in eval mode."""
    channels, height, width = examples.image_shape
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            View(),
            nn.Linear(4 * height * width, examples.num_classes),
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs, labels = examples.batch(0, len(examples))
    for _ in range(15):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()
