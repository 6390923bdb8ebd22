"""Influence beside kronfluence.

    python -m benchmarks.influence [--json]

51 queries (one affected input and 50 transformed ones, as Delta-Influence asks) on 5,000 training images, and
the EK-FAC factors that they need. Both sides get the same network (ResNet-9), images, queries and threads;
kronfluence gets the best of several batch sizes, ours its default. Its files are left out.

- all queries at once: kronfluence scores the 51 queries in one pass, ours the 50 differences;
- one query: a pass of its own, as the method was published. 51 such passes against one of ours is what asking
  all at once gains, which is another algorithm;
- agreement: differences of kronfluence's scores against ours on kronfluence's factors, for both dampings.

`benchmarks.suspects` asks several inputs by an index.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks._harness import Bench, fastest, main, random_images
from unpoison.influence import (
    AbsoluteDamping,
    Factors,
    LayerFactors,
    RelativeDamping,
    fit_factors,
    precondition,
    score,
)
from unpoison.models import build
from unpoison.tasks import ClassificationTask

TASK = ClassificationTask()
FACTORS, TOGETHER, ONE = "EK-FAC factors", "51 queries at once", "one query"
APART = "51 passes of one query, to one of ours"


class Kronfluence:
    """The peer: a copy of the model prepared by it, the training images and labels, and its `Analyzer`."""

    def __init__(self, model: nn.Module, train: TensorDataset, folder: str) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task

        class Classification(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                logits = model(batch[0])
                labels = torch.multinomial(logits.detach().softmax(1), 1)[:, 0] if sample else batch[1]
                return nn.functional.cross_entropy(logits, labels, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return TASK.measurement(model, tuple(batch)).sum()

        task = Classification()
        prepared = prepare_model(copy.deepcopy(model), task)
        self.analyzer = Analyzer("run", prepared, task, cpu=True, output_dir=folder, disable_tqdm=True)
        self.train, self.settings = train, FactorArguments(strategy="ekfac")
        self.common = {"model": prepared, "state": self.analyzer.state, "factor_args": self.settings}
        self.common |= {"disable_tqdm": True}

    def fit(self, batch: int) -> dict[str, Any]:
        """EK-FAC factors, in memory."""
        from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
        from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition

        reads = {**self.common, "task": self.analyzer.task, "loader": DataLoader(self.train, batch)}
        _, covariances = fit_covariance_matrices_with_loader(**reads)
        bases = perform_eigendecomposition(covariances, **self.common)
        return {**bases, **fit_lambda_matrices_with_loader(**reads, eigen_factors=bases)[1]}

    def scores(
        self, factors: Any, queries: TensorDataset, batch: int, damping: float | None, rank: int | None = None
    ) -> Tensor:
        """Float[q n], all queries in one pass, in memory; with query gradients of a rank, or whole."""
        from kronfluence.arguments import ScoreArguments
        from kronfluence.score.pairwise import compute_pairwise_scores_with_loaders

        found: Tensor = compute_pairwise_scores_with_loaders(
            **self.common,
            loaded_factors=factors,
            task=self.analyzer.task,
            query_loader=DataLoader(queries, len(queries)),
            per_device_query_batch_size=len(queries),
            train_loader=DataLoader(self.train, batch),
            score_args=ScoreArguments(damping_factor=damping, query_gradient_low_rank=rank),
            tracked_module_names=None,
        )["all_modules"]
        return found


def as_ours(theirs: dict[str, Any], model: nn.Module, template: Factors) -> Factors:
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


def measure(bench: Bench) -> None:
    """Factors, all queries at once, one query, agreement."""
    images, generator = 500 if bench.options.quick else 5000, torch.Generator().manual_seed(0)
    training_set = random_images(images, generator)
    queries = random_images(51, generator).batch(0, 51)
    first = tuple(part[:1] for part in queries)
    model = build("resnet9", num_classes=10, width=8, seed=0).eval()
    combine = torch.cat([-torch.ones(50, 1), torch.eye(50)], 1)

    def ours(factors: Factors, damping: Any, asked: Any, combine: Tensor | None = None) -> Tensor:
        prepared = precondition(model, factors, asked, TASK, combine=combine, damping=damping)
        return score(model, prepared, training_set, TASK).values

    with tempfile.TemporaryDirectory() as folder:
        peer = Kronfluence(model, TensorDataset(*training_set.batch(0, images)), folder)
        batch = fastest(bench.options.batches, peer.fit)
        fitted = bench.compare(
            FACTORS,
            {
                "unpoison": lambda: fit_factors(model, training_set, TASK, seed=0),
                "kronfluence": lambda: peer.fit(batch),
            },
        )
        own, theirs, batches = fitted["unpoison"], fitted["kronfluence"], [batch]
        for what, asked, combined in ((ONE, first, None), (TOGETHER, queries, combine)):
            loaded = TensorDataset(*asked)
            tried = partial(peer.scores, theirs, loaded, damping=None)
            batch = fastest(bench.options.batches, tried)
            batches.append(batch)
            found = bench.compare(
                what,
                {
                    "unpoison": partial(ours, own, RelativeDamping(), asked, combined),
                    "kronfluence": partial(tried, batch),
                },
            )
        shared = as_ours(theirs, model, own)
        for name, damping, scores in (
            ("relative damping", RelativeDamping(), found["kronfluence"]),
            ("absolute damping", AbsoluteDamping(), peer.scores(theirs, loaded, batch, 1e-8)),
        ):
            wanted, got = scores[1:] - scores[:1], ours(shared, damping, queries, combine)
            error = float((got - wanted).abs().max() / wanted.abs().max())
            same = float((got.sign() == wanted.sign()).float().mean())
            bench.agreement |= {f"{name}, relative error": error, f"{name}, same sign": same}
    passes = 51 * bench.seconds[ONE]["kronfluence"]["minimum"]
    bench.ratios[f"{APART}, kronfluence"] = passes / bench.seconds[TOGETHER]["unpoison"]["minimum"]
    bench.work = {"tracked parameters": own.num_parameters, "training images": images}
    bench.work |= {"kronfluence's batches (factors, one query, all)": batches}


if __name__ == "__main__":
    main(measure, batches=[32, 64, 128, 512])
