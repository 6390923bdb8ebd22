"""Every fast path of the influence engine against the slowest way to compute the same number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from unpoison.data import TensorExamples
from unpoison.errors import InputError, MismatchError
from unpoison.influence import (
    AbsoluteDamping,
    Factors,
    RelativeDamping,
    fit_factors,
    model_fingerprint,
    precondition,
    score,
    unchanged,
)
from unpoison.influence._factors import _drawn
from unpoison.tasks import ClassificationTask, Task

TASK = ClassificationTask()
CLASSES = 4


class Plain(nn.Module):
    """A small net with batch norm that changes its activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4 * 9, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu_(self.norm(self.first(images)))
        return self.head(functional.relu_(self.second(hidden)).flatten(1))


class Shared(nn.Module):
    """One convolution called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        for _ in range(3):
            images = self.conv(images).tanh()
        return self.head(images.mean((2, 3)))


class Words(nn.Module):
    """Embedding, a linear layer over a sequence, LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5, padding_idx=0)
        self.mix = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.table(tokens)).tanh()).mean(1))


class Convs(nn.Module):
    """One convolution of any kind before a head."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(**settings)  # type: ignore[arg-type]
        self.norm = nn.GroupNorm(2, self.conv.out_channels)
        self.head = nn.Linear(self.conv.out_channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(images)).tanh().mean((2, 3)))


def seeded(make: object, *, dtype: torch.dtype = torch.float64, **settings: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make(**settings)  # type: ignore[operator]
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(dtype)


def examples_for(model: nn.Module, count: int = 13) -> TensorExamples:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    if isinstance(model, Words):
        return TensorExamples(torch.randint(0, 7, (count, 6), generator=generator), labels)
    dtype = next(model.parameters()).dtype
    channels = model.conv.in_channels if isinstance(model, Convs) else 3
    return TensorExamples(torch.randn(count, channels, 6, 6, generator=generator, dtype=dtype), labels)


def loop_gradients(model: nn.Module, function: object, batch: tuple[Tensor, ...], names: list[str]) -> Tensor:
    """Float[b, p]: the gradient of each example by itself, over the parameters `names`."""
    parameters = dict(model.named_parameters())
    rows = []
    for index in range(len(batch[0])):
        value = function(model, tuple(part[index : index + 1] for part in batch)).sum()  # type: ignore[operator]
        parts = torch.autograd.grad(value, [parameters[name] for name in names], allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(parameters[name]) if part is None else part).flatten()
                    for name, part in zip(names, parts, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten(1) for value in values.values()], 1)


CONVS = {
    "plain": {"in_channels": 3, "out_channels": 4, "kernel_size": 3},
    "stride": {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "stride": 2, "padding": 1},
    "no bias": {"in_channels": 3, "out_channels": 4, "kernel_size": (3, 2), "padding": (0, 1), "bias": False},
    "dilation": {"in_channels": 3, "out_channels": 4, "kernel_size": 2, "dilation": (1, 3), "stride": (2, 1)},
    "groups": {"in_channels": 6, "out_channels": 4, "kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"in_channels": 3, "out_channels": 6, "kernel_size": 3, "groups": 3, "bias": False},
    "one by one": {"in_channels": 3, "out_channels": 4, "kernel_size": 1, "bias": False},
    "one by one, stride": {"in_channels": 3, "out_channels": 4, "kernel_size": 1, "stride": 2},
    "one by one, groups": {"in_channels": 4, "out_channels": 4, "kernel_size": 1, "groups": 2},
    "reflect": {
        "in_channels": 3,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": 2,
        "padding_mode": "reflect",
    },
    "circular": {
        "in_channels": 3,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": 1,
        "padding_mode": "circular",
    },
    "same": {"in_channels": 3, "out_channels": 4, "kernel_size": (2, 4), "padding": "same"},
    "whole image": {"in_channels": 3, "out_channels": 4, "kernel_size": 6},
}
NETS = {name: (Convs, settings) for name, settings in CONVS.items()}
NETS |= {"net": (Plain, {}), "shared": (Shared, {}), "words": (Words, {})}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETS)
def test_scores_are_products_of_gradients_taken_one_by_one(name: str) -> None:
    make, settings = NETS[name]
    model = seeded(make, **settings).eval()
    examples = examples_for(model)
    modules = [
        key for key, module in model.named_modules() if next(iter(module.parameters(False)), None) is not None
    ]
    factors = fit_factors(model, examples, TASK, seed=1, modules=modules, batch_size=5)
    combine = torch.tensor([[-1.0, 1, 0], [0, 0.5, 2]], dtype=torch.float64)
    batch = examples.batch(2, 5)
    plain = precondition(model, None, batch, TASK, combine=combine, modules=modules)
    names = list(plain.by_parameter(model))
    assert names == list(dict(model.named_parameters()))

    measured = combine @ loop_gradients(model, TASK.measurement, batch, names)
    torch.testing.assert_close(flat(plain.by_parameter(model)), measured)

    gradients = loop_gradients(model, TASK.loss, examples.batch(0, 13), names)
    queries = precondition(model, factors, batch, TASK, combine=combine, damping=RelativeDamping(0.2))
    scores = score(
        model,
        queries,
        examples,
        TASK,
        gradient_norms=True,
        self_influence=True,
        batch_size=4,
        workspace_bytes=2000,
    )
    torch.testing.assert_close(scores.values, flat(queries.by_parameter(model)) @ gradients.T)
    torch.testing.assert_close(scores.gradient_norms, gradients.norm(dim=1))
    torch.testing.assert_close(scores.losses, TASK.loss(model, examples.batch(0, 13)).detach())

    # Influence on itself: precondition the training loss of the examples and compare with the diagonal.
    own = precondition(model, factors, examples.batch(0, 13), Reversed(), damping=RelativeDamping(0.2))
    torch.testing.assert_close(scores.self_influence, (flat(own.by_parameter(model)) * gradients).sum(1))


class Reversed(Task):
    """The loss as the measurement."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return TASK.measurement(model, batch)

    def measurement(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return TASK.loss(model, batch)

    def sampled_loss(self, model: nn.Module, batch: tuple[Tensor, ...], noise: Tensor) -> Tensor:
        return TASK.sampled_loss(model, batch, noise)


@pytest.mark.parametrize("name", ["net", "shared", "groups", "words", "one by one"])
def test_eigenvalues_are_mean_squares_in_an_orthogonal_basis_that_diagonalises_the_covariances(
    name: str,
) -> None:
    make, settings = NETS[name]
    model = seeded(make, **settings).eval()
    examples = examples_for(model)
    modules = [
        key for key, module in model.named_modules() if next(iter(module.parameters(False)), None) is not None
    ]
    factors = fit_factors(model, examples, TASK, seed=1, modules=modules, batch_size=4, empirical=True)
    each = precondition(model, None, examples.batch(0, 13), Reversed(), modules=modules)
    for key, layer in factors.layers.items():
        turned = each.values[key]
        if layer.input_basis is not None and layer.output_basis is not None:
            turned = torch.einsum("kpo,mkpq,kqi->mkoi", layer.output_basis, turned, layer.input_basis)
            for basis in (layer.input_basis, layer.output_basis):
                identity = torch.eye(basis.shape[1], dtype=basis.dtype).expand_as(basis)
                torch.testing.assert_close(basis.transpose(1, 2) @ basis, identity)
        torch.testing.assert_close(layer.eigenvalues, turned.square().mean(0))


def test_covariance_eigenbasis_of_a_convolution_is_that_of_its_unfolded_patches() -> None:
    model = seeded(Plain).eval()
    examples = examples_for(model)
    factors = fit_factors(model, examples, TASK, seed=1, empirical=True)
    basis = factors.layers["first"].input_basis
    assert basis is not None
    patches = functional.unfold(examples.tensors[0], 3, padding=1)
    patches = (
        patches.unflatten(1, (3, 9)).transpose(1, 2).flatten(1, 2)
    )  # (channel, kernel) to (kernel, channel)
    covariance = torch.einsum("bit,bjt->ij", patches, patches) / (13 * 36)
    turned = basis[0].T @ covariance @ basis[0]
    torch.testing.assert_close(turned, turned.diagonal().diag())


def test_one_linear_layer_is_the_exact_inverse_where_the_fisher_matrix_is_a_kronecker_product() -> None:
    # Inputs independent of output gradients: the Fisher matrix is S x A exactly on a full grid.
    class Grid(Task):
        def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            return (model(batch[0]) * batch[1]).sum(1)

        measurement = loss

        def sampled_loss(self, model: nn.Module, batch: tuple[Tensor, ...], noise: Tensor) -> Tensor:
            raise AssertionError

    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    directions = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    grid = TensorExamples(inputs.repeat_interleave(8, 0), directions.repeat(9, 1))
    model = nn.Linear(3, 2).double()
    factors = fit_factors(model, grid, Grid(), seed=0, modules=[""], empirical=True)
    queries = precondition(model, factors, grid.batch(0, 5), Grid(), damping=AbsoluteDamping(0.01))
    values = score(model, queries, grid, Grid()).values
    gradients = loop_gradients(model, Grid().loss, grid.batch(0, 72), ["weight", "bias"])
    fisher = gradients.T @ gradients / 72
    expected = gradients[:5] @ torch.linalg.solve(
        fisher + 0.01 * torch.eye(8, dtype=torch.float64), gradients.T
    )
    torch.testing.assert_close(values, expected)


def test_the_true_fisher_matrix_is_the_gauss_newton_matrix_in_expectation() -> None:
    # One input, so that sampling is the only source of error: mean Lambda over many examples against J^T H J.
    model = seeded(lambda: nn.Linear(2, CLASSES, bias=False))
    x = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    examples = TensorExamples(x.expand(20000, 2), torch.zeros(20000, dtype=torch.int64))
    factors = fit_factors(model, examples, TASK, seed=2, modules=[""], batch_size=5000)
    layer = factors.layers[""]
    assert layer.input_basis is not None
    assert layer.output_basis is not None
    p = model(x).softmax(1)[0].detach()
    hessian = layer.output_basis[0].T @ (p.diag() - p[:, None] * p) @ layer.output_basis[0]
    inner = layer.input_basis[0].T @ (x.T @ x) @ layer.input_basis[0]
    expected = hessian.diagonal()[:, None] * inner.diagonal()
    torch.testing.assert_close(layer.eigenvalues[0], expected, rtol=0.05, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_jacobian_vector_product_reproduces_every_difference_score() -> None:
    model = seeded(Plain, dtype=torch.float32).eval()
    examples = examples_for(model, 40)
    factors = fit_factors(model, examples, TASK, seed=1)
    count = 7
    combine = torch.cat([-torch.ones(count, 1), torch.eye(count)], 1)
    queries = precondition(model, factors, examples.batch(0, 1 + count), TASK, combine=combine)
    values = score(model, queries, examples, TASK).values
    directions = queries.by_parameter(model)
    parameters = {name: value.detach() for name, value in model.named_parameters() if name in directions}
    images, labels = examples.batch(0, 40)

    def losses(tracked: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(model, tracked, (images.clone(),))
        return functional.cross_entropy(logits, labels, reduction="none")

    for row in range(count):
        tangent = {name: value[row] for name, value in directions.items()}
        _, expected = torch.func.jvp(losses, (parameters,), (tangent,))
        expected = expected.detach()
        torch.testing.assert_close(values[row], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_neither_batches_nor_memory_nor_order_nor_shards_of_the_work_change_a_score() -> None:
    model = seeded(Plain).eval()
    examples = examples_for(model, 30)
    first = fit_factors(model, examples, TASK, seed=1, batch_size=30)
    again = fit_factors(model, examples, TASK, seed=1, batch_size=7, workspace_bytes=1)
    for name, layer in first.layers.items():
        torch.testing.assert_close(layer.eigenvalues, again.layers[name].eigenvalues, rtol=1e-8, atol=1e-14)
    batch = examples.batch(0, 6)
    queries = precondition(model, first, batch, TASK)
    expected = score(model, queries, examples, TASK, batch_size=30).values
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = precondition(
        model, again, tuple(part[order] for part in batch), TASK, batch_size=4, workspace_bytes=1
    )
    scored = [
        score(model, shuffled, examples, TASK, batch_size=4, workspace_bytes=5000, start=start, stop=stop)
        for start, stop in ((0, 11), (11, 30))
    ]
    torch.testing.assert_close(torch.cat([part.values for part in scored], 1), expected[order])
    assert scored[1].start == 11
    by_combining = precondition(model, first, batch, TASK, combine=torch.eye(6, dtype=torch.float64)[order])
    torch.testing.assert_close(score(model, by_combining, examples, TASK).values, expected[order])


def test_single_precision_agrees_with_double() -> None:
    # Plain rotations are not unique, so the factors are shared and only the scoring differs in precision.
    model = seeded(Plain).eval()
    examples = examples_for(model, 30)
    factors = fit_factors(model, examples, TASK, seed=1)
    values = score(model, precondition(model, factors, examples.batch(0, 6), TASK), examples, TASK).values
    single = seeded(Plain, dtype=torch.float32).eval()
    few = TensorExamples(examples.tensors[0].float(), examples.tensors[1])
    again = dataclasses.replace(
        factors, model_fingerprint=fit_factors(single, few, TASK, seed=1).model_fingerprint
    )
    approximate = score(single, precondition(single, again, few.batch(0, 6), TASK), few, TASK).values
    assert approximate.dtype == torch.float32
    assert float((approximate - values).abs().max() / values.abs().max()) < 1e-5


def test_scores_predict_what_leaving_an_example_out_does_to_logistic_regression() -> None:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    labels = (inputs[:, 0] + 0.7 * torch.randn(60, generator=generator, dtype=torch.float64) > 0).long()
    query = (torch.randn(1, 3, generator=generator, dtype=torch.float64), torch.tensor([1]))
    decay = 0.01

    def fitted(keep: Tensor) -> nn.Linear:
        model = nn.Linear(3, 2).double()
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, tolerance_grad=1e-10)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs[keep]), labels[keep], reduction="sum") / 60
            loss = loss + decay / 2 * sum(parameter.square().sum() for parameter in model.parameters())
            loss.backward()
            return loss.detach()

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return model

    everyone = torch.ones(60, dtype=torch.bool)
    model = fitted(everyone)
    before = float(TASK.measurement(model, query).detach())
    changes = []
    for left_out in range(60):
        keep = everyone.clone()
        keep[left_out] = False
        changes.append(
            before - float(TASK.measurement(fitted(keep), query).detach())
        )  # what having the example does
    examples = TensorExamples(inputs, labels)
    factors = fit_factors(model, examples, TASK, seed=0, modules=[""])
    queries = precondition(model, factors, query, TASK, damping=AbsoluteDamping(decay))
    values = score(model, queries, examples, TASK).values[0]
    # A proponent (positive score) lowers the measurement, minus the margin: hence the minus.
    correlation = torch.corrcoef(torch.stack([values, -torch.tensor(changes, dtype=torch.float64)]))[0, 1]
    assert float(correlation) > 0.8


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    model = seeded(Plain)
    model.train()
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones_like(model.head.bias)
    examples = examples_for(model)
    values = {name: value.clone() for name, value in model.state_dict().items()}

    def check() -> None:
        assert model.training
        assert not model.norm.training
        assert [name for name, value in model.named_parameters() if not value.requires_grad] == [
            "first.weight"
        ]
        assert [name for name, value in model.named_parameters() if value.grad is not None] == ["head.bias"]
        assert all(torch.equal(model.state_dict()[name], value) for name, value in values.items())
        assert not any(len(module._forward_hooks) for module in model.modules())

    factors = fit_factors(model, examples, TASK, seed=0)
    check()
    with torch.no_grad():
        queries = precondition(model, factors, examples.batch(0, 2), TASK)
        score(model, queries, examples, TASK)
    check()

    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, queries, examples, TASK, progress=interrupt)
    check()

    class Broken(Reversed):
        def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            model(batch[0])
            raise RuntimeError("in the middle of a pass")

    with pytest.raises(RuntimeError, match="in the middle"):
        fit_factors(model, examples, Broken(), seed=0, empirical=True)
    check()


def test_factors_survive_the_disk_and_refuse_another_model(tmp_path: object) -> None:
    model = seeded(Plain).eval()
    examples = examples_for(model)
    factors = fit_factors(model, examples, TASK, seed=0, modules=["first", "norm", "head"])
    factors.save(tmp_path / "factors")  # type: ignore[operator]
    loaded = Factors.load(tmp_path / "factors")  # type: ignore[operator]
    loaded.check(model, examples)
    batch = examples.batch(0, 2)
    for name, layer in factors.layers.items():
        for field in ("eigenvalues", "input_basis", "output_basis"):
            before, after = getattr(layer, field), getattr(loaded.layers[name], field)
            assert (before is None and after is None) or torch.equal(before, after)
    torch.testing.assert_close(
        score(model, precondition(model, loaded, batch, TASK), examples, TASK).values,
        score(model, precondition(model, factors, batch, TASK), examples, TASK).values,
    )
    with pytest.raises(MismatchError, match="other examples"):
        loaded.check(model, examples_for(model, 12))
    queries = precondition(model, loaded, batch, TASK)
    with torch.no_grad():
        model.head.bias[0] += 1
    with pytest.raises(MismatchError, match="another model"):
        precondition(model, loaded, batch, TASK)
    with pytest.raises(MismatchError, match="another model"):
        score(model, queries, examples, TASK)
    (tmp_path / "factors" / "factors.safetensors").write_bytes(b"cut")  # type: ignore[operator]
    with pytest.raises(InputError, match="damaged"):
        Factors.load(tmp_path / "factors")  # type: ignore[operator]


def test_modules_can_be_chosen_and_fewer_examples_make_the_covariances() -> None:
    model = seeded(Plain).eval()
    examples = examples_for(model)
    factors = fit_factors(model, examples, TASK, seed=0, modules=["head", "second"], covariance_examples=5)
    assert list(factors.layers) == ["second", "head"]
    assert factors.settings["covariance_examples"] == 5
    chosen = _drawn(len(examples), 5, 0, "covariance")
    assert chosen is not None
    few = TensorExamples(*(part[chosen] for part in examples.tensors))
    less = fit_factors(model, few, TASK, seed=0, empirical=True)
    more = fit_factors(model, examples, TASK, seed=0, empirical=True, covariance_examples=5, batch_size=2)
    assert less.layers["head"].output_basis is not None
    assert more.layers["head"].output_basis is not None
    projected = less.layers["head"].output_basis[0].T @ more.layers["head"].output_basis[0]
    torch.testing.assert_close(projected.abs(), torch.eye(CLASSES, dtype=torch.float64), atol=1e-6, rtol=0)
    assert factors.num_parameters == 6 * 9 * 4 + 4 + 36 * CLASSES + CLASSES


@pytest.mark.parametrize(("total", "count"), [(7, 3), (20, 19), (1000, 10), (3, 1), (2**20, 2048)])
def test_examples_for_the_factors_are_drawn_from_all_of_the_set(total: int, count: int) -> None:
    drawn = _drawn(total, count, 0, "eigenvalues")
    assert drawn is not None
    ends = torch.arange(1, count + 1) * total // count
    assert len(drawn) == count
    assert (drawn < ends).all()
    assert (drawn >= torch.cat([torch.tensor([0]), ends[:-1]])).all()


def test_examples_for_the_factors_are_of_all_classes_where_the_classes_take_turns() -> None:
    drawn = _drawn(20_000, 2000, 1, "covariance")
    assert drawn is not None
    counts = torch.bincount(drawn % 10, minlength=10)
    assert (counts - 200).abs().max() < 5 * 200**0.5
    again = _drawn(20_000, 2000, 1, "eigenvalues")
    assert again is not None
    assert not torch.equal(drawn, again)
    for count in (None, 20_000, 30_000):
        assert _drawn(20_000, count, 1, "covariance") is None


def test_the_fingerprint_of_a_model_that_does_not_change_is_computed_once() -> None:
    model, other = seeded(Plain), seeded(Plain)
    before = model_fingerprint(model)
    with unchanged(model):
        with torch.no_grad():
            model.head.bias[0] += 1
            other.head.bias[0] += 1
        assert model_fingerprint(model) == before
        assert model_fingerprint(other) != before
    assert model_fingerprint(model) == model_fingerprint(other)


def test_the_covariances_read_no_other_examples_than_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Plain).eval()
    examples = examples_for(model)
    read = {"at": 0, "batch": 0}
    for name in read:
        reads = getattr(TensorExamples, name)

        def counted(self: Any, *rows: Any, name: str = name, reads: Any = reads) -> Any:
            batch = reads(self, *rows)
            read[name] += len(batch[0])
            return batch

        monkeypatch.setattr(TensorExamples, name, counted)
    fit_factors(model, examples, TASK, seed=0, covariance_examples=5, batch_size=2)
    monkeypatch.undo()
    sampled = len(examples)  # by the fingerprint, of at most 64
    assert read["at"] == 5 + sampled
    assert read["batch"] == len(examples) + sampled


class TestWhatIsRefused:
    def test_names(self) -> None:
        model = seeded(Plain)
        examples = examples_for(model)
        for modules, message in (
            (["nothing"], "no module 'nothing'"),
            ([""], "cannot track a Plain"),
            ([], "one or more"),
            ("head", "sequence"),
        ):
            with pytest.raises(InputError, match=message):
                fit_factors(model, examples, TASK, seed=0, modules=modules)

    def test_a_module_that_is_not_reached_is_an_error_if_named_and_left_out_if_not(self) -> None:
        model = seeded(Plain)
        model.add_module("spare", nn.Linear(2, 2).double())
        examples = examples_for(model)
        with pytest.raises(InputError, match=r"not reached by the forward pass.*: spare"):
            fit_factors(model, examples, TASK, seed=0, modules=["spare", "head"])
        factors = fit_factors(model, examples, TASK, seed=0)
        assert factors.unreached == ("spare",)
        assert "spare" not in factors.layers

    def test_a_parameter_of_modules_of_different_kinds(self) -> None:
        model = nn.Sequential(nn.Embedding(4, 4), nn.Flatten(), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        examples = TensorExamples(torch.arange(3)[:, None], torch.zeros(3).long())
        with pytest.raises(InputError, match="modules 0 and 2 share a parameter"):
            fit_factors(model, examples, TASK, seed=0, modules=["2"])
        with pytest.raises(InputError, match="no Linear"):
            fit_factors(model, examples, TASK, seed=0)

    def test_an_input_changed_in_place_after_its_use(self) -> None:
        class Sly(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                hidden = self.inner(x) + 0
                out = self.head(hidden)
                return out + hidden.mul_(0.5)[:, :CLASSES]

        examples = TensorExamples(torch.randn(3, 4), torch.zeros(3).long())
        with pytest.raises(InputError, match="module head: its input is changed in place"):
            fit_factors(Sly(), examples, TASK, seed=0)

    def test_inputs_that_do_not_keep_the_examples_apart(self) -> None:
        class Mixed(nn.Module):
            def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
                super().__init__()
                self.inner, self.head, self.mix = nn.Linear(4, 4), nn.Linear(4, CLASSES), mix

            def forward(self, x: Tensor) -> Tensor:
                return self.head(x) + self.inner(self.mix(x)).mean(0)

        examples = TensorExamples(torch.randn(5, 4), torch.zeros(5).long())
        for mix, words in (
            (lambda x: torch.ones(4, 4), "inner: its input does not depend on the examples"),
            (lambda x: x.repeat(2, 1), "inner: its input does not keep the examples"),
        ):
            with pytest.raises(InputError, match=words):
                fit_factors(Mixed(mix), examples, TASK, seed=0, modules=["inner", "head"])
            assert fit_factors(Mixed(mix), examples, TASK, seed=0).unreached == ("inner",)

    def test_numbers_that_are_not_finite(self) -> None:
        examples = TensorExamples(torch.full((3, 4), torch.nan), torch.zeros(3).long())
        with pytest.raises(InputError, match="not finite"):
            fit_factors(nn.Linear(4, CLASSES), examples, TASK, seed=0, modules=[""])

    def test_batch_norm_without_statistics_and_embedding_that_changes_itself(self) -> None:
        examples = TensorExamples(torch.randn(3, 4), torch.zeros(3).long())
        model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))
        with pytest.raises(InputError, match="mixes the examples"):
            fit_factors(model, examples, TASK, seed=0, modules=["0"])
        with pytest.raises(InputError, match="max_norm"):
            fit_factors(
                nn.Sequential(nn.Embedding(3, 4, max_norm=1.0)), examples, TASK, seed=0, modules=["0"]
            )

    def test_shapes_and_ranges(self) -> None:
        model = seeded(Plain)
        examples = examples_for(model)
        with pytest.raises(InputError, match="combine"):
            precondition(model, None, examples.batch(0, 3), TASK, combine=torch.ones(2, 2))
        with pytest.raises(InputError, match="self_influence"):
            score(
                model,
                precondition(model, None, examples.batch(0, 1), TASK),
                examples,
                TASK,
                self_influence=True,
            )
        with pytest.raises(InputError, match="cannot score examples 3 to 99 of 13"):
            score(
                model, precondition(model, None, examples.batch(0, 1), TASK), examples, TASK, start=3, stop=99
            )
        with pytest.raises(InputError, match="at least 0"):
            AbsoluteDamping(-1)
