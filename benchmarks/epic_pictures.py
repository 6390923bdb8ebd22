"""The pictures of the EPIC paper, drawn from poison sets and from trainings that are watched.

    python -m benchmarks.epic_pictures --poison POISON... --data SOURCE --recipe resnet18-40 --out DIR
    python -m benchmarks.epic_pictures --poison POISON... --recipe recipes/matching-cifar10.toml --out DIR
        [--start RUN] [--seeds 0 1] [--defenses epic:released-40-0.1 isolation] [--sizes 0.1 0.3 0.6]
        [--store SWEEP] [--pictures effective distance drops sizes dynamics]

For every poison set and seed a victim is trained undefended, one with each defense, and one with each subset
size. A recipe file brings its data, its recipe and the network that it fine-tunes, which is trained first
unless `--start` names it. Each picture is written as SVG and PNG, its numbers beside it as JSON:

- epic_effective: the share of poisons that are effective after each epoch. The paper calls those effective
  whose gradient comes close to the target's. Here a poison is effective when its logit gradient, softmax
  minus one-hot of the label it bears, is nearer to the target's adversarial gradient, which is softmax minus
  one-hot of the class that the adversary wants, than to the mean of the clean examples that bear the poison's
  label. Beside it how many of these clean examples pass the same test, and how often the target is taken for
  the wanted class: from then on its adversarial gradient lies amid that class, and the test tells nothing;
- epic_distance: median and quartiles of the distance of poisons and of clean examples of their class from the
  class's mean, and from the nearest other example of the class: who is alone there is who EPIC drops;
- epic_drops: the clean and the poisoned examples that each defense has dropped;
- epic_sizes: accuracy and attack success against EPIC's subset size; with `--store` from the trials of a
  sweep, without a training;
- epic_dynamics: the norm of the difference between the mean gradient of all examples and that of the kept
  ones, over all parameters, in eval mode; beside it the norm of the former, and a random drop of as many.

Schedules are the presets', stretched or shrunk to the recipe. Several runs are averaged (norms geometrically)
with their range; of the quartiles the averages are drawn. Cost: a training for each line; the gradients of
`dynamics` cost as much as another epoch each epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unpoison import data, defenses, training
from unpoison._statistics import Proportion
from unpoison.data import TrainingSet
from unpoison.defenses import EPIC, DroppingDefense, RandomDrop
from unpoison.evaluation import Experiment, Results, measure
from unpoison.models import preserved
from unpoison.threats import Backdoor, PoisonSet, TargetedMisclassification
from unpoison.training import Recipe, Trained

PICTURES = ("effective", "distance", "drops", "sizes", "dynamics")
DEFENSES = ("epic:released-40-0.1", "epic:released-40-0.3", "isolation", "feature-squeezing")
SIZES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
BATCH = 512
# Dark and dashed, light and solid: told apart in grey too.
POISONS = {"color": "#8b1a2b", "linestyle": "--", "marker": "o", "markersize": 4}
CLEAN = {"color": "#5b9bd5", "linestyle": "-", "marker": "s", "markersize": 3}
STYLES = (
    ("#8b1a2b", "--", "o"),
    ("#5b9bd5", "-", "s"),
    ("#e08e0b", "-.", "^"),
    ("#2f6b3a", ":", "D"),
    ("#777777", "-", "x"),
)

Numbers = dict[str, Any]


@final
@dataclasses.dataclass(frozen=True)
class Watch(training.Defense):
    """Leaves the dropping to another defense, and notes before each epoch what the pictures show.

    Arguments:
        inner: the defense; None drops nothing.
        poison: the truth.
        targets: UInt8[m c h w], what the adversary wants to be taken for `wanted`.
        wanted: that class.
        with_gradients: whether to take the gradients of all parameters, the dear part.
        notes: where the notes go, one an epoch.
    """

    inner: DroppingDefense | None
    poison: PoisonSet = dataclasses.field(repr=False)
    targets: Tensor = dataclasses.field(repr=False)
    wanted: int
    with_gradients: bool = False
    notes: list[Numbers] = dataclasses.field(default_factory=list, repr=False)

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        """What the defense makes of the set."""
        self.notes.clear()
        return training_set if self.inner is None else self.inner.begin(training_set, recipe, seed=seed)

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        """What the defense keeps."""
        kept = alive if self.inner is None else self.inner.keep(epoch, model, training_set, alive)
        self.note(model, training_set, kept)
        return kept

    def note(self, model: nn.Module, training_set: TrainingSet, kept: Tensor) -> None:
        """Look at the network as it is now."""
        gradients = logit_gradients(training.predict(model, training_set.images), training_set.labels)
        logits = training.predict(model, self.targets.to(training_set.device))
        pull = logit_gradients(logits, torch.full_like(logits[:, 0], self.wanted, dtype=torch.int64)).mean(0)
        truth = self.poison.membership(len(training_set)).to(training_set.device)
        self.notes.append(
            {
                **places(gradients, training_set.labels, truth, pull),
                "taken": 100 * float((logits.argmax(1) == self.wanted).double().mean()),
                "dropped": {
                    "poisons": percent(~kept[truth]),
                    "clean": percent(~kept[~truth]),
                },
                **(gradient_norms(model, training_set, kept) if self.with_gradients else {}),
            }
        )


def logit_gradients(logits: Tensor, labels: Tensor) -> Tensor:
    """Float64[n classes]: softmax minus one-hot."""
    return logits.double().softmax(1) - F.one_hot(labels, logits.shape[1])


def percent(mask: Tensor) -> float:
    """How much of a mask is set; 0 where there is nothing."""
    return 100 * float(mask.double().mean()) if len(mask) else 0.0


def places(gradients: Tensor, labels: Tensor, truth: Tensor, pull: Tensor) -> Numbers:
    """Where poisons and the clean examples of their classes lie in gradient space.

    Arguments:
        gradients: Float64[n classes].
        labels: Int64[n], as trained on.
        truth: Bool[n], the poisons.
        pull: Float64[classes], the target's adversarial gradient.

    Returns:
        Of both groups the percentage that is nearer to `pull` than to the mean of the clean examples of its
        class, and the quartiles of the distances to that mean and to the nearest other example of the class;
        and the median distance of `pull` from these means.
    """
    parts = []
    for label in labels[truth].unique().tolist():
        ours = labels == label
        points, poisoned = gradients[ours], truth[ours]
        if bool(poisoned.all()):
            continue  # nobody to compare with
        centre = points[~poisoned].mean(0)
        to_class = (points - centre).norm(dim=1)
        nearest = [
            # The nearest of all is the example itself.
            torch.cdist(block, points, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(2, 1).values
            for block in points.split(BATCH)
        ]
        target = (pull - centre).norm().expand(len(points))
        to_target = (points - pull).norm(dim=1)
        parts.append(torch.stack([to_class, torch.cat(nearest), to_target, target, poisoned.double()]))
    to_class, nearest, to_target, target, poisoned = torch.cat(parts, 1)
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=gradients.device)
    numbers: Numbers = {"effective": {}, "to_class": {}, "to_nearest": {}}
    for group, mask in (("poisons", poisoned == 1), ("clean", poisoned == 0)):
        numbers["effective"][group] = percent((to_target < to_class)[mask])
        numbers["to_class"][group] = torch.quantile(to_class[mask], quarters).tolist()
        numbers["to_nearest"][group] = torch.quantile(nearest[mask], quarters).tolist()
    return {**numbers, "target_to_class": float(target[poisoned == 1].median())}


def gradient_norms(model: nn.Module, training_set: TrainingSet, kept: Tensor) -> Numbers:
    """The norm of the mean gradient of all examples, and of its difference from that of the kept ones."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = []
    with preserved(model):
        for mask in (kept, ~kept):
            total = torch.zeros(sum(map(torch.numel, parameters)), device=training_set.device)
            for indices in mask.nonzero().squeeze(1).split(BATCH):
                if len(indices):
                    images = training_set.images.index_select(0, indices).float().div_(255)
                    labels = training_set.labels.index_select(0, indices)
                    loss = F.cross_entropy(model(images), labels, reduction="sum")
                    found = torch.autograd.grad(loss, parameters)
                    total += torch.cat([gradient.flatten() for gradient in found])
            sums.append(total)
    mean = (sums[0] + sums[1]) / len(kept)
    return {
        "gradient": float(mean.norm()),
        "difference": float((mean - sums[0] / max(int(kept.sum()), 1)).norm()),
    }


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained on what, and what becomes of it.

    Arguments:
        clean: the training set before the poison.
        test: clean test images.
        recipe: of the victims.
        start: the network that they fine-tune; None is from scratch.
    """

    clean: TrainingSet
    test: TrainingSet
    recipe: Recipe
    start: nn.Module | None = None

    def watched(
        self, poison: PoisonSet, seed: int, defense: DroppingDefense | None, *, with_gradients: bool
    ) -> Numbers:
        """The notes of one training, one before each epoch and one at the end."""
        goal = poison.goal
        if not isinstance(goal, TargetedMisclassification | Backdoor):
            raise SystemExit(f"{poison.attack}: its goal {goal.kind!r} names no class to pull towards")
        watch = Watch(defense, poison, goal.victims(self.test)[0], goal.target, with_gradients)
        poisoned = poison.apply(self.clean)
        trained = training.train(poisoned, self.recipe, seed=seed, defense=watch, model=self.start)
        kept = torch.ones(len(poisoned), dtype=torch.bool, device=poisoned.device)
        kept[trained.dropped.to(poisoned.device)] = False
        watch.note(trained.model, poisoned, kept)
        return {
            "seed": seed,
            "goal": goal.to_json(),
            "notes": list(watch.notes),
            **self.measured(trained, poison),
        }

    def sized(self, poison: PoisonSet, seed: int, size: float) -> Numbers:
        """The accuracy and the attack success under EPIC with this subset size."""
        defense = EPIC.for_recipe(self.recipe, subset_size=size, seed=seed)
        poisoned = poison.apply(self.clean)
        trained = training.train(poisoned, self.recipe, seed=seed, defense=defense, model=self.start)
        return {"seed": seed, "subset_size": size, **self.measured(trained, poison)}

    def measured(self, trained: Trained, poison: PoisonSet) -> Numbers:
        """Counts of a victim on the test set and on what the adversary wants."""
        result = measure(trained, self.test, poison.goal)
        assert result.attack_success is not None
        return {
            "clean_correct": result.clean_accuracy.successes,
            "clean_total": result.clean_accuracy.trials,
            "attack_successes": result.attack_success.successes,
            "attack_total": result.attack_success.trials,
        }


def defense_for(recipe: Recipe, spec: str, seed: int) -> DroppingDefense:
    """A defense by name or name:preset, on the recipe's own schedule."""
    name, _, preset = spec.partition(":")
    if name == "epic":
        return EPIC.for_recipe(recipe, preset=preset or "released-40-0.1", seed=seed)
    # Those without a seed draw nothing.
    made = defenses.get(name, preset=preset or None, seed=seed)
    if not isinstance(made, DroppingDefense):
        raise SystemExit(f"--defenses: {name} drops no examples")
    return made


def of_store(store: str) -> list[Numbers]:
    """The trials of a sweep that are undefended or defended by EPIC, with their subset sizes."""
    results = Results.read(store)
    sizes: dict[str, float | None] = {}
    for choice in Experiment.from_dict(results.experiment).defenses:
        if choice.name == "epic":
            made = defenses.get("epic", preset=choice.preset, seed=0, **choice.options)
            assert isinstance(made, EPIC)
            sizes[choice.label] = made.subset_size
    counts = ("clean_correct", "clean_total", "attack_successes", "attack_total")
    trials = []
    for row in results.table.to_pylist():
        undefended = row["control"] == "no defense"
        if undefended or row["defense"] in sizes:
            size = None if undefended else sizes[row["defense"]]
            trials.append({"seed": row["seed"], "subset_size": size, **{name: row[name] for name in counts}})
    return trials


def draw_effective(runs: Sequence[Numbers]) -> tuple[Figure, Numbers]:
    """The share of effective poisons by epoch."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    shown = {
        "poisons": over(runs, lambda note: note["effective"]["poisons"]),
        "clean": over(runs, lambda note: note["effective"]["clean"]),
        "taken": over(runs, lambda note: note["taken"]),
    }
    line(axes, shown["poisons"], label="poisons nearer to the target than to their class", **POISONS)
    line(axes, shown["clean"], label="clean examples of the class, likewise", **CLEAN)
    axes.plot(shown["taken"].mean(0), color="0.35", linestyle=":", label="targets taken for the wanted class")
    axes.set(xlabel="epochs trained", ylabel="share, %", ylim=(-3, 103))
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, fontsize="small")
    return figure, {name: values.tolist() for name, values in shown.items()}


def draw_distance(runs: Sequence[Numbers]) -> tuple[Figure, Numbers]:
    """How far poisons and clean examples of their class lie from it."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    numbers: Numbers = {}
    for axes, (kind, title) in zip(
        both,
        {"to_class": "from the mean of the class", "to_nearest": "from the nearest of the class"}.items(),
        strict=True,
    ):
        for group, style, hatch in (("clean", CLEAN, None), ("poisons", POISONS, "////")):
            found = over(runs, lambda note, kind=kind, group=group: note[kind][group])
            low, middle, high = found.mean(0).clip(1e-6).T
            label = f"{group} (median, quartiles)" if group == "poisons" else "clean, of their class"
            axes.plot(middle, label=label, **style)
            axes.fill_between(
                range(len(middle)),
                low,
                high,
                facecolor=(style["color"], 0.25 if hatch is None else 0.05),
                edgecolor=(style["color"], 0.35),
                hatch=hatch,
                linewidth=0.6,
            )
            numbers.setdefault(kind, {})[group] = found.tolist()
        axes.set(title=title, xlabel="epochs trained", yscale="log")
        axes.locator_params(axis="x", integer=True)
    target = over(runs, lambda note: note["target_to_class"])
    numbers["target_to_class"] = target.tolist()
    both[0].plot(target.mean(0), color="0.35", linestyle=":", label="the target's adversarial gradient")
    both[0].set_ylabel("distance of logit gradients")
    both[0].legend(frameon=False, fontsize="small")
    return figure, numbers


def draw_drops(defended: Mapping[str, Sequence[Numbers]]) -> tuple[Figure, Numbers]:
    """What each defense has dropped by epoch."""
    count = len(defended)
    figure, grid = plt.subplots(
        1, count, figsize=(1.2 + 2.6 * count, 3), sharey=True, squeeze=False, layout="constrained"
    )
    numbers: Numbers = {}
    for axes, (name, runs) in zip(grid[0], defended.items(), strict=True):
        for group, style in (("clean", CLEAN), ("poisons", POISONS)):
            # What is kept from an epoch on is noted before it; the note at the end repeats the last.
            found = over(runs, lambda note, group=group: note["dropped"][group])[:, :-1]
            line(axes, found, label=group, **style)
            numbers.setdefault(name, {})[group] = found.tolist()
        axes.set(title=name.replace(":", "\n"), xlabel="epoch")
        axes.title.set_fontsize("medium")
        axes.locator_params(axis="x", integer=True)
    grid[0, 0].set(ylabel="dropped, % of the group", ylim=(-2, None))
    grid[0, 0].legend(frameon=False)
    return figure, numbers


def draw_sizes(trials: Sequence[Numbers]) -> tuple[Figure, Numbers]:
    """Accuracy and attack success against the subset size."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    sizes = sorted({trial["subset_size"] for trial in trials if trial["subset_size"] is not None})
    rows: list[Numbers] = []
    for size in [None, *sizes]:
        ours = [trial for trial in trials if trial["subset_size"] == size]
        if not ours:
            continue
        accuracies = [trial["clean_correct"] / trial["clean_total"] for trial in ours]
        hits = sum(trial["attack_successes"] for trial in ours)
        success = Proportion(hits, sum(trial["attack_total"] for trial in ours)).to_dict()
        rows.append(
            {
                "subset_size": size,
                "runs": len(ours),
                "accuracy": {"mean": float(np.mean(accuracies)), "each": accuracies},
                "success": success,
            }
        )
    points = [row for row in rows if row["subset_size"] is not None]
    accuracy = 100 * np.array([row["accuracy"]["mean"] for row in points])
    each = [row["accuracy"]["each"] for row in points]
    spread = 100 * np.array([[min(found), max(found)] for found in each]).T
    rates = 100 * np.array([row["success"]["rate"] for row in points])
    bounds = 100 * np.array([row["success"]["interval"] for row in points]).T
    both[0].errorbar(sizes, accuracy, abs(spread - accuracy), capsize=3, **CLEAN)
    both[1].errorbar(sizes, rates, abs(bounds - rates), capsize=3, **POISONS)
    for row in rows:
        if row["subset_size"] is None:
            for axes, value in ((both[0], row["accuracy"]["mean"]), (both[1], row["success"]["rate"])):
                axes.axhline(100 * value, color="0.35", linestyle=":", label="undefended")
    trials_each = [row["success"]["trials"] for row in points]
    said = " to ".join(str(number) for number in sorted({min(trials_each), max(trials_each)}))
    both[0].set(xlabel="EPIC's subset size", ylabel="accuracy, % (mean, range)", xlim=(0, None))
    both[1].set(
        xlabel="EPIC's subset size",
        ylabel=f"attack success, % (95 % interval, n = {said})",
        xlim=(0, None),
        ylim=(-3, 103),
    )
    both[0].legend(frameon=False)
    return figure, {"rows": rows}


def draw_dynamics(defended: Mapping[str, Sequence[Numbers]]) -> tuple[Figure, Numbers]:
    """How far the drop turns the gradient."""
    figure, axes = plt.subplots(figsize=(6, 4.6), layout="constrained")
    numbers: Numbers = {}
    for (name, runs), (color, style, marker) in zip(defended.items(), itertools.cycle(STYLES), strict=False):
        gradient = over(runs, lambda note: note["gradient"])[:, :-1]
        difference = over(runs, lambda note: note["difference"])[:, :-1]
        numbers[name] = {"gradient": gradient.tolist(), "difference": difference.tolist()}
        if not numbers.get("drawn"):
            axes.plot(geometric(gradient), color="0.35", linewidth=0.8, label=f"all examples (under {name})")
            numbers["drawn"] = name
        axes.plot(
            geometric(difference),
            color=color,
            linestyle=style,
            marker=marker,
            markersize=4,
            label=f"all less kept, {name}",
        )
    axes.set(xlabel="epoch", ylabel="norm of the mean gradient", yscale="log")
    axes.locator_params(axis="x", integer=True)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize="small")
    return figure, numbers


def over(runs: Sequence[Numbers], choose: Callable[[Numbers], Any]) -> np.ndarray[Any, Any]:
    """Float[runs epochs ...]: one number, or several, of every note."""
    return np.array([[choose(note) for note in run["notes"]] for run in runs], dtype=float)


def line(axes: Axes, values: np.ndarray[Any, Any], **style: Any) -> None:
    """The mean over runs, and their range where there are several."""
    (drawn,) = axes.plot(values.mean(0), **style)
    if len(values) > 1:
        epochs, color = range(values.shape[1]), drawn.get_color()
        axes.fill_between(epochs, values.min(0), values.max(0), alpha=0.15, color=color, linewidth=0)


def geometric(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The geometric mean over runs; nothing where one of them is zero."""
    known = np.where(values > 0, values, np.nan)
    return np.asarray(np.exp(np.log(known).mean(0)))


def run(options: argparse.Namespace) -> None:
    """Train what the pictures need, and draw them."""
    torch.set_num_threads(options.threads)
    found = Runs([], {}, [])
    stored = None if options.store is None else of_store(options.store)
    about: Numbers = {"store": options.store}
    if options.poison:
        case = case_of(options)
        poisons = [loaded_poison(directory) for directory in options.poison]
        for poison, seed in itertools.product(poisons, options.seeds):
            add(found, case, poison, seed, options)
        about |= {
            "poisons": [
                {"attack": one.attack, "count": len(one), "goal": one.goal.to_json(), "seed": one.seed}
                for one in poisons
            ],
            "training_set": {"name": case.clean.name, "examples": len(case.clean)},
            "recipe": case.recipe.to_dict(),
            "fine_tuned": case.start is not None,
            "seeds": options.seeds,
        }
    trials = found.trials if stored is None else stored
    own = {spec: found.defended[spec] for spec in options.defenses if spec in found.defended}
    draw = {
        "effective": lambda: draw_effective(found.watched),
        "distance": lambda: draw_distance(found.watched),
        "drops": lambda: draw_drops(own),
        "sizes": lambda: draw_sizes(trials),
        "dynamics": lambda: draw_dynamics(found.defended),
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in options.pictures:
        figure, numbers = draw[name]()
        # Without dates and with names that do not change, equal numbers give equal files.
        with mpl.rc_context({"svg.hashsalt": name}):
            figure.savefig(out / f"epic_{name}.svg", metadata={"Date": None})
        figure.savefig(out / f"epic_{name}.png", dpi=options.dpi)
        plt.close(figure)
        record = json.dumps({**about, "numbers": numbers}, indent=1)
        (out / f"epic_{name}.json").write_text(record + "\n", encoding="utf-8")


@final
@dataclasses.dataclass(frozen=True)
class Runs:
    """What the trainings gave, one entry a poison set and seed.

    Arguments:
        watched: the undefended.
        defended: those with each defense.
        trials: counts by subset size, those of the undefended too.
    """

    watched: list[Numbers]
    defended: dict[str, list[Numbers]]
    trials: list[Numbers]


def add(runs: Runs, case: Case, poison: PoisonSet, seed: int, options: argparse.Namespace) -> None:
    """The trainings that the wanted pictures need for one poison set and seed."""
    pictures = set(options.pictures)
    sized = "sizes" in pictures and options.store is None
    dear = "dynamics" in pictures
    if pictures & {"effective", "distance"} or sized:
        undefended = told("undefended", case.watched(poison, seed, None, with_gradients=False))
        runs.watched.append(undefended)
        runs.trials.append({**undefended, "subset_size": None})
    if pictures & {"drops", "dynamics"}:
        first = None
        for spec in options.defenses:
            defense = defense_for(case.recipe, spec, seed)
            found = case.watched(poison, seed, defense, with_gradients=dear)
            runs.defended.setdefault(spec, []).append(told(spec, found))
            first = first or defense
        if first is not None and dear:
            name = f"random, as many as {options.defenses[0]}"
            control = RandomDrop.like(first, seed=seed)
            found = case.watched(poison, seed, control, with_gradients=True)
            runs.defended.setdefault(name, []).append(told(name, found))
    if sized:
        for size in options.sizes:
            runs.trials.append(told(f"subset size {size}", case.sized(poison, seed, size)))


def told(what: str, found: Numbers) -> Numbers:
    """The run itself, once a line about it is on the screen."""
    accuracy = found["clean_correct"] / found["clean_total"]
    success = f"{found['attack_successes']} of {found['attack_total']}"
    print(f"{what}, seed {found['seed']}: accuracy {accuracy:.3f}, success {success}", file=sys.stderr)
    return found


def loaded_poison(directory: str) -> PoisonSet:
    """A poison set, or the one in the artefact of a sweep."""
    inner = Path(directory) / "poison"
    return PoisonSet.load(inner if inner.is_dir() else directory)


def case_of(options: argparse.Namespace) -> Case:
    """The data, the recipe and the network to start from."""
    experiment = None
    if options.recipe.endswith(".toml"):
        experiment = Experiment.read(options.recipe)
        options.data = options.data or experiment.path(experiment.data.source)
        if options.test is None and experiment.data.test is not None:
            options.test = experiment.path(experiment.data.test)
        options.rows = options.rows or experiment.data.rows
        options.test_rows = options.test_rows or experiment.data.test_rows
    splits = data.load(options.data or "sample", test=options.test)
    if splits.test is None:
        raise SystemExit(f"{options.data}: has no test set to measure on; give --test")
    recipe = Recipe.preset(options.recipe) if experiment is None else experiment.recipe
    if options.epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=options.epochs)
    start = None
    if options.start is not None:
        inner = Path(options.start) / "model"
        start = Trained.load(inner if inner.is_dir() else options.start, device=options.device).model
    elif experiment is not None and (first := experiment.pretraining) is not None:
        place = options.data if first.source is None else experiment.path(first.source)
        before = cut(data.load(place).train, first.rows).to(options.device)
        start = training.train(before, experiment.pretraining_recipe(first), seed=first.seed).model
    return Case(
        clean=cut(splits.train, options.rows).to(options.device),
        test=cut(splits.test, options.test_rows).to(options.device),
        recipe=recipe,
        start=start,
    )


def cut(training_set: TrainingSet, rows: Sequence[int] | None) -> TrainingSet:
    """The rows from the first to before the last; all where there are none given."""
    return training_set if rows is None else training_set.subset(range(*rows))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--poison", nargs="+", default=[], help="poison sets, each a directory")
    parser.add_argument("--data", help="what they were crafted for, as `data.load` takes it")
    parser.add_argument("--rows", type=int, nargs=2, metavar=("FIRST", "END"))
    parser.add_argument("--test", help="the test set, where it is not in --data")
    parser.add_argument("--test-rows", type=int, nargs=2, metavar=("FIRST", "END"))
    parser.add_argument("--recipe", default="sample", help="a preset, or the TOML file of a sweep")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--start", help="a trained network that the victims fine-tune")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--defenses", nargs="+", default=list(DEFENSES), metavar="NAME[:PRESET]")
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--store", help="take the trials of `sizes` from this sweep")
    parser.add_argument("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--out", required=True)
    parser.add_argument("--dpi", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if not options.poison and (options.store is None or options.pictures != ["sizes"]):
        parser.error("--poison: needed by all pictures but `sizes` with --store")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw."""
    run(parse(arguments))


if __name__ == "__main__":
    main()
