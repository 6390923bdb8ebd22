"""The bundled sample: 5,000 training and 1,000 test images of Fashion-MNIST.

500 training and 100 test images of each of ten classes, 28x28 grey, bit for bit those of Xiao, Rasul and
Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms" (2017).
Copyright Zalando SE, MIT licence (beside the file). Made by `scripts/make_sample.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unpoison.data._npz import read_npz
from unpoison.data._splits import Splits
from unpoison.data._training_set import TrainingSet

_FILE = Path(__file__).with_name("fashion_mnist_sample.npz")


def sample() -> Splits[TrainingSet]:
    """The bundled sample of Fashion-MNIST: 5,000 training and 1,000 test images, 28x28 grey, ten classes.

    Costs about 40 ms.

    >>> splits = sample()
    >>> len(splits.train), len(splits.test), splits.train.image_shape, splits.train.class_names[5]
    (5000, 1000, (1, 28, 28), 'Sandal')
    """
    splits = read_npz(_FILE)
    test = None if splits.test is None else replace(splits.test, name="sample (test)")
    return Splits(replace(splits.train, name="sample"), test)
