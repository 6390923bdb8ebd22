"""Influence of 50 transformed queries on 5,000 training images: ours and kronfluence, in one run.

    python -m benchmarks.influence --json [--quick] [--no-write]

Both get the same network (ResNet-9), images, queries and threads. Delta-Influence asks for one affected input
and n transformed ones: kronfluence scores those 1 + n queries, ours the n differences. Measured:

- query by query: kronfluence with query batch 1, as the method was published; every query is a pass;
- batched: kronfluence with all queries in one batch, and the best of several training batch sizes;
- factors: fitting EK-FAC factors, kronfluence with the best of several batch sizes;
- agreement: differences of kronfluence's scores against ours on kronfluence's factors, for both dampings.

Factors are excluded from the scoring times. `--quick` times 3 of the queries of the first and scales; such a
run is never written to the results.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.influence import (
    AbsoluteDamping,
    ClassificationTask,
    Factors,
    LayerFactors,
    RelativeDamping,
    fit_factors,
    precondition,
    score,
)
from unpoison.models import build

TASK = ClassificationTask()
RESULTS = Path(__file__).parent / "results"


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what `work` gave."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def random_images(count: int, generator: torch.Generator) -> TrainingSet:
    """Images of CIFAR's shape: smooth noise, so that convolutions have something to see."""
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, 32, mode="bilinear").mul(255).to(torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return TrainingSet(images, labels, tuple(str(label) for label in range(10)))


def say(text: str) -> None:
    """A line of progress for people, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def as_ours(theirs: dict[str, dict[str, Tensor]], model: nn.Module, template: Factors) -> Factors:
    """kronfluence's factors as ours."""
    layers = {}
    for name in template.layers:
        module, basis = model.get_submodule(name), theirs["activation_eigenvectors"][name]
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            basis = basis.view(module.in_channels, -1, len(basis)).transpose(0, 1).reshape(basis.shape)
        layers[name] = LayerFactors(
            basis[None].float().contiguous(),
            theirs["gradient_eigenvectors"][name][None].float().contiguous(),
            (theirs["lambda_matrix"][name] / theirs["num_lambda_processed"][name])[None].float(),
        )
    return Factors(layers, template.model_fingerprint, template.examples_fingerprint, template.settings)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the record."""
    threads, count = arguments.threads, arguments.transforms
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    training_set = random_images(arguments.images, generator)
    queries = random_images(1 + count, generator).batch(0, 1 + count)
    model = build("resnet9", num_classes=10, width=arguments.width, seed=0).eval()
    combine = torch.cat([-torch.ones(count, 1), torch.eye(count)], 1)
    seconds: dict[str, float] = {}

    def ours(factors: Factors, damping: Any) -> Tensor:
        prepared = precondition(model, factors, queries, TASK, combine=combine, damping=damping)
        return score(model, prepared, training_set, TASK).values

    score(
        model, precondition(model, None, queries, TASK), training_set, TASK, stop=min(256, len(training_set))
    )  # warm-up
    runs = [timed(lambda: fit_factors(model, training_set, TASK, seed=0)) for _ in range(2)]
    seconds["factors"], factors = min(runs, key=lambda run: run[0])
    seconds["scores"] = min(timed(lambda: ours(factors, RelativeDamping()))[0] for _ in range(3))
    peaks = {"unpoison": peak_bytes()}
    say(f"ours: factors {seconds['factors']:.2f} s, scores {seconds['scores']:.2f} s")

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as directory:
        warnings.simplefilter("ignore")
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        class TheirTask(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                logits = model(batch[0])
                if not sample:
                    return nn.functional.cross_entropy(logits, batch[1], reduction="sum")
                drawn = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
                return nn.functional.cross_entropy(logits, drawn, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return TASK.measurement(model, tuple(batch)).sum()

        task = TheirTask()
        prepared = prepare_model(copy.deepcopy(model), task)
        analyzer = Analyzer("run", prepared, task, cpu=True, output_dir=directory, disable_tqdm=True)
        train = torch.utils.data.TensorDataset(*training_set.batch(0, len(training_set)))
        asked = torch.utils.data.TensorDataset(*queries)

        def fit(batch_size: int) -> None:
            analyzer.fit_all_factors(
                "factors",
                train,
                per_device_batch_size=batch_size,
                factor_args=FactorArguments(strategy="ekfac"),
                overwrite_output_dir=True,
            )

        def scores(number: int, query_batch: int, train_batch: int, factor: float | None) -> Tensor:
            analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                asked,
                train,
                query_indices=list(range(number)),
                per_device_query_batch_size=query_batch,
                per_device_train_batch_size=train_batch,
                score_args=ScoreArguments(damping_factor=factor),
                overwrite_output_dir=True,
            )
            result: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
            return result

        fits = {size: timed(lambda size=size: fit(size))[0] for size in arguments.factor_batches}
        seconds["kronfluence_factors"] = min(fits.values())
        say(f"kronfluence: factors {fits}")
        theirs, batched = torch.empty(0), {}
        for size in arguments.train_batches:
            batched[size], theirs = timed(lambda size=size: scores(1 + count, 1 + count, size, None))
        seconds["kronfluence_batched"] = min(batched.values())
        say(f"kronfluence: batched {batched}")

        shared = as_ours(analyzer.load_all_factors("factors"), model, factors)
        agreement: dict[str, float] = {}
        best = min(batched, key=lambda size: batched[size])
        for name, damping, factor in (
            ("relative", RelativeDamping(), None),
            ("absolute", AbsoluteDamping(), 1e-8),
        ):
            found = theirs if factor is None else scores(1 + count, 1 + count, best, factor)
            found, own = found[1:] - found[:1], ours(shared, damping)
            agreement[f"{name}_damping_relative_error"] = float((own - found).abs().max() / found.abs().max())
            agreement[f"{name}_damping_same_sign"] = float((own.sign() == found.sign()).float().mean())
        say(f"agreement: {agreement}")

        single = {}
        for size in arguments.train_batches:
            single[size] = timed(lambda size=size: scores(1, 1, size, None))[0]
        best = min(single, key=lambda size: single[size])
        number = 3 if arguments.quick else 1 + count
        one_by_one = timed(lambda: scores(number, 1, best, None))[0]
        seconds["kronfluence_query_by_query"] = one_by_one * (1 + count) / number
        say(f"kronfluence: query by query, training batch {best}: {one_by_one:.1f} s for {number} queries")
        peaks["unpoison and kronfluence"] = peak_bytes()

    return {
        "ratios": {
            "kronfluence query by query": seconds["kronfluence_query_by_query"] / seconds["scores"],
            "kronfluence batched": seconds["kronfluence_batched"] / seconds["scores"],
            "kronfluence factors": seconds["kronfluence_factors"] / seconds["factors"],
        },
        "agreement": agreement,
        "seconds": seconds,
        "peak_bytes": peaks,
        "work": {
            "model": f"resnet9, width {arguments.width}",
            "tracked_parameters": factors.num_parameters,
            "training_images": arguments.images,
            "transforms": count,
            "kronfluence_batched_seconds_by_training_batch": batched,
            "kronfluence_factor_seconds_by_batch": fits,
            "scaled_from_3_queries": bool(arguments.quick),
        },
        "machine": machine(threads),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the whole record, as one JSON object")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument(
        "--quick", action="store_true", help="time 3 queries of the query-by-query use and scale"
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--transforms", type=int, default=50)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train-batches", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--factor-batches", type=int, nargs="+", default=[64, 128, 512])
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, and keep the record."""
    arguments = parse(None)
    record = measure(arguments)
    record["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    record["command"] = " ".join(["python -m benchmarks.influence", *sys.argv[1:]])
    if not (arguments.no_write or arguments.quick):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "influence.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record if arguments.json else record["ratios"]))


if __name__ == "__main__":
    main()
