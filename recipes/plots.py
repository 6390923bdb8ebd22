"""The pictures of the MetaPoison and EPIC papers, drawn from the store of a recipe.

    python -m recipes.plots NAME... --store STORE --recipe FILE --out DIR

Each is written as SVG and PNG, its numbers beside it as JSON. Several trials are averaged, with their range.

of any recipe with attacks:
    budget          attack success against the budget, with Wilson intervals, a line for each attack
of any recipe with detectors that give p-values:
    p_values        their distribution beside the uniform one
of MetaPoison (`recipes/studies/metapoison-*.toml`):
    losses          the adversarial loss of the surrogates against the craft step: mean and range
    poisons         some originals, the poisons, and five times their difference
    logits          the target's logits before each epoch of a clean and of a poisoned victim (probe "logits")
of EPIC (`recipes/studies/epic-pictures.toml`):
    effective       the share of poisons that are effective before each epoch (probe "gradients")
    distances       how far poisons and clean examples of their class lie from it (probe "gradients")
    drops           the clean and the poisoned examples that each defense has dropped (any probe)
    sizes           accuracy and attack success against EPIC's subset size
    norms           how far the drop turns the mean gradient (probe "norms")
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unpoison._artefacts import read_json
from unpoison.evaluation import Experiment, Line, Results, Store, leaderboard

# Dark and dashed, light and solid: they can be told apart in grey too.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#8b1a2b", "linestyle": "--", "marker": "o", "markersize": 4},
    {"color": "#5b9bd5", "linestyle": "-", "marker": "s", "markersize": 4},
    {"color": "#2f6b3a", "linestyle": ":", "marker": "D", "markersize": 4},
    {"color": "#e08e0b", "linestyle": "-.", "marker": "^", "markersize": 4},
    {"color": "#777777", "linestyle": "-", "marker": "x", "markersize": 4},
)
POISONS, CLEAN = STYLES[0], STYLES[1]
DOTTED = {"color": "0.35", "linestyle": ":"}
Numbers = dict[str, Any]


class Trials:
    """The lines of a recipe, and the artefacts of their trials."""

    def __init__(self, store: Path, recipe: Path) -> None:
        self.experiment = Experiment.read(recipe)
        self.results = Results.read(store, self.experiment.name)
        self.store = Store(self.results.store)
        self.lines = leaderboard(self.results)

    def under(self, control: str) -> Iterator[Line]:
        """The lines of a control."""
        return (line for line in self.lines if line.control == control)

    def defended(self) -> Iterator[Line]:
        """The lines of defenses."""
        return (line for line in self.lines if line.defense != "none")

    def artefact(self, row: Mapping[str, Any], name: str) -> Path:
        """The artefact of that name that a row was measured on."""
        return self.store.place(self.store.record(row["key"])["inputs"][name])

    def notes(self, line: Line, choose: Callable[[Any], Any], *, last: bool = True) -> np.ndarray[Any, Any]:
        """Float[trials epochs ...]: what probes noted, with or without the finished network."""
        noted = [read_json(self.artefact(row, "victim") / "probe.json")["epochs"] for row in line.rows]
        return np.array(
            [[choose(note) for note in (notes if last else notes[:-1])] for notes in noted], dtype=float
        )

    def poisons(self) -> dict[str, Path]:
        """The poison sets of the undefended victims, each once."""
        rows = [row for line in self.under("no defense") for row in line.rows]
        names = {
            f"{row['attack']}, {100 * row['budget']:g} %, {row['test_indices']}, seed {row['seed']}": row
            for row in rows
        }
        return {name: self.artefact(row, "poison") / "poison" for name, row in names.items()}


def budget(trials: Trials) -> tuple[Figure, Numbers]:
    """Attack success against the budget."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    groups: dict[str, list[Line]] = {}
    for line in trials.under("no defense"):
        named = line.attack if line.victim == "default" else f"{line.attack}; {line.victim}"
        groups.setdefault(named, []).append(line)
    numbers: Numbers = {}
    for place, (name, lines) in enumerate(groups.items()):
        budgets = np.array([line.budget for line in lines])
        rates = np.array([line.success.rate for line in lines])
        bounds = np.array([line.success.interval() for line in lines]).T
        axes.errorbar(
            100 * budgets * 1.02**place,  # beside each other
            100 * rates,
            100 * np.abs(bounds - rates),
            capsize=3,
            label=name,
            **STYLES[place % len(STYLES)],
        )
        numbers[name] = {"budget": budgets.tolist(), "success": rates.tolist()}
    for line in trials.under("no attack"):
        axes.axhline(100 * line.success.rate, color="0.6", linestyle=":")
    axes.set(xlabel="budget, % of the training set", ylabel="success, %", ylim=(-3, 103), xscale="log")
    figure.legend(frameon=False, fontsize="small", loc="outside upper center", ncols=2)
    return figure, numbers


def p_values(trials: Trials) -> tuple[Figure, Numbers]:
    """The distribution of p-values, which is uniform or above where there is no poison to find."""
    found: dict[str, list[float]] = {}
    for line in trials.lines:
        values = [row["p_value"] for row in line.rows if row["p_value"] is not None]
        if line.detector != "none" and not line.control and values:
            found.setdefault(line.detector, sorted(values))
    numbers: Numbers = {
        name: {
            "p_values": values,
            "at_most": {level: sum(one <= level for one in values) for level in (0.01, 0.05)},
        }
        for name, values in found.items()
    }
    return uniform(found), numbers


def uniform(found: Mapping[str, Sequence[float]]) -> Figure:
    """The distributions of these p-values, by name, beside the uniform one."""
    figure, axes = plt.subplots(figsize=(4.5, 4), layout="constrained")
    for (name, values), style in zip(found.items(), itertools.cycle(STYLES), strict=False):
        axes.step(
            sorted(values),
            np.arange(1, len(values) + 1) / len(values),
            label=name,
            **{**style, "marker": None},
        )
    axes.plot([0, 1], [0, 1], label="uniform", **DOTTED)
    finish(figure, axes, "p-value", "share of the observations").axes[0].locator_params(
        axis="x", integer=False
    )
    return figure


def losses(trials: Trials) -> tuple[Figure, Numbers]:
    """The surrogates' adversarial losses against the craft step."""
    from unpoison.threats import PoisonSet

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    numbers: Numbers = {}
    for (name, place), style in zip(trials.poisons().items(), itertools.cycle(STYLES), strict=False):
        history = PoisonSet.load(place).configuration.get("history", [])
        if history:
            found = np.array([step["losses"] for step in history]).T
            averaged(axes, found, label=name, **style)
            numbers[name] = found.tolist()
    axes.axhline(0, color="black", linewidth=0.5)
    return finish(figure, axes, "craft step", "adversarial loss"), numbers


def poisons(trials: Trials, count: int = 10) -> tuple[Figure, Numbers]:
    """Originals, poisons and their difference, of the first poison set."""
    from unpoison import data
    from unpoison.threats import PoisonSet

    poison = PoisonSet.load(next(iter(trials.poisons().values())))
    clean = data.load(trials.experiment.path(trials.experiment.data.source)).train
    first = (trials.experiment.data.rows or (0,))[0]
    before, after = clean.images[first + poison.indices[:count]].float(), poison.images[:count].float()
    rows = {"original": before, "poison": after, "5 x difference": (5 * (after - before) + 128).clamp(0, 255)}
    figure, grid = plt.subplots(
        3, len(before), figsize=(len(before), 3.4), squeeze=False, layout="constrained"
    )
    for axes_row, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(axes_row, images, strict=True):
            shown = image.permute(1, 2, 0).round().byte().numpy()
            axes.imshow(shown.squeeze(2) if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(name)
    return figure, {"indices": poison.indices[:count].tolist()}


def logits(trials: Trials) -> tuple[Figure, Numbers]:
    """The target's logits through a clean and a poisoned training, of the first trial."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    numbers: Numbers = {}
    for axes, control in zip(both, ("no attack", "no defense"), strict=True):
        line = next(trials.under(control))
        row, values = line.rows[0], trials.notes(line, lambda note: note["logits"])[0]
        names = row["class_names"]
        shown = [names.index(row[key]) for key in ("source", "target") if row[key] in names]
        for label, style in zip(shown, STYLES[1::-1], strict=False):
            axes.plot(values[:, label], label=names[label], **style)
        others = [label for label in range(values.shape[1]) if label not in shown]
        if others:
            axes.plot(values[:, others].max(1), color="0.5", linewidth=0.8, label="largest other")
        axes.set(title=control, xlabel="epochs", ylabel="the target's logits" * (control == "no attack"))
        numbers[control] = values.tolist()
    both[0].legend(frameon=False)
    return figure, numbers


def effective(trials: Trials) -> tuple[Figure, Numbers]:
    """The share of effective poisons by epoch, in undefended victims."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    line = next(trials.under("no defense"))
    shown = {
        group: trials.notes(line, lambda note, group=group: note["effective"][group])
        for group in ("poisons", "clean")
    }
    averaged(
        axes, 100 * shown["poisons"], label="poisons nearer to the target than to their class", **POISONS
    )
    averaged(axes, 100 * shown["clean"], label="clean examples of the class, likewise", **CLEAN)
    axes.set_ylim(-3, 103)
    numbers = {name: values.tolist() for name, values in shown.items()}
    return finish(figure, axes, "epochs trained", "share, %"), numbers


def distances(trials: Trials) -> tuple[Figure, Numbers]:
    """How far poisons and clean examples of their class lie from it, in undefended victims."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    line = next(trials.under("no defense"))
    numbers: Numbers = {}
    titles = {"to_class": "from the mean of the class", "to_nearest": "from the nearest of the class"}
    for axes, (kind, title) in zip(both, titles.items(), strict=True):
        for group, style in (("clean", CLEAN), ("poisons", POISONS)):
            found = trials.notes(line, lambda note, kind=kind, group=group: note[kind][group])
            low, middle, high = found.mean(0).clip(1e-6).T
            axes.plot(middle, label=f"{group} (median, quartiles)", **style)
            axes.fill_between(range(len(middle)), low, high, color=style["color"], alpha=0.2, linewidth=0)
            numbers.setdefault(kind, {})[group] = found.tolist()
        axes.set(title=title, xlabel="epochs trained", yscale="log")
    target = trials.notes(line, lambda note: note["target_to_class"])
    both[0].plot(target.mean(0), label="the target's adversarial gradient", **DOTTED)
    both[0].set_ylabel("distance of logit gradients")
    both[0].legend(frameon=False, fontsize="small")
    return figure, {**numbers, "target_to_class": target.tolist()}


def drops(trials: Trials) -> tuple[Figure, Numbers]:
    """The examples that each defense has dropped, by epoch."""
    lines = list(trials.defended())
    figure, grid = plt.subplots(
        1, len(lines), figsize=(1.2 + 2.4 * len(lines), 3), sharey=True, squeeze=False, layout="constrained"
    )
    numbers: Numbers = {}
    for axes, line in zip(grid[0], lines, strict=True):
        for group, style in (("clean", CLEAN), ("poisons", POISONS)):
            # The note before an epoch is of what is kept in it; the one at the end repeats the last.
            found = trials.notes(line, lambda note, group=group: note["dropped"][group], last=False)
            averaged(axes, 100 * found, label=group, **style)
            numbers.setdefault(line.defense, {})[group] = found.tolist()
        axes.set_title(line.defense.replace(" (", "\n("), fontsize="small", wrap=True)
        axes.set_xlabel("epoch")
    grid[0, 0].set(ylabel="dropped, % of the group", ylim=(-2, None))
    grid[0, 0].legend(frameon=False)
    return figure, numbers


def sizes(trials: Trials) -> tuple[Figure, Numbers]:
    """Accuracy and attack success against EPIC's subset size."""
    from unpoison import defenses

    known = {
        one.label: getattr(defenses.get("epic", preset=one.preset, **one.options), "subset_size", 0.0)
        for one in trials.experiment.defenses
        if one.name == "epic"
    }
    lines = [line for line in trials.defended() if line.defense in known]
    found = sorted(((known[line.defense], line) for line in lines), key=lambda one: one[0])
    figure, both = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    at = [size for size, _ in found]
    accuracy = 100 * np.array([line.clean_accuracy.mean for _, line in found])
    success = 100 * np.array([line.success.rate for _, line in found])
    bounds = 100 * np.array([line.success.interval() for _, line in found]).T
    both[0].plot(at, accuracy, **CLEAN)
    both[1].errorbar(at, success, abs(bounds - success), capsize=3, **POISONS)
    for line in trials.under("no defense"):
        both[0].axhline(100 * line.clean_accuracy.mean, label="undefended", **DOTTED)
        both[1].axhline(100 * line.success.rate, **DOTTED)
    both[0].set(xlabel="EPIC's subset size", ylabel="accuracy, %", xlim=(0, None))
    both[1].set(xlabel="EPIC's subset size", ylabel="attack success, %", xlim=(0, None), ylim=(-3, 103))
    both[0].legend(frameon=False)
    return figure, {"subset_size": at, "accuracy": accuracy.tolist(), "success": success.tolist()}


def norms(trials: Trials) -> tuple[Figure, Numbers]:
    """The norm of the mean gradient of all examples, and of its difference from that of the kept ones."""
    figure, axes = plt.subplots(figsize=(6, 4.6), layout="constrained")
    numbers: Numbers = {}
    for line, style in zip(trials.defended(), itertools.cycle(STYLES), strict=False):
        gradient = trials.notes(line, lambda note: note["gradient"], last=False)
        difference = trials.notes(line, lambda note: note["difference"], last=False)
        if not numbers:
            label = f"all examples (under {line.defense})"
            axes.plot(geometric(gradient), color="0.35", linewidth=0.8, label=label)
        axes.plot(geometric(difference), label=f"all less kept, {line.defense}", **style)
        numbers[line.defense] = {"gradient": gradient.tolist(), "difference": difference.tolist()}
    axes.set(xlabel="epoch", ylabel="norm of the mean gradient", yscale="log")
    figure.legend(loc="outside lower center", frameon=False, fontsize="small")
    return figure, numbers


def averaged(axes: Axes, values: np.ndarray[Any, Any], **style: Any) -> None:
    """The mean over the first dimension, and its range where there are several."""
    (drawn,) = axes.plot(values.mean(0), **style)
    if len(values) > 1:
        places, color = range(values.shape[1]), drawn.get_color()
        axes.fill_between(places, values.min(0), values.max(0), alpha=0.15, color=color, linewidth=0)


def geometric(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The geometric mean over trials; nothing where one of them is zero."""
    known = np.where(values > 0, values, np.nan)
    return np.asarray(np.exp(np.log(known).mean(0)))


def finish(figure: Figure, axes: Axes, across: str, up: str) -> Figure:
    """Name the axes."""
    axes.set(xlabel=across, ylabel=up)
    axes.locator_params(axis="x", integer=True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
    return figure


PLOTS: dict[str, Callable[[Trials], tuple[Figure, Numbers]]] = {
    draw.__name__: draw
    for draw in (budget, p_values, losses, poisons, logits, effective, distances, drops, sizes, norms)
}


def main(words: Sequence[str] | None = None) -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="+", choices=PLOTS, metavar="NAME")
    parser.add_argument("--store", type=Path, required=True, help="what `unpoison bench` wrote")
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe that it ran")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(words)
    trials = Trials(options.store, options.recipe)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        figure, numbers = PLOTS[name](trials)
        # Without dates and with names that do not change, equal numbers give equal files.
        with mpl.rc_context({"svg.hashsalt": name}):
            figure.savefig(options.out / f"{name}.svg", metadata={"Date": None})
        figure.savefig(options.out / f"{name}.png", dpi=150)
        plt.close(figure)
        record = {"recipe": trials.results.name, "numbers": numbers}
        (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
