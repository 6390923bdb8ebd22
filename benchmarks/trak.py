"""TRAK of 20 queries on 5,000 images, of a network of 100,000 parameters: ours and traker, in one run.

    python -m benchmarks.trak --json [--quick] [--no-write]

Both get the same network, images, queries, number of dimensions and threads. Measured:

- ours: projection of all training gradients and all queries, and the scores;
- traker with its projector for processors (`BasicProjector`), featurising all images in batches, and scoring;
- agreement: rank correlation (Spearman, mean over queries) of our scores with traker's, beside that of traker
  with itself under another seed of its projection, which is what the projection's randomness leaves.

`--quick` lets traker featurise a tenth of the images and scales its time; there is then no agreement to
measure, and such a run is never written to the results.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import sys
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.influence import RESULTS, machine, peak_bytes, random_images, say, timed
from unpoison.data import TensorExamples, TrainingSet
from unpoison.detectors.trak import trak_scores


def network() -> nn.Sequential:
    """100,074 parameters, all of convolutions and linear layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 96, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(384, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def fit(model: nn.Module, training_set: TrainingSet) -> None:
    """A few steps, so that gradients differ as those of a trained network do."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for start in range(0, min(len(training_set), 2560), 128):
        inputs, labels = training_set.batch(start, start + 128)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def ranks_agree(one: Tensor, other: Tensor) -> float:
    """Mean Spearman correlation of the rows."""
    ranks = [rows.argsort(1).argsort(1).double() for rows in (one, other)]
    pairs = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]
    return float(torch.stack(pairs).mean())


def traker(
    model: nn.Module, examples: TrainingSet, asked: TensorExamples, dimensions: int, seed: int, batch: int
) -> tuple[float, float, Tensor]:
    """Seconds to featurise, seconds to finish and score, and Float[m n] scores."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        count = sum(parameter.numel() for parameter in model.parameters())
        projector = BasicProjector(
            grad_dim=count,
            proj_dim=dimensions,
            seed=seed,
            proj_type=ProjectionType.rademacher,
            device=torch.device("cpu"),
        )
        theirs = TRAKer(
            model,
            "image_classification",
            train_set_size=len(examples),
            save_dir=folder,
            device="cpu",
            projector=projector,
            proj_dim=dimensions,
            use_half_precision=False,
            logging_level=50,
        )
        theirs.load_checkpoint(model.state_dict(), model_id=0)
        begun = time.perf_counter()
        for start in range(0, len(examples), batch):
            part = examples.batch(start, start + batch)
            theirs.featurize(batch=part, num_samples=len(part[0]))
        featurised = time.perf_counter()
        theirs.finalize_features()
        theirs.start_scoring_checkpoint("asked", model.state_dict(), model_id=0, num_targets=len(asked))
        theirs.score(batch=asked.tensors, num_samples=len(asked))
        scores: Any = theirs.finalize_scores(exp_name="asked")
        finished = time.perf_counter()
        return featurised - begun, finished - featurised, torch.from_numpy(np.array(scores)).t()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the record."""
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    training_set = random_images(arguments.images, generator)
    asked = TensorExamples(*random_images(arguments.queries, generator).batch(0, arguments.queries))
    model = network()
    fit(model, training_set)

    def ours(seed: int) -> Tensor:
        return trak_scores(model, training_set, asked, dimensions=arguments.dimensions, seed=seed)

    trak_scores(model, training_set.subset(range(256)), asked, dimensions=64, seed=0)  # warm-up
    runs = [timed(lambda seed=seed: ours(seed)) for seed in range(2)]
    seconds = {"unpoison": min(run[0] for run in runs)}
    peaks = {"unpoison": peak_bytes()}
    say(f"ours: {seconds['unpoison']:.2f} s")

    count = arguments.images // 10 if arguments.quick else arguments.images
    part = training_set.subset(range(count))
    featurised, finished, first = traker(model, part, asked, arguments.dimensions, 0, arguments.batch)
    seconds["traker"] = featurised * arguments.images / count + finished
    peaks["unpoison and traker"] = peak_bytes()
    say(f"traker: {seconds['traker']:.1f} s")
    agreement: dict[str, float] = {}
    if not arguments.quick:
        _, _, second = traker(model, part, asked, arguments.dimensions, 10**6, arguments.batch)
        mine = [run[1] for run in runs]
        across = [ranks_agree(own, their) for own in mine for their in (first, second)]
        agreement = {
            "rank_correlation_with_traker": sum(across) / 4,
            "rank_correlation_of_traker_with_itself": ranks_agree(first, second),
            "rank_correlation_of_ours_with_itself": ranks_agree(*mine),
        }
        say(f"agreement: {agreement}")
    return {
        "ratios": {"traker": seconds["traker"] / seconds["unpoison"]},
        "agreement": agreement,
        "seconds": seconds,
        "peak_bytes": peaks,
        "work": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "training_images": arguments.images,
            "queries": arguments.queries,
            "dimensions": arguments.dimensions,
            "scaled_from_a_tenth": bool(arguments.quick),
        },
        "machine": machine(arguments.threads),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the whole record, as one JSON object")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--quick", action="store_true", help="a tenth of the images for traker, and scale")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument(
        "--batch", type=int, default=128, help="images traker is given at a time; ours is 128"
    )
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, and keep the record."""
    arguments = parse(None)
    record = measure(arguments)
    record["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    record["command"] = " ".join(["python -m benchmarks.trak", *sys.argv[1:]])
    if not (arguments.no_write or arguments.quick):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "trak.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record if arguments.json else record["ratios"]))


if __name__ == "__main__":
    main()
