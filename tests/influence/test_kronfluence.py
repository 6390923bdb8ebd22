"""The same scores as kronfluence, another implementation of EK-FAC influence, on the same factors."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison.data import TensorExamples
from unpoison.influence import (
    AbsoluteDamping,
    Damping,
    Factors,
    LayerFactors,
    RelativeDamping,
    fit_factors,
    precondition,
    score,
)
from unpoison.tasks import ClassificationTask

pytestmark = pytest.mark.filterwarnings("ignore")

TASK = ClassificationTask()


def small_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 6, 1, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 16, 5),
        )
    return net.eval()


def channel_first(columns: Tensor, conv: nn.Conv2d) -> Tensor:
    """Rows of an input basis from our order (kernel, channel, bias) to (channel, kernel, bias)."""
    size = conv.kernel_size[0] * conv.kernel_size[1]
    order = torch.arange(size * conv.in_channels).view(size, conv.in_channels).T.flatten()
    if conv.bias is not None:
        order = torch.cat([order, torch.tensor([len(order)])])
    return columns[order]


def ours_from_theirs(theirs: dict[str, dict[str, Tensor]], model: nn.Module, template: Factors) -> Factors:
    """Their factors as ours: the order of the inputs and the division by the number of examples differ."""
    layers: dict[str, LayerFactors] = {}
    for name in template.layers:
        module = model.get_submodule(name)
        basis = theirs["activation_eigenvectors"][name]
        if isinstance(module, nn.Conv2d):
            order = channel_first(torch.arange(len(basis))[:, None], module)[:, 0]
            basis = basis[order.argsort()]
        layers[name] = LayerFactors(
            basis[None].float(),
            theirs["gradient_eigenvectors"][name][None].float(),
            (theirs["lambda_matrix"][name] / theirs["num_lambda_processed"][name]).float()[None],
        )
    return Factors(layers, template.model_fingerprint, template.examples_fingerprint, template.settings)


@pytest.mark.parametrize(
    ("damping", "factor"),
    [(AbsoluteDamping(1e-8), 1e-8), (RelativeDamping(0.1), None)],
    ids=["absolute", "relative"],
)
def test_scores_on_the_same_factors(tmp_path: Path, damping: Damping, factor: float | None) -> None:
    pytest.importorskip("kronfluence")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

    class TheirTask(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return TASK.loss(model, tuple(batch)).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return TASK.measurement(model, tuple(batch)).sum()

    generator = torch.Generator().manual_seed(1)
    images, labels = (
        torch.randn(96, 3, 8, 8, generator=generator),
        torch.randint(0, 5, (96,), generator=generator),
    )
    queries = (torch.randn(9, 3, 8, 8, generator=generator), torch.randint(0, 5, (9,), generator=generator))
    model, examples = small_net(), TensorExamples(images, labels)

    task = TheirTask()
    prepared = prepare_model(copy.deepcopy(model), task)
    analyzer = Analyzer("parity", prepared, task, cpu=True, output_dir=str(tmp_path), disable_tqdm=True)
    analyzer.fit_all_factors(
        "factors",
        torch.utils.data.TensorDataset(images, labels),
        per_device_batch_size=32,
        factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
    )
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        torch.utils.data.TensorDataset(*queries),
        torch.utils.data.TensorDataset(images, labels),
        per_device_query_batch_size=9,
        per_device_train_batch_size=32,
        score_args=ScoreArguments(damping_factor=factor),
    )
    theirs = analyzer.load_pairwise_scores("scores")["all_modules"]

    own = fit_factors(model, examples, TASK, seed=0, empirical=True)
    loaded = analyzer.load_all_factors("factors")
    for name, layer in own.layers.items():  # fitted apart, the spectra agree
        sums = loaded["lambda_matrix"][name] / 96
        torch.testing.assert_close(layer.eigenvalues.sum(), sums.sum(), rtol=1e-3, atol=0)
    factors = ours_from_theirs(loaded, model, own)
    ours = score(model, precondition(model, factors, queries, TASK, damping=damping), examples, TASK).values
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5
    assert float((ours.sign() == theirs.sign()).float().mean()) >= 0.999

    # Differences of queries: formed before the dot product by us, after it by them.
    combine = torch.cat([-torch.ones(8, 1), torch.eye(8)], 1)
    differences = precondition(model, factors, queries, TASK, combine=combine, damping=damping)
    ours = score(model, differences, examples, TASK).values
    theirs = theirs[1:] - theirs[:1]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5
    assert float((ours.sign() == theirs.sign()).float().mean()) >= 0.999
