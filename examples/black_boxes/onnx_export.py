"""A black box for `unpoison.training.ExternalTrainer`: a small network, exported as an ONNX model.

    python onnx_export.py TRAIN ASK OUT

Needs torch, onnx and onnxscript; predictions by the model need onnxruntime.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn


def pixels(path):
    """The image as Float[c h w] in [0, 1]."""
    image = np.asarray(Image.open(path), dtype=np.float32) / 255
    return torch.from_numpy(image.reshape(*image.shape[:2], -1).transpose(2, 0, 1).copy())


def main():
    """Train on the class folders and export the network."""
    train, _, out = map(Path, sys.argv[1:])
    torch.manual_seed(int(os.environ.get("UNPOISON_SEED", "0")))
    folders = sorted(train.iterdir())
    examples = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]
    images = torch.stack([pixels(path) for path, _ in examples])
    labels = torch.tensor([label for _, label in examples])
    network = nn.Sequential(
        nn.Conv2d(images.shape[1], 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(len(folders)),
    )
    network(images[:1])
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(20):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    torch.onnx.export(
        network.eval(),
        (images[:2],),
        str(out / "model.onnx"),
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        dynamo=True,
    )


if __name__ == "__main__":
    main()
