"""Training: repeats bit for bit, resumes to the same weights, obeys masks, stops when it diverges."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unpoison.data import TrainingSet
from unpoison.errors import InputError, InsufficientMemoryError, MismatchError, TrainingDivergedError
from unpoison.models import build
from unpoison.training import Defense, Recipe, Trained, accuracy, predict, train

RECIPE = Recipe(
    model="resnet9",
    width=2,
    epochs=3,
    batch_size=16,
    learning_rate=0.05,
    schedule="one-cycle",
    warmup_epochs=1,
    flip=True,
    crop_padding=1,
)


def some_set(n: int = 50, *, channels: int = 1, size: int = 12, seed: int = 0) -> TrainingSet:
    """Two classes that differ in brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    images = (
        torch.randint(0, 128, (n, channels, size, size), generator=generator)
        + 100 * labels[:, None, None, None]
    )
    return TrainingSet(images.to(torch.uint8), labels, ("dark", "bright"), "test set")


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_it_learns_and_reports() -> None:
    seen: list[tuple[str, int, int, dict[str, float]]] = []

    def progress(stage: str, done: int, total: int, /, **metrics: float) -> None:
        seen.append((stage, done, total, metrics))

    training_set = some_set()
    recipe = replace(RECIPE, model="convnet", width=4, epochs=12)
    trained = train(training_set, recipe, seed=0, progress=progress)
    assert accuracy(trained.model, training_set).rate > 0.9
    assert accuracy(trained.model, some_set(seed=1)).trials == 50
    assert not trained.model.training
    assert seen == [
        ("training", record.epoch + 1, 12, {"loss": record.loss, "accuracy": record.accuracy})
        for record in trained.history
    ]
    assert [record.epoch for record in trained.history] == list(range(12))
    assert trained.history[-1].loss < trained.history[0].loss
    assert trained.history[-1].examples == 50
    assert trained.training_fingerprint == training_set.fingerprint
    assert predict(trained.model, training_set.images, batch_size=7).shape == (50, 2)
    assert all(parameter.is_contiguous() for parameter in trained.model.parameters())


def test_equal_seeds_give_equal_weights_and_leave_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (train(some_set(), RECIPE, seed=seed).model for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(first, again)
    assert not same(first, other)


def test_dropout_repeats_too() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 2))
    torch.manual_seed(1)
    first = train(some_set(), RECIPE, seed=0, start=model)
    torch.manual_seed(2)
    assert same(first.model, train(some_set(), RECIPE, seed=0, start=model).model)


def test_an_excluded_example_has_no_influence() -> None:
    training_set = some_set()
    include = torch.arange(50) >= 10
    black = training_set.with_examples(
        range(10), torch.zeros(10, 1, 12, 12, dtype=torch.uint8), 1 - training_set.labels[:10]
    )
    first, second = (train(each, RECIPE, seed=0, include=include) for each in (training_set, black))
    assert same(first.model, second.model)
    assert first.history[0].examples == 40
    assert not same(first.model, train(training_set, RECIPE, seed=0).model)


class OneByOne(Defense):
    """Drops one more example in each epoch."""

    def __init__(self) -> None:
        self.dropped = torch.zeros((), dtype=torch.int64)

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        assert not model.training
        if epoch == 0:
            self.dropped = torch.zeros((), dtype=torch.int64)
        alive[self.dropped] = False
        self.dropped = self.dropped + 1
        return alive

    def state(self) -> dict[str, Tensor]:
        return {"dropped": self.dropped}

    def restore(self, state) -> None:
        self.dropped = state["dropped"]

    def __repr__(self) -> str:
        return "OneByOne()"


def test_a_defense_chooses_among_the_included() -> None:
    include = torch.arange(50) != 49
    trained = train(some_set(), RECIPE, seed=0, defense=OneByOne(), include=include)
    assert [record.examples for record in trained.history] == [48, 47, 46]


class Strict(OneByOne):
    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        return torch.zeros_like(alive) if epoch else alive[:3]


def test_a_defense_that_misbehaves_is_named() -> None:
    with pytest.raises(InputError, match=r"OneByOne\(\): keep must return a bool tensor of shape \[50\]"):
        train(some_set(), RECIPE, seed=0, defense=Strict())
    strict = Strict()
    strict.keep = lambda epoch, model, training_set, alive: torch.zeros_like(alive)  # type: ignore[method-assign]
    with pytest.raises(InputError, match="keeps no example in epoch 0"):
        train(some_set(), RECIPE, seed=0, defense=strict)


@pytest.mark.parametrize("defended", [False, True])
def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path: Path, defended: bool) -> None:
    def interrupt(stage: str, done: int, total: int, /, **metrics: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    def defense() -> Defense | None:
        return OneByOne() if defended else None

    whole = train(some_set(), RECIPE, seed=0, defense=defense())
    with pytest.raises(KeyboardInterrupt):
        train(some_set(), RECIPE, seed=0, defense=defense(), checkpoints=tmp_path / "c", progress=interrupt)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["epoch-0002"]
    seen: list[tuple[int, int]] = []
    resumed = train(
        some_set(), RECIPE, seed=0, defense=defense(), checkpoints=tmp_path / "c",
        progress=lambda stage, done, total, /, **_: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(3, 3)]
    assert same(whole.model, resumed.model)
    assert [record.loss for record in whole.history] == [record.loss for record in resumed.history]
    done = train(
        some_set(), RECIPE, seed=0, defense=defense(), checkpoints=tmp_path / "c", progress=interrupt
    )
    assert same(whole.model, done.model)


KILLED = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_trainer import RECIPE, some_set
from unpoison.training import train
def progress(stage, done, total, /, **metrics):
    if done == 2:
        print("ready", flush=True)
        import time; time.sleep(60)
train(some_set(), RECIPE, seed=0, checkpoints={directory!r}, progress=progress)
"""


def test_a_killed_process_resumes_to_the_same_weights(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), directory=str(tmp_path / "c"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGKILL)
    resumed = train(some_set(), RECIPE, seed=0, checkpoints=tmp_path / "c")
    assert same(train(some_set(), RECIPE, seed=0).model, resumed.model)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"seed": 1}, "seed"),
        ({"recipe": replace(RECIPE, learning_rate=0.01)}, "recipe"),
        ({"training_set": some_set(seed=9)}, "training set"),
        ({"include": torch.arange(50) > 3}, "choice of examples"),
        ({"defense": OneByOne()}, "defense"),
        ({"start": nn.Sequential(nn.Flatten(), nn.Linear(144, 2))}, "starting model"),
    ],
)
def test_checkpoints_of_another_run_are_refused(tmp_path: Path, arguments: dict, what: str) -> None:
    base = {"training_set": some_set(), "recipe": replace(RECIPE, epochs=1, warmup_epochs=0), "seed": 0}
    train(**base, checkpoints=tmp_path)
    with pytest.raises(MismatchError, match=f"a run with another .*{what}"):
        train(**{**base, **arguments}, checkpoints=tmp_path)


@pytest.mark.parametrize("file", ["state.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, file: str) -> None:
    train(some_set(), RECIPE, seed=0, checkpoints=tmp_path)
    damaged = tmp_path / "epoch-0003" / file
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(InputError, match=r"epoch-0003: damaged checkpoint .*remove .* to start anew"):
        train(some_set(), RECIPE, seed=0, checkpoints=tmp_path)


def test_divergence_names_step_epoch_and_rate() -> None:
    recipe = replace(RECIPE, learning_rate=1e6, warmup_epochs=0, schedule="constant")
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 64), nn.Linear(64, 2))
    with pytest.raises(
        TrainingDivergedError, match=r"step \d+ of epoch 0, where the learning rate is 1e\+06"
    ):
        train(some_set(), recipe, seed=0, start=model)


class Bursting(nn.Module):
    """Its very last update makes a parameter infinite, which no loss shows any more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(144, 2)
        self.burst = nn.Parameter(torch.zeros(1))
        self.burst.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images.flatten(1)) + 0 * self.burst


def test_the_last_update_is_looked_at_too() -> None:
    with pytest.raises(TrainingDivergedError, match="step 0 of epoch 0"):
        train(some_set(), replace(RECIPE, batch_size=50), seed=0, start=_rehooked())


def _rehooked() -> nn.Module:
    class Fresh(Bursting):
        def __deepcopy__(self, memo: dict) -> nn.Module:
            return Fresh()  # copying a parameter drops its hooks

    return Fresh()


def test_the_users_model_is_copied_and_frozen_parameters_stay() -> None:
    model = build("resnet9", num_classes=2, in_channels=1, width=2, seed=0)
    model.stage1.requires_grad_(False)
    before = copy.deepcopy(model)
    trained = train(some_set(), RECIPE, seed=0, start=model)
    assert same(model, before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert same(trained.model.stage1, model.stage1)  # with the statistics of its batch norm
    assert not torch.equal(trained.model.stage2.convolution.weight, model.stage2.convolution.weight)
    assert trained.own_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_network_of_another_precision_is_trained_as_one_of_float32(dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
    single, other = (
        train(some_set(), RECIPE, seed=0, start=start).model
        for start in (copy.deepcopy(model).float(), model)
    )
    for name, weight in model.named_parameters():
        expected, found = (
            (after.get_parameter(name).detach() - weight).flatten().double() for after in (single, other)
        )
        assert found.dot(expected) > 0.95 * found.norm() * expected.norm() > 0
        assert 0.9 < found.norm() / expected.norm() < 1.1


@pytest.mark.parametrize("n", [2, 16, 17, 33])
def test_sets_around_the_batch_size(n: int) -> None:
    trained = train(some_set(n), replace(RECIPE, epochs=1), seed=0)
    assert trained.history[0].examples == n


def test_one_example_is_enough_without_batch_norm() -> None:
    recipe = replace(RECIPE, model="convnet", width=2)
    assert train(some_set(1), recipe, seed=0).history[-1].examples == 1


def test_one_example_that_batch_norm_cannot_take_is_a_clear_error() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 2))
    with pytest.raises(InputError, match="batch norm needs more than one example"):
        train(some_set(1), RECIPE, seed=0, start=model)


def test_what_cannot_be_trained_on() -> None:
    with pytest.raises(InputError, match="test set: is empty"):
        train(some_set(0), RECIPE, seed=0)
    with pytest.raises(InputError, match="no included example"):
        train(some_set(), RECIPE, seed=0, include=torch.zeros(50, dtype=torch.bool))
    with pytest.raises(InputError, match=r"include: expected a bool tensor of shape \[50\]"):
        train(some_set(), RECIPE, seed=0, include=torch.arange(50))
    three = replace(some_set(), class_names=("a", "b", "c"))
    with pytest.raises(InputError, match=r"logits of shape \(16, 2\); expected \[16, 3\]"):
        train(three, RECIPE, seed=0, start=nn.Sequential(nn.Flatten(), nn.Linear(144, 2)))
    with pytest.raises(InputError, match="has no parameters"):
        train(some_set(), RECIPE, seed=0, start=nn.Flatten())
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(144, 2)).requires_grad_(False)
    with pytest.raises(InputError, match="every parameter is frozen"):
        train(some_set(), RECIPE, seed=0, start=frozen)


class Greedy(nn.Module):
    """Fails for more images at a time than fit."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.fits, self.scale = fits, nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images.flatten(1)[:, :2] * self.scale


def test_out_of_memory_proposes_a_batch_size() -> None:
    with pytest.raises(InsufficientMemoryError, match="batch_size 16; batch_size 8 would probably fit"):
        train(some_set(), RECIPE, seed=0, start=Greedy(fits=9))


def test_a_network_for_which_two_images_do_not_fit_is_refused() -> None:
    with pytest.raises(InsufficientMemoryError, match="two images do not fit"):
        train(some_set(), RECIPE, seed=0, start=Greedy(fits=1))


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    trained = train(some_set(), RECIPE, seed=0)
    trained.save(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "model.safetensors",
        "trained.json",
    ]
    loaded = Trained.load(tmp_path / "model")
    assert same(trained.model, loaded.model)
    assert torch.equal(predict(trained.model, some_set().images), predict(loaded.model, some_set().images))
    for field in (
        "recipe",
        "seed",
        "class_names",
        "image_shape",
        "training_fingerprint",
        "history",
        "seconds",
    ):
        assert getattr(loaded, field) == getattr(trained, field)


def test_loading_what_is_not_there_not_whole_or_another(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        Trained.load(tmp_path / "nothing")
    train(some_set(), RECIPE, seed=0).save(tmp_path / "m")
    with pytest.raises(MismatchError, match="do not fit"):
        Trained.load(tmp_path / "m", model=nn.Linear(2, 2))
    description = json.loads((tmp_path / "m" / "trained.json").read_text())
    del description["seed"]
    (tmp_path / "m" / "trained.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"not as Trained.save writes it \(KeyError: 'seed'\)"):
        Trained.load(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"model.safetensors: cannot be read"):
        Trained.load(tmp_path / "m")


@pytest.mark.parametrize("with_recipe", [True, False])
def test_a_network_of_the_callers_own_is_loaded_into_a_fresh_one(tmp_path: Path, with_recipe: bool) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 2))

    trained = train(some_set(), RECIPE, seed=np.int64(0), start=factory())  # type: ignore[arg-type]
    if not with_recipe:
        trained = replace(trained, recipe=None)
    trained.save(tmp_path / "m")
    with pytest.raises(InputError, match="network of your own"):
        Trained.load(tmp_path / "m")
    loaded = Trained.load(tmp_path / "m", model=factory())
    assert same(loaded.model, trained.model)
    assert (loaded.recipe, loaded.own_model, loaded.seed) == (RECIPE if with_recipe else None, True, 0)


def test_a_model_without_recipe_that_is_nobodys_own_cannot_be_built(tmp_path: Path) -> None:
    replace(train(some_set(), RECIPE, seed=0), recipe=None).save(tmp_path / "m")
    with pytest.raises(InputError, match="has no recipe to build the network from"):
        Trained.load(tmp_path / "m")


def test_norms_and_biases_are_decayed_only_when_asked() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 2))
    black = TrainingSet(torch.zeros(8, 1, 12, 12, dtype=torch.uint8), torch.arange(8) % 2, ("a", "b"))
    with torch.no_grad():
        model[1].weight.fill_(1)
        model[1].bias.fill_(1)
    # Black images and balanced labels give no gradient at all: only decay moves the parameters.
    recipe = Recipe(epochs=1, batch_size=8, learning_rate=0.1, weight_decay=0.5, decay_norm_and_bias=False)
    kept = train(black, recipe, seed=0, start=model).model
    assert torch.allclose(kept[1].weight, torch.full((2, 144), 1 - 0.1 * 0.5 * 1.9))
    assert torch.equal(kept[1].bias, torch.ones(2))
    decayed = train(black, replace(recipe, decay_norm_and_bias=True), seed=0, start=model).model
    assert torch.allclose(decayed[1].bias, torch.full((2,), 1 - 0.1 * 0.5 * 1.9))


def test_one_step_is_that_of_plain_torch() -> None:
    training_set, model = some_set(8), nn.Sequential(nn.Flatten(), nn.Linear(144, 2))
    recipe = Recipe(epochs=2, batch_size=8, learning_rate=0.1, schedule="cosine", label_smoothing=0.1)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate_at(epoch + 0.5)
        logits = plain(training_set.images.float() / 255)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, training_set.labels, label_smoothing=0.1).backward()
        optimizer.step()
    trained = train(training_set, recipe, seed=0, start=model).model
    assert torch.allclose(trained[1].weight, plain[1].weight, atol=1e-6)


def test_the_fast_recipe_runs_small_and_fits_its_whitening() -> None:
    recipe = Recipe.preset("fast", width=4, epochs=2, warmup_epochs=1, batch_size=32, learning_rate=0.05)
    trained = train(some_set(64, channels=3, size=16), recipe, seed=0)
    filters = trained.model.get_buffer("network.whitening.filters")
    assert not torch.equal(filters[:12].flatten(1), torch.eye(12))
    assert trained.history[-1].loss < trained.history[0].loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_repeats_and_leaves_its_generator_alone() -> None:
    before = torch.cuda.get_rng_state()
    recipe = replace(RECIPE, precision="bfloat16")
    first, again = (train(some_set(), recipe, seed=0, device="cuda").model for _ in range(2))
    assert same(first, again)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_predictions_of_nothing() -> None:
    model = build("resnet9", num_classes=3, width=2, seed=0)
    assert predict(model, torch.zeros(0, 3, 16, 16, dtype=torch.uint8)).shape == (0, 3)
    assert accuracy(model, some_set(0)).trials == 0
