from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison._memory import limited
from unpoison.data import TensorExamples
from unpoison.errors import InputError, InsufficientMemoryError
from unpoison.influence import fit_factors, influence_scores, precondition, score
from unpoison.influence._bounded import blocks_of
from unpoison.influence._queries import LowRank
from unpoison.influence._tracked import tracked_layers
from unpoison.tasks import ClassificationTask

TASK = ClassificationTask()
BIG = "1GB"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, groups=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 4),
    ).double()


def examples(count: int, seed: int = 0) -> TensorExamples:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 4, 4, dtype=torch.float64, generator=generator)
    return TensorExamples(images, torch.randint(4, (count,), generator=generator))


class Counted:
    """Examples that count how often they are read."""

    def __init__(self, inner: TensorExamples) -> None:
        self.inner, self.readings = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def batch(self, start: int, stop: int) -> Any:
        self.readings += start == 0
        return self.inner.batch(start, stop)


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, ...]:
    model, train = network(), examples(23)
    return model, train, fit_factors(model, train, TASK, seed=0), examples(6, 1).batch(0, 6)


def bytes_of(model: nn.Module, queries: int, count: int) -> int:
    """Memory in which this many queries of all modules fit, and the scores of six."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return 2 * 8 * (queries * numbers + 10 * count)


@pytest.mark.parametrize("queries", [6, 3, 1])
def test_blocks_give_the_scores_of_one_reading(fitted: tuple[Any, ...], queries: int) -> None:
    model, train, factors, asked = fitted
    options: Any = {"gradient_norms": True, "self_influence": True}
    wanted = score(model, precondition(model, factors, asked, TASK), train, TASK, **options)
    counted: Any = Counted(train)
    memory = bytes_of(model, queries, len(train))
    found = influence_scores(model, factors, asked, counted, TASK, memory=memory, **options)
    assert (counted.readings > 1) == (queries < 6)
    torch.testing.assert_close(found.values, wanted.values)
    torch.testing.assert_close(found.losses, wanted.losses)
    torch.testing.assert_close(found.gradient_norms, wanted.gradient_norms)
    torch.testing.assert_close(found.self_influence, wanted.self_influence)


@pytest.mark.parametrize("norms", [False, True])
def test_full_rank_is_exact_and_a_low_rank_close_in_one_reading(fitted: tuple[Any, ...], norms: bool) -> None:
    model, train, factors, asked = fitted
    combine = torch.cat([-torch.ones(5, 1), torch.eye(5)], 1).double()
    memory = bytes_of(model, 1, len(train))
    options: Any = {"combine": combine, "gradient_norms": norms}
    wanted = influence_scores(model, factors, asked, train, TASK, memory=BIG, **options)
    for rank, slack in ((15, 1e-6), (8, 0.3), (3, 0.6)):
        counted: Any = Counted(train)
        found = influence_scores(model, factors, asked, counted, TASK, memory=memory, rank=rank, **options)
        assert counted.readings == 1
        error = (found.values - wanted.values).norm() / wanted.values.norm()
        assert float(error) < slack
        if norms:
            torch.testing.assert_close(found.gradient_norms, wanted.gradient_norms)


def test_a_matrix_of_low_rank_is_its_products() -> None:
    randomness = torch.Generator().manual_seed(0)
    left, right = (torch.randn(5, 2, *shape, generator=randomness).double() for shape in ((9, 3), (3, 30)))
    found = LowRank.of(left @ right, 3, randomness)
    rebuilt = torch.einsum("komr,kimr->mkoi", found.left, found.right)
    torch.testing.assert_close(rebuilt, left @ right)


def test_products_by_position_and_by_gradient_agree() -> None:
    # One position is cheaper by position, many are cheaper by gradient.
    for size in (1, 12):
        model = nn.Sequential(nn.Conv1d(8, 8, 1, bias=False), nn.Flatten(), nn.Linear(8 * size, 2)).double()
        inputs = torch.randn(7, 8, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        train = TensorExamples(inputs, torch.arange(7) % 2)
        asked = train.batch(0, 4)
        wanted = influence_scores(model, None, asked, train, TASK, modules=["0"])
        prepared = precondition(model, None, asked, TASK, modules=["0"])
        low = LowRank.of(prepared.values["0"], 8, torch.Generator().manual_seed(0))
        queries = type(prepared)({}, None, prepared.damping, prepared.model_fingerprint, {"0": low})
        assert len(queries) == 4
        torch.testing.assert_close(score(model, queries, train, TASK).values, wanted.values)


def test_blocks_cover_every_query_of_every_module_once() -> None:
    layers = tracked_layers(network())
    for budget in (11000, 20000, 10**6):
        seen: dict[str, Tensor] = {layer.name: torch.zeros(7, dtype=torch.int64) for layer in layers}
        for block in blocks_of(layers, 7, budget, 4):
            for name in block.modules:
                seen[name][block.first : block.last] += 1
        assert all(bool((times == 1).all()) for times in seen.values())


def test_what_is_refused(fitted: tuple[Any, ...]) -> None:
    model, train, factors, asked = fitted
    with pytest.raises(InsufficientMemoryError, match=r"one query of module 4 takes .* leave it out"):
        influence_scores(model, factors, asked, train, TASK, memory=30_000)
    with pytest.raises(InputError, match="rank must be positive"):
        influence_scores(model, factors, asked, train, TASK, rank=0)
    with (
        limited(50_000),
        pytest.raises(InsufficientMemoryError, match=r"would take .* 1 fit at a time"),
    ):
        precondition(model, factors, asked, TASK)
