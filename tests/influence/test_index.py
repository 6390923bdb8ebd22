"""`InfluenceIndex` beside the engine, and what happens to its files."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison._memory import limited
from unpoison.data import TensorExamples
from unpoison.errors import InputError, MismatchError
from unpoison.influence import (
    AbsoluteDamping,
    Factors,
    InfluenceIndex,
    LayerFactors,
    RelativeDamping,
    fit_factors,
    precondition,
    score,
)
from unpoison.influence import _index_build as building
from unpoison.influence import _sketch as sketching
from unpoison.influence._index_files import IndexFiles, read_tensors, spans, write_tensors
from unpoison.influence._index_rows import BLOCK, packed, products, row_bytes, unpacked
from unpoison.influence._index_space import span_of
from unpoison.influence._queries import inverse
from unpoison.influence._sketch import Sketcher, widths
from unpoison.tasks import ClassificationTask

TASK = ClassificationTask()


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 3)
    ).eval()


def examples(count: int, seed: int = 1) -> TensorExamples:
    randomness = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 4, 4, generator=randomness)
    return TensorExamples(images, torch.randint(3, (count,), generator=randomness))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def train() -> TensorExamples:
    return examples(50)


@pytest.fixture(scope="module")
def factors(model: nn.Module, train: TensorExamples) -> Factors:
    return fit_factors(model, train, TASK, seed=0)


@pytest.fixture(scope="module", params=["basis", "float16", "int8"])
def whole(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    model: nn.Module,
    train: TensorExamples,
    factors: Factors,
) -> InfluenceIndex:
    """An index that leaves nothing out: its basis are all examples, or it keeps whole gradients."""
    place = tmp_path_factory.mktemp("index")
    numbers = 50 if request.param == "basis" else None
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "int8":
            patch.setattr(building, "_WHOLE", 0)
        made = make(place, model, train, factors=factors, numbers=numbers)
    assert made.settings["type"] == ("int8" if request.param == "int8" else "float16")
    return made


def make(path: Path, model: nn.Module, train: TensorExamples, **options: Any) -> InfluenceIndex:
    given = {"shard_examples": 16, "batch_size": 8, "numbers": 50, **options}
    return InfluenceIndex.build(path / "index", model, train, **given)


def by_loops(model: nn.Module, factors: Factors, inputs: Tensor, label: int, damping: Any) -> Tensor:
    """Float64[p]: one gradient in the metric, from automatic differentiation and plain products."""
    from unpoison.influence._tracked import tracked_layers

    loss = TASK.measurement(model, (inputs[None], torch.tensor([label]))).sum()
    names = [name for name, _ in model.named_parameters()]
    grads = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    parts = []
    for layer in tracked_layers(model, list(factors.layers)):
        weight = grads[layer.weight].double()
        if weight.ndim == 4:
            weight = weight.permute(0, 2, 3, 1)
        matrix = torch.cat([weight.flatten(1), grads[f"{layer.name}.bias"].double()[:, None]], 1)
        own = factors.layers[layer.name]
        turned = own.output_basis[0].double().t() @ matrix @ own.input_basis[0].double()
        parts.append((turned * inverse(own, damping)[0].double().sqrt()).flatten())
    return torch.cat(parts)


def test_rows_are_those_of_a_loop(model: nn.Module, train: TensorExamples, factors: Factors) -> None:
    damping = RelativeDamping()
    inputs, labels = train.batch(0, 5)
    with Sketcher(model, factors, damping, TASK.measurement, dimensions=10**6, seed=0) as sketcher:
        found = sketcher.batch((inputs, labels), 5)
    for row in range(5):
        expected = by_loops(model, factors, inputs[row], int(labels[row]), damping)
        assert torch.allclose(found.rows[row].double(), expected, rtol=1e-3, atol=1e-4)
        assert float(found.lengths[row]) == pytest.approx(float(expected.norm()), rel=1e-4)
        loss = TASK.measurement(model, (inputs[row : row + 1], labels[row : row + 1])).sum()
        gradient = torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(model.parameters()))])
        assert float(found.norms[row]) == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_a_sketch_is_a_signed_sum_of_the_entries(
    model: nn.Module, train: TensorExamples, factors: Factors
) -> None:
    damping, limit = RelativeDamping(), 60
    batch = train.batch(0, 4)
    with Sketcher(model, factors, damping, TASK.measurement, dimensions=10**6, seed=0) as sketcher:
        full = sketcher.batch(batch, 4)
    with Sketcher(model, factors, damping, TASK.measurement, dimensions=limit, seed=0) as sketcher:
        few = sketcher.batch(batch, 4)
        parts = sketcher._visitor.parts
    chosen, first, place = widths(factors, damping, limit), 0, 0
    assert few.rows.shape[1] == sum(chosen) <= limit
    for layer, width, part in zip(factors.layers.values(), chosen, parts, strict=True):
        size = layer.eigenvalues.numel()
        signs = part.roots.flatten().sign()
        kept, energy = part.kept.tolist(), layer.eigenvalues * inverse(layer, damping)
        assert kept == energy.flatten().argsort(descending=True)[: len(kept)].tolist()
        expected = torch.zeros(4, width)
        for entry in range(size):
            place_of = kept.index(entry) if entry in kept else len(kept) + entry % part.buckets
            expected[:, place_of] += full.rows[:, first + entry] * signs[entry]
        assert torch.allclose(few.rows[:, place : place + width], expected, atol=1e-4)
        assert width == size or math.gcd(part.buckets, layer.eigenvalues.shape[2]) == 1
        first, place = first + size, place + width
    assert torch.equal(few.lengths, full.lengths)


def test_directions_of_one_weight_are_not_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 150), nn.Linear(150, 3))
    inputs = torch.randn(64, 16, 4, 4) * torch.logspace(0, -3, 16)[:, None, None]
    some = TensorExamples(inputs, torch.arange(64) % 3)
    factors = fit_factors(model.eval(), some, TASK, seed=0)

    def sketched(share: float, dimensions: int, reweighted: Any = None) -> Any:
        monkeypatch.setattr(sketching, "_SHARE", share)
        options: dict[str, Any] = {"dimensions": dimensions, "seed": 0, "reweighted": reweighted}
        with Sketcher(model, factors, RelativeDamping(), TASK.measurement, **options) as sketcher:
            split = [part.split for part in sketcher._visitor.parts]
            return sketcher.batch(some.batch(0, 64), 64), split

    whole, none = sketched(1e-3, 10**6)
    parted, split = sketched(1e-3, 1200)
    assert none == [None] * 3
    assert [one and one.turned for one in split[:2]] == [False, True]
    assert torch.allclose(parted.norms, whole.norms, rtol=1e-4)
    assert torch.allclose(parted.lengths, whole.lengths, rtol=0.03)
    assert not torch.allclose(parted.lengths, whole.lengths, rtol=1e-5)
    cosines = [one.rows @ one.rows.t() / one.lengths.outer(one.lengths) for one in (whole, parted)]
    assert float((cosines[0] - cosines[1]).abs().mean()) < 2 / math.sqrt(1200)
    # With another damping products are those with it.
    stronger = sketched(1e-3, 1200, AbsoluteDamping(1e3))[0].rows @ parted.rows.t()
    plain = sketched(1e-3, 10**6, AbsoluteDamping(1e3))[0].rows @ whole.rows.t()
    assert float(torch.corrcoef(torch.stack([stronger.flatten(), plain.flatten()]))[0, 1]) > 0.95


def test_near_directions_are_the_fewest() -> None:
    randomness = torch.Generator().manual_seed(1)
    squares = torch.rand(2, 3, 9, generator=randomness) ** 6
    weights = (squares + 0.1).rsqrt()
    order = squares.sum((0, 1)).argsort()

    def error(count: int) -> float:
        own, weight = squares[..., order[:count]], weights[..., order[:count]]
        mean = (own * weight).sum(2, keepdim=True) / own.sum(2, keepdim=True)
        return float((own * (weight - mean) ** 2).sum() / (squares * weights**2).sum())

    for share in (1e-4, 1e-2, 0.1):
        far = 9 - sketching.near_directions(squares, weights, share)[1]
        assert error(far) <= share
        assert far == 9 or error(far + 1) > share


def test_small_layers_are_kept_whole(factors: Factors) -> None:
    sizes = [one.eigenvalues.numel() for one in factors.layers.values()]
    assert widths(factors, RelativeDamping(), sum(sizes)) == sizes
    fewer = widths(factors, RelativeDamping(), sum(sizes) // 2)
    assert sum(fewer) <= sum(sizes) // 2
    assert min(fewer) >= 1


@pytest.mark.parametrize("damping", [None, AbsoluteDamping(0.01)])
def test_influence_is_that_of_the_engine(
    model: nn.Module, train: TensorExamples, factors: Factors, whole: InfluenceIndex, damping: Any
) -> None:
    batch, combine = examples(4, 9).batch(0, 4), torch.tensor([[1.0, -1, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    queries = precondition(model, factors, batch, TASK, combine=combine, damping=damping)
    exact = score(
        model, queries, train, TASK, gradient="measurement", self_influence=True, gradient_norms=True
    )
    asked = whole.queries(model, batch, combine=combine, damping=damping, batch_size=3)
    scale = exact.values.abs().amax()
    assert torch.allclose(whole.influence(asked).float() / scale, exact.values / scale, atol=5e-3)
    rows = torch.tensor([40, 3, 17, 16])
    assert torch.allclose(whole.influence(asked, rows), whole.influence(asked)[:, rows])
    assert torch.allclose(whole.gradient_norms(), exact.gradient_norms, rtol=1e-4)
    assert torch.allclose(whole.values().float(), exact.losses)
    if damping is None:
        assert torch.allclose(whole.self_influence, exact.self_influence, rtol=1e-4)
    assert torch.equal(whole.labels(), train.labels)
    assert whole.exact == (whole.numbers == factors.num_parameters and whole.settings["type"] == "float16")


def test_a_gradient_outside_of_the_basis_is_found(
    tmp_path: Path, model: nn.Module, train: TensorExamples, factors: Factors
) -> None:
    few = make(tmp_path, model, train, factors=factors, numbers=4)
    outside = few.captured().argsort()[:5]
    assert float(few.captured(outside).max()) < 0.9
    nearest, cosines = few.similar(outside, count=3)
    assert not bool((nearest == outside[:, None]).any())
    assert bool((cosines[:, :-1] >= cosines[:, 1:]).all())
    # By the second term an example is its own nearest.
    own = few.cosines(outside, outside)
    assert bool((own.argmax(1) == torch.arange(5)).all())
    assert torch.allclose(own.diagonal(), torch.ones(5).double(), atol=0.35)


def test_cosines_are_those_of_the_engine(
    model: nn.Module, train: TensorExamples, factors: Factors, whole: InfluenceIndex
) -> None:
    queries = precondition(model, factors, train.batch(0, 50), TASK)
    exact = score(model, queries, train, TASK, gradient="measurement", self_influence=True)
    assert exact.self_influence is not None
    length = exact.self_influence.sqrt()
    cosines = exact.values / length / length[:, None]
    assert torch.allclose(whole.cosines(torch.arange(50)).float(), cosines.float(), atol=5e-3)


def test_mean_cosines_are_the_mean_of_cosines(whole: InfluenceIndex) -> None:
    some, rows = torch.tensor([3, 7, 7, 20]), torch.tensor([40, 0, 3])
    for given in (None, rows):
        wanted = whole.cosines(some, given).mean(0)
        assert torch.allclose(whole.mean_cosines(some, given), wanted, atol=1e-3)
    with pytest.raises(InputError, match="needs an example at least"):
        whole.mean_cosines(some[:0])
    with pytest.raises(InputError, match=r"has the examples 0\.\.49"):
        whole.mean_cosines(torch.tensor([50]))


def test_the_principal_plane_is_that_of_the_gram_matrix(whole: InfluenceIndex) -> None:
    plane = whole.principal_plane().double()
    gram = whole.cosines(torch.arange(50))
    gram = (gram + gram.t()) / 2
    middle = torch.eye(50).double() - 1 / 50
    values, vectors = torch.linalg.eigh(middle @ gram @ middle)
    wanted = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].t()
    assert torch.allclose(plane @ plane.t(), wanted, atol=2e-2)


def test_rows_depend_neither_on_shards_nor_on_batches(
    tmp_path: Path, model: nn.Module, train: TensorExamples, factors: Factors, whole: InfluenceIndex
) -> None:
    other = make(tmp_path, model, train, factors=factors, shard_examples=7, batch_size=3)
    pairs = other.cosines(torch.arange(9)), whole.cosines(torch.arange(9))
    assert torch.allclose(*pairs, atol=5e-3)
    assert torch.allclose(other.lengths(), whole.lengths(), rtol=1e-4)


def test_rows_do_not_depend_on_what_a_process_read_first(train: TensorExamples, factors: Factors) -> None:
    seen: list[int] = []
    watched = network()
    next(watched.children()).register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    with Sketcher(watched, factors, RelativeDamping(), TASK.measurement, dimensions=64, seed=0) as sketcher:
        for _ in range(2):
            sketcher.batch(train.batch(0, 16), 16)
    assert seen.count(16) == 2  # each time in one piece, whatever was tried to see what fits


def test_the_same_call_makes_nothing_twice(tmp_path: Path, model: nn.Module, train: TensorExamples) -> None:
    first = make(tmp_path, model, train)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.safetensors")}
    again = make(tmp_path, model, train)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.safetensors")}
    assert again.digest == first.digest
    assert InfluenceIndex.open(tmp_path / "index").digest == first.digest


@pytest.mark.parametrize("stage", ["covariance", "eigenvalues", "basis", "index"])
def test_stopped_at_any_stage_it_ends_with_the_same_digest(
    tmp_path: Path, model: nn.Module, train: TensorExamples, stage: str
) -> None:
    whole = make(tmp_path / "whole", model, train)

    def stop(name: str, done: int, total: int, **_: Any) -> None:
        if name == stage and done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, model, train, progress=stop)
    with pytest.raises(InputError, match="unfinished"):
        InfluenceIndex.open(tmp_path / "index")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("shards/*")}
    assert make(tmp_path, model, train).digest == whole.digest
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x41
    path.write_bytes(bytes(content))


def test_a_damaged_shard_is_found_and_made_again_alone(
    tmp_path: Path, model: nn.Module, train: TensorExamples
) -> None:
    index = make(tmp_path, model, train)
    digest, place = index.digest, tmp_path / "index" / "shards" / "16.safetensors"
    damage(place)
    opened = InfluenceIndex.open(tmp_path / "index")
    assert float(opened.lengths(torch.tensor([3]))) == float(index.lengths(torch.tensor([3])))
    with pytest.raises(InputError, match=r"16\.safetensors: damaged"):
        opened.similar([20])
    others = {path: path.stat().st_mtime_ns for path in place.parent.iterdir() if path != place}
    assert make(tmp_path, model, train).digest == digest
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())


@pytest.mark.parametrize("file", ["basis.safetensors", "factors/factors.safetensors"])
def test_a_damaged_basis_or_factors_are_made_again(
    tmp_path: Path, model: nn.Module, train: TensorExamples, file: str
) -> None:
    digest = make(tmp_path, model, train).digest
    damage(tmp_path / "index" / file)
    with pytest.raises(InputError, match="damaged"):
        InfluenceIndex.open(tmp_path / "index")
    assert make(tmp_path, model, train).digest == digest


def test_appended_examples_are_read_alone(
    tmp_path: Path, model: nn.Module, train: TensorExamples, factors: Factors
) -> None:
    index = make(tmp_path, model, train, factors=factors)
    more = examples(20, 5)
    read: list[int] = []

    class Watched(TensorExamples):  # type: ignore[misc]
        def batch(self, start: int, stop: int) -> Any:
            read.extend(range(start, stop))
            return super().batch(start, stop)

    grown = index.append(model, Watched(*more.tensors))
    assert len(grown) == 70
    assert set(read) == set(range(20))
    assert torch.equal(grown.lengths(torch.arange(50)), index.lengths())
    both = TensorExamples(
        torch.cat([train.tensors[0], more.tensors[0]]), torch.cat([train.labels, more.labels])
    )
    grown.check(model, both)
    assert torch.equal(grown.labels(), both.labels)
    with pytest.raises(MismatchError, match="another training set"):
        grown.check(model, train)
    queries = precondition(model, factors, more.batch(0, 3), TASK)
    exact = score(model, queries, both, TASK, gradient="measurement").values
    found = grown.influence(grown.queries(model, more.batch(0, 3))).float()
    scale = exact.abs().amax()
    assert torch.allclose(found[:, :50] / scale, exact[:, :50] / scale, atol=3e-3)
    # What new examples share with each other alone is known by its sketch.
    assert float(torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1]) > 0.97
    assert grown.append(model, more).digest == grown.digest


@pytest.mark.parametrize("same", [True, False])
def test_an_interrupted_append_leaves_the_index_and_goes_on(
    tmp_path: Path, model: nn.Module, train: TensorExamples, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    index, wanted = (make(tmp_path / name, model, train) for name in ("killed", "whole"))
    first, write = examples(20, 5), IndexFiles.write_shard
    more = first if same else examples(20, 6)

    def killed(self: IndexFiles, span: Any, *rest: Any) -> None:
        if span.start > 50:
            raise KeyboardInterrupt
        write(self, span, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(IndexFiles, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            index.append(model, first)
    known = InfluenceIndex.open(index.directory)
    assert known.digest == index.digest
    known.check(model, train)
    with pytest.raises(MismatchError, match="20 more were not appended to the end"):
        known.check(model, more)
    assert known.append(model, more).digest == wanted.append(model, more).digest


def test_several_processes_give_the_same(tmp_path: Path, model: nn.Module, train: TensorExamples) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    seen: list[tuple[str, int, int]] = []
    one = make(tmp_path / "one", model, train)
    two = make(tmp_path / "two", model, train, processes=2, progress=lambda *told, **_: seen.append(told))
    assert two.digest == one.digest
    assert seen[-1] == ("index", 50, 50)


def test_a_process_that_is_killed_is_replaced(
    tmp_path: Path, model: nn.Module, train: TensorExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tmp_path / "whole", model, train)
    mark, write = tmp_path / "killed", IndexFiles.write_shard

    def killed_once(self: IndexFiles, span: Any, *rest: Any) -> None:
        if span.start == 16 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, span, *rest)

    monkeypatch.setattr(IndexFiles, "write_shard", killed_once)
    assert make(tmp_path / "killed index", model, train, processes=2).digest == whole.digest
    assert mark.exists()


def test_an_error_in_a_process_is_told(tmp_path: Path, train: TensorExamples, factors: Factors) -> None:
    class Broken(TensorExamples):  # type: ignore[misc]
        def batch(self, start: int, stop: int) -> Any:
            if start >= 16 and multiprocessing.parent_process() is not None:
                raise InputError("row 16: cannot be read")
            return super().batch(start, stop)

    with pytest.raises(InputError, match="row 16: cannot be read"):
        make(tmp_path, network(), Broken(*train.tensors), processes=2)
    assert not list((tmp_path / "index").rglob("*.partial"))


def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, model: nn.Module, train: TensorExamples, whole: InfluenceIndex
) -> None:
    with pytest.raises(MismatchError, match="another model"):
        whole.check(network(3))
    with pytest.raises(MismatchError, match="another training set"):
        whole.check(model, examples(50, 4))
    with pytest.raises(MismatchError, match="another model"):
        whole.queries(network(3), train.batch(0, 1))
    other = make(tmp_path, model, train, numbers=5, seed=3)
    with pytest.raises(MismatchError, match="another index"):
        other.influence(whole.queries(model, train.batch(0, 1)))
    for given, said in (
        ({"seed": 4}, "seed"),
        ({"damping": AbsoluteDamping(1.0)}, "damping"),
        ({"shard_examples": 5}, "shard_examples"),
        ({"numbers": 6}, "numbers 5, not 6"),
    ):
        with pytest.raises(MismatchError, match=said):
            make(tmp_path, model, train, **{"numbers": 5, "seed": 3, **given})
    with pytest.raises(MismatchError, match="other examples"):
        make(tmp_path, model, examples(50, 4), numbers=5, seed=3)
    with pytest.raises(InputError, match="no index"):
        InfluenceIndex.open(tmp_path)
    with pytest.raises(InputError, match=r"0\.\.49"):
        whole.similar([50])


def test_another_code_is_refused(
    tmp_path: Path, model: nn.Module, train: TensorExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, model, train)
    monkeypatch.setattr("unpoison.influence._index.code", lambda: "other")
    with pytest.raises(MismatchError, match="another version"):
        InfluenceIndex.open(tmp_path / "index")


def test_the_memory_decides_on_the_size(
    tmp_path: Path, model: nn.Module, train: TensorExamples, factors: Factors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "quick_type", lambda _: torch.bfloat16)  # as on a processor that has it
    tracked = factors.num_parameters

    def size(memory: int, of: Factors = factors, free: int | None = None, **given: int) -> building.RowSize:
        plan = building.Plan(
            seed=0,
            damping=RelativeDamping(),
            modules=None,
            covariance_examples=None,
            eigenvalue_examples=None,
            gradient="measurement",
            numbers=given.get("numbers"),
            sketch=given.get("sketch"),
            processes=1,
            shard_examples=16,
            batch_size=8,
            workspace_bytes=None,
        )
        with limited(memory):
            return building.size_of(plan, of, 10_000, torch.device("cpu"), free)

    kept = building.RowSize
    assert size(10**9) == kept(tracked, tracked)
    wide = Factors({"wide": LayerFactors(None, None, torch.ones(1, 100, 100))}, "", "", {})
    assert size(10**9, wide) == kept(10_000, 10_000)
    assert size(1_200_000, wide) == kept(64, 2500)
    assert size(10**9, numbers=100, sketch=200) == kept(100, 200)
    wider = Factors({"wide": LayerFactors(None, None, torch.ones(1, 300, 300))}, "", "", {})
    assert size(10**10, wider) == kept(90_000, 90_000, "int8")
    assert size(10**10, wider, free=10**9) == kept(2048, 90_000)
    with pytest.raises(InputError, match=r"may be taken; allow more"):
        size(2_000_000, numbers=tracked - 1)
    with pytest.raises(InputError, match=r"may be taken; allow more"):
        make(tmp_path, model, train, factors=factors, memory=1000)


def test_options_out_of_range(tmp_path: Path, model: nn.Module, train: TensorExamples) -> None:
    for given in ({"numbers": 0}, {"processes": 0}, {"gradient": "hessian"}, {"shard_examples": 0}):
        with pytest.raises(InputError, match=next(iter(given))):
            make(tmp_path, model, train, **given)
    with pytest.raises(InputError, match="no training examples"):
        make(tmp_path, model, TensorExamples(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize("width", [1, BLOCK, BLOCK + 1, 40 * BLOCK + 3])
def test_rows_of_bytes_are_multiplied_as_they_are_read(width: int) -> None:
    randomness = torch.Generator().manual_seed(width)
    values = torch.randn(7, width, generator=randomness) * 10.0 ** torch.linspace(-9, 0, width)
    values[3] = 0
    kept, rows = packed(values, True), torch.tensor([6, 3, 0])
    assert sum(part.nbytes for part in kept.values()) == 7 * row_bytes(width, True)
    read = unpacked(kept, slice(None), width)
    assert torch.equal(unpacked(kept, rows, width), read[rows])
    for start in range(0, width, BLOCK):
        own = slice(start, start + BLOCK)
        error = (read[:, own] - values[:, own]).abs().amax(1)
        assert bool((error <= values[:, own].abs().amax(1) * 0.9 / 127).all())
    queries = torch.randn(2, width, generator=randomness)
    wanted = read[rows].double() @ queries.double().t()
    scale = read[rows].double().norm(dim=1)[:, None] * queries.double().norm(dim=1)
    assert bool(((products(kept, rows, queries) - wanted).abs() <= 8e-3 * scale).all())


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2).half(), "b": torch.arange(4)}
    known = write_tensors(tmp_path / "file", tensors, made_of="x")
    found, made_of, digest = read_tensors(tmp_path / "file")
    assert (made_of, digest) == ("x", known)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [one.first for one in spans([{"examples": 3}, {"examples": 3}], 2)] == [0, 0, 3, 3]
    (tmp_path / "file").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        read_tensors(tmp_path / "file")


def test_a_basis_is_orthonormal() -> None:
    rows = torch.nn.functional.normalize(torch.randn(70, 900, generator=torch.Generator().manual_seed(0)))
    rows[4] = rows[3]
    made = span_of(rows)
    basis = torch.cat([made["leading"], made["basis"][len(made["leading"]) :].float()])
    assert torch.allclose(basis @ basis.t(), torch.diag((torch.arange(70) < 69).float()), atol=0.02)
    assert torch.allclose(rows @ basis.t() @ basis, rows, atol=0.01)
