"""Make the bundled sample from the four files of Fashion-MNIST.

    python scripts/make_sample.py /usr/share/datasets/fashion-mnist

The folder holds `train-images-idx3-ubyte.gz` and its three siblings, as Zalando Research publishes them and
as Debian's package `dataset-fashion-mnist` installs them. The choice of images is fixed by a seed, so the
same files give the same sample: 500 training and 100 test images of each class, in the order of the original.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch

from unpoison.data import Splits, TrainingSet, write_npz

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
TARGET = Path(__file__).parents[1] / "src" / "unpoison" / "data" / "fashion_mnist_sample.npz"


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in one gzipped idx file (its header: two zeros, type 8, rank, sizes)."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{path}: not an idx file of unsigned bytes")
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def choose(folder: Path, prefix: str, a_class: int, generator: np.random.Generator) -> TrainingSet:
    """The images of one split, `a_class` of each class."""
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64)
    chosen = np.sort(
        np.concatenate(
            [
                generator.choice(np.flatnonzero(labels == label), a_class, replace=False)
                for label in range(len(CLASS_NAMES))
            ]
        )
    )
    return TrainingSet(
        torch.from_numpy(images[chosen][:, None]), torch.from_numpy(labels[chosen]), CLASS_NAMES, "sample"
    )


def make(folder: Path) -> Splits:
    """The whole sample."""
    generator = np.random.default_rng(20170825)  # the day Fashion-MNIST was published
    return Splits(choose(folder, "train", 500, generator), choose(folder, "t10k", 100, generator))


def main() -> None:
    """Write the sample into the package."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the four idx files lie")
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()
    splits = make(arguments.folder)
    write_npz(arguments.out, splits.train, splits.test)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.2f} MB")
    print(f"training fingerprint {splits.train.fingerprint}")
    if splits.test is not None:
        print(f"test fingerprint     {splits.test.fingerprint}")


if __name__ == "__main__":
    main()
