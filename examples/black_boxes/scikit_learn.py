"""A black box for `unpoison.training.ExternalTrainer`: a linear classifier on pixels, by scikit-learn alone.

python scikit_learn.py TRAIN ASK OUT
"""

import csv
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression


def pixels(path):
    """The image as one row of numbers in [0, 1]."""
    return np.asarray(Image.open(path), dtype=np.float32).reshape(-1) / 255


def main():
    """Train on the class folders and predict the given images."""
    train, ask, out = map(Path, sys.argv[1:])
    examples = [
        (path, folder.name) for folder in sorted(train.iterdir()) for path in sorted(folder.iterdir())
    ]
    model = LogisticRegression(max_iter=200, random_state=int(os.environ.get("UNPOISON_SEED", "0")))
    model.fit(np.stack([pixels(path) for path, _ in examples]), [label for _, label in examples])
    asked = sorted(ask.iterdir())
    predicted = model.predict(np.stack([pixels(path) for path in asked]))
    with open(out / "predictions.csv", "w", newline="") as file:
        csv.writer(file).writerows(zip([path.name for path in asked], predicted, strict=True))


if __name__ == "__main__":
    main()
