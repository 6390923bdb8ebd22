"""TRAK beside traker.

    python -m benchmarks.trak [--json]

20 queries on 5,000 images, of a network of 100,000 parameters. Both sides get the same network, images,
queries, number of dimensions (2,048) and threads; what is timed is the projection of all training gradients
and all queries, and the scores. traker keeps its features in files, in memory where there is /dev/shm.

- equal work: traker is given our count-sketch as its projector, so what is compared is how gradients of
  examples are made and how scores are computed from them;
- another algorithm: traker projects with a dense Rademacher matrix, once by its `BasicProjector`, the one it
  recommends for processors, which draws the matrix anew for every batch, and once with the whole matrix in
  memory (`BasicSingleBlockProjector`, 0.8 GB);
- agreement: rank correlation (Spearman, mean over queries) of our scores with traker's, beside those of each
  with itself under another matrix, which is what the randomness of the projection leaves.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._harness import Bench, main, random_images
from unpoison._seeds import generator as derived
from unpoison.data import TensorExamples, TrainingSet
from unpoison.detectors.trak import trak_scores
from unpoison.influence._projection import count_sketch
from unpoison.training import Recipe, train

DIMENSIONS, BATCH = 2048, 128
EQUAL, DENSE = "the same count-sketch", "a dense projection, to our count-sketch"
BLOCKS, WHOLE = "traker's BasicProjector", "traker, matrix in memory"


def network() -> nn.Sequential:
    """100,074 parameters, all of convolutions and linear layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolutions = [
            layer
            for inputs, outputs in ((3, 32), (32, 64), (64, 96))
            for layer in (nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU())
        ]
        classifier = (nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, 10))
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *classifier)


def ranks_agree(one: Tensor, other: Tensor) -> float:
    """Mean Spearman correlation of the rows."""
    ranks = [rows.argsort(1).argsort(1).double() for rows in (one, other)]
    pairs = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]
    return float(torch.stack(pairs).mean())


def projector(kind: str, parameters: int) -> Any:
    """One of traker's projectors, or our count-sketch in the form of one."""
    from trak.projectors import AbstractProjector, BasicProjector, BasicSingleBlockProjector, ProjectionType
    from trak.utils import vectorize

    places, signs = count_sketch(parameters, DIMENSIONS, derived(0, "projection"))

    class CountSketch(AbstractProjector):
        def project(self, grads: Any, model_id: int) -> Tensor:
            flat = vectorize(grads, device=self.device) if isinstance(grads, dict) else grads
            parts = flat.index_select(1, places).mul_(signs)
            return parts.view(len(flat), -1, DIMENSIONS).sum(1)

    kinds = {"traker": CountSketch, BLOCKS: BasicProjector, WHOLE: BasicSingleBlockProjector}
    return kinds[kind](parameters, DIMENSIONS, 0, ProjectionType.rademacher, torch.device("cpu"))


def traker(model: nn.Module, examples: TrainingSet, asked: TensorExamples, kind: str) -> Tensor:
    """Float[m n] scores."""
    from trak import TRAKer

    silent, count = io.StringIO(), sum(parameter.numel() for parameter in model.parameters())
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with (
        tempfile.TemporaryDirectory(dir=memory) as folder,
        contextlib.redirect_stderr(silent),
        contextlib.redirect_stdout(silent),
    ):
        theirs = TRAKer(
            model,
            "image_classification",
            train_set_size=len(examples),
            save_dir=folder,
            device="cpu",
            projector=projector(kind, count),
            proj_dim=DIMENSIONS,
            use_half_precision=False,
            logging_level=50,
        )
        theirs.load_checkpoint(model.state_dict(), model_id=0)
        for start in range(0, len(examples), BATCH):
            part = examples.batch(start, start + BATCH)
            theirs.featurize(batch=part, num_samples=len(part[0]))
        theirs.finalize_features()
        theirs.start_scoring_checkpoint("asked", model.state_dict(), model_id=0, num_targets=len(asked))
        theirs.score(batch=asked.tensors, num_samples=len(asked))
        scores: Any = theirs.finalize_scores(exp_name="asked")
        return torch.from_numpy(np.array(scores)).t()


def measure(bench: Bench) -> None:
    """With our count-sketch on both sides, and with traker's dense projections."""
    generator = torch.Generator().manual_seed(0)
    training_set = random_images(500 if bench.options.quick else 5000, generator)
    asked = TensorExamples(*random_images(20, generator).batch(0, 20))
    # A few steps, so that gradients differ as those of a trained network do.
    recipe = Recipe(model="convnet-bn", epochs=1, batch_size=BATCH, learning_rate=0.05, flip=False)
    model = train(training_set, recipe, seed=0, start=network()).model
    ours = partial(trak_scores, model, training_set, asked, dimensions=DIMENSIONS)
    own, theirs = partial(ours, seed=0), partial(traker, model, training_set, asked)
    found = bench.compare(EQUAL, {"unpoison": own, "traker": partial(theirs, "traker")})
    found |= bench.compare(
        DENSE,
        {"unpoison": own, BLOCKS: partial(theirs, BLOCKS), WHOLE: partial(theirs, WHOLE)},
        differs="the projection: theirs is a dense matrix",
        warm=True,
        repeats=2,
    )
    pairs = {
        "ours with traker's dense": (found["unpoison"], found[BLOCKS]),
        "ours with traker's count-sketch": (found["unpoison"], found["traker"]),
        "traker's dense with itself": (found[BLOCKS], found[WHOLE]),
        "ours with itself": (found["unpoison"], ours(seed=1)),
    }
    bench.agreement = {f"rank correlation, {name}": ranks_agree(*pair) for name, pair in pairs.items()}


if __name__ == "__main__":
    main(measure)
