"""TRAK: the projection against a loop, attributions against their formula, traker, and a real backdoor."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unpoison
from unpoison import detectors
from unpoison._seeds import generator
from unpoison.data import TensorExamples, TrainingSet
from unpoison.detectors import TRAK, average_precision
from unpoison.detectors.trak import trak_scores
from unpoison.errors import InputError
from unpoison.influence import project
from unpoison.influence._projection import count_sketch
from unpoison.tasks import ClassificationTask

TASK = ClassificationTask()


def small_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
        ).eval()


def images(count: int, seed: int) -> TrainingSet:
    randomness = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=randomness)
    labels = torch.randint(0, 3, (count,), generator=randomness)
    return TrainingSet(pixels, labels, ("a", "b", "c"), "noise")


def gradients(model: nn.Module, inputs: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """Of minus the margin, by the module's name, in our order of inputs; one example at a time."""
    rows = []
    for image, label in zip(inputs, labels, strict=True):
        model.zero_grad()
        TASK.measurement(model, (image[None], label[None])).sum().backward()
        conv, linear = model[0], model[4]  # type: ignore[index]
        # The inputs of a convolution are in the order (kernel row, kernel column, channel).
        kernel = conv.weight.grad.permute(0, 2, 3, 1).flatten(1)
        rows.append(
            {
                "0": torch.cat([kernel, conv.bias.grad[:, None]], 1).flatten(),
                "4": torch.cat([linear.weight.grad, linear.bias.grad[:, None]], 1).flatten(),
            }
        )
    model.zero_grad(set_to_none=True)
    return rows


@pytest.mark.parametrize("dimensions", [1, 7, 64, 500])
def test_the_projection_is_one_sparse_matrix(dimensions: int) -> None:
    model, examples = small_net(), images(9, 1)
    found = project(
        model, examples, TASK.measurement, dimensions=dimensions, seed=5, batch_size=4, workspace_bytes=1
    )
    inputs, labels = examples.batch(0, 9)
    rows = gradients(model, inputs, labels)
    expected = torch.zeros(9, dimensions)
    for name in ("0", "4"):
        count = len(rows[0][name])
        places, signs = count_sketch(count, dimensions, generator(5, "projection", name))
        matrix = torch.zeros(count, dimensions)
        for slot, (place, sign) in enumerate(zip(places.tolist(), signs.tolist(), strict=True)):
            matrix[place, slot % dimensions] += sign
        assert bool((matrix.abs().sum(1) == 1).all())
        assert int(matrix.abs().sum(0).max()) == math.ceil(count / dimensions)
        expected += torch.stack([row[name] for row in rows]) @ matrix
    torch.testing.assert_close(found.gradients, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.values, TASK.measurement(model, (inputs, labels)))


def test_projections_keep_inner_products() -> None:
    model, examples = small_net(), images(12, 2)
    rows = gradients(model, *examples.batch(0, 12))
    exact = torch.stack([torch.cat([row["0"], row["4"]]) for row in rows])
    products, norms = exact @ exact.t(), torch.outer(exact.norm(dim=1), exact.norm(dim=1))
    errors = []
    for seed in range(20):
        found = project(model, examples, TASK.measurement, dimensions=128, seed=seed).gradients
        errors.append((found @ found.t() - products) / norms)
    error = torch.stack(errors)
    assert float(error.mean().abs()) < 0.02
    assert float(error.std()) < 1.5 / math.sqrt(128)


def test_what_is_not_tracked_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.shift, self.unused = small_net(), nn.Parameter(torch.zeros(3)), nn.Linear(2, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.network(inputs) + self.shift

    model, examples = Net(), images(60, 3)
    observation = unpoison.Observation(examples.images[0])
    findings = unpoison.trace(model, examples, observation, method="trak")
    assert findings.untracked == ("shift", "unused.weight", "unused.bias")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert findings.tracked_share == pytest.approx(1 - 9 / total)
    every = unpoison.trace(model, examples, observation, method=detectors.get("trak", modules=("*",)))
    assert every.untracked == ("unused.weight", "unused.bias")


def test_attributions_are_the_papers_formula() -> None:
    model, examples = small_net(), images(60, 3)
    queries = TensorExamples(*images(4, 4).batch(0, 4))
    found = trak_scores(model, examples, queries, dimensions=12, seed=1)
    phi = project(model, examples, TASK.measurement, dimensions=12, seed=1).gradients.double()
    query = project(model, queries, TASK.measurement, dimensions=12, seed=1).gradients.double()
    inputs, labels = examples.batch(0, 60)
    doubt = 1 - model(inputs).softmax(1).gather(1, labels[:, None])[:, 0]
    expected = query @ torch.linalg.inv(phi.t() @ phi) @ phi.t() * doubt
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def theirs(
    model: nn.Module, examples: TrainingSet, queries: TensorExamples, folder: Path, seed: int
) -> Tensor:
    """traker's attributions Float[m n], with its own projector for processors."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    count = sum(parameter.numel() for parameter in model.parameters())
    projector = BasicProjector(
        grad_dim=count,
        proj_dim=64,
        seed=seed,
        proj_type=ProjectionType.rademacher,
        device=torch.device("cpu"),
        block_size=32,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        traker = TRAKer(
            model,
            "image_classification",
            train_set_size=len(examples),
            save_dir=str(folder),
            device="cpu",
            projector=projector,
            proj_dim=64,
            use_half_precision=False,
            logging_level=50,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for start in range(0, len(examples), 100):
            batch = examples.batch(start, start + 100)
            traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
        traker.start_scoring_checkpoint("queries", model.state_dict(), model_id=0, num_targets=len(queries))
        traker.score(batch=queries.tensors, num_samples=len(queries))
        scores: Any = traker.finalize_scores(exp_name="queries")
    return torch.from_numpy(np.array(scores)).t()


def ranks_agree(one: Tensor, other: Tensor) -> float:
    """Mean Spearman correlation of the rows."""
    ranks = [rows.argsort(1).argsort(1).double() for rows in (one, other)]
    return float(
        torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]).mean()
    )


@pytest.mark.filterwarnings("ignore")
def test_traker_agrees_up_to_its_own_randomness(tmp_path: Path) -> None:
    pytest.importorskip("trak")
    model, examples = small_net(), images(300, 5)
    queries = TensorExamples(*images(5, 6).batch(0, 5))
    first, second = (theirs(model, examples, queries, tmp_path / str(seed), seed) for seed in (0, 1))
    ours = [trak_scores(model, examples, queries, dimensions=64, seed=seed) for seed in (0, 1)]
    among_theirs = ranks_agree(first, second)
    across = sum(ranks_agree(mine, their) for mine in ours for their in (first, second)) / 4
    assert across > among_theirs - 0.05
    assert across > 0.4


def test_a_backdoor_has_high_scores(scene: Any) -> None:
    found = TRAK().find(scene.model, scene.poisoned, scene.observation)
    truth = torch.zeros(len(scene.poisoned), dtype=torch.bool)
    truth[scene.poison.indices] = True
    assert average_precision(found.scores, truth) > 0.2  # chance is .05
    assert found.poison_found
    several = TRAK().find(scene.model, scene.poisoned, scene.observations)
    assert not torch.equal(several.scores, found.scores)


def test_impossible_projections() -> None:
    model, examples = small_net(), images(4, 0)
    for options in ({"dimensions": 0}, {"dimensions": 4, "batch_size": 0}):
        with pytest.raises(InputError, match="cannot project 4 examples"):
            project(model, examples, TASK.measurement, seed=0, **options)
    with pytest.raises(InputError, match="cannot project 0 examples"):
        project(model, examples.subset([]), TASK.measurement, seed=0, dimensions=3)
    with pytest.raises(InputError, match="dimensions must be a whole number of at least 1"):
        TRAK(dimensions=0)


def test_progress_counts_up() -> None:
    reported: list[tuple[str, int, int]] = []
    project(
        small_net(),
        images(10, 0),
        TASK.measurement,
        dimensions=4,
        seed=0,
        batch_size=4,
        progress=lambda *step, **_: reported.append(step),
    )
    assert reported == [("projections", 4, 10), ("projections", 8, 10), ("projections", 10, 10)]
