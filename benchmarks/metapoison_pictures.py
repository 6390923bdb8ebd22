"""The pictures of the MetaPoison paper, each a command that draws from what a craft or a study has stored.

    python -m benchmarks.metapoison_pictures loss POISON... --out loss.svg
    python -m benchmarks.metapoison_pictures poisons POISON --study DIR --out poisons.svg [--count 10]
    python -m benchmarks.metapoison_pictures dynamics POISON --study DIR --out dynamics.svg [--seed 0]
    python -m benchmarks.metapoison_pictures budget LABEL... --out budget.svg

- loss: the adversarial loss of the ensemble against the craft step, its mean and the range over the
  surrogates, for each of several poison sets;
- poisons: some originals, the poisons, and five times their difference;
- dynamics: what a clean and a poisoned victim say of the target after each epoch: its logits for its true
  class and for the one it is to be taken for, and the largest of the others;
- budget: success against budget with Wilson intervals, of benchmarks/results/metapoison_success_LABEL.json.

A study's directory, as `benchmarks.metapoison_success --out DIR` leaves it, says which data the poison is
for, how victims are trained and where they start.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, final

import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor, nn

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmarks import metapoison_success
from unpoison import training
from unpoison.data import TrainingSet
from unpoison.threats import PoisonSet, SelfConcealment, TargetedMisclassification

# Dark and dashed, light and solid: told apart in grey too.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#8b1a2b", "linestyle": "--", "marker": "o"},
    {"color": "#5b9bd5", "linestyle": "-", "marker": "s"},
    {"color": "#2f6b3a", "linestyle": ":", "marker": "D"},
    {"color": "#e08e0b", "linestyle": "-.", "marker": "^"},
)


def draw_loss(options: argparse.Namespace) -> None:
    """The ensemble's losses against the craft step."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for directory, style in zip(options.poisons, itertools.cycle(STYLES), strict=False):
        history = PoisonSet.load(directory).configuration["history"]
        steps = [step["step"] for step in history]
        losses = np.array([step["losses"] for step in history])
        (line,) = axes.plot(steps, losses.mean(1), **style, markersize=4, label=Path(directory).name)
        axes.fill_between(steps, losses.min(1), losses.max(1), alpha=0.2, color=line.get_color(), linewidth=0)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="craft step", ylabel="adversarial loss")
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)
    figure.savefig(options.out)


def draw_poisons(options: argparse.Namespace) -> None:
    """Originals, poisons and what lies between them."""
    poison = PoisonSet.load(options.poison)
    study = _study(options)
    clean = study.clean
    count = min(options.count, len(poison))
    before = clean.images[poison.indices[:count]].float()
    after = poison.images[:count].float()
    rows = {"original": before, "poison": after, "5 x difference": (5 * (after - before) + 128).clamp(0, 255)}
    figure, grid = plt.subplots(3, count, figsize=(count, 3.4), squeeze=False, layout="constrained")
    for axes_row, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(axes_row, images, strict=True):
            shown = image.permute(1, 2, 0).round().byte().numpy()
            axes.imshow(shown.squeeze(2) if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(name)
    figure.savefig(options.out, dpi=150)


@final
@dataclasses.dataclass(frozen=True)
class Watch(training.Defense):
    """Defends nothing: notes what the network says of `images` before each epoch.

    Arguments:
        images: UInt8[m c h w].
        logits: where the notes go, Float[m classes] each.
    """

    images: Tensor = dataclasses.field(repr=False)
    logits: list[Tensor] = dataclasses.field(repr=False)

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        """All that are alive."""
        self.logits.append(training.predict(model, self.images))
        return alive


def draw_dynamics(options: argparse.Namespace) -> None:
    """The target's logits through a clean and a poisoned training."""
    poison = PoisonSet.load(options.poison)
    study = _study(options)
    clean, recipe = study.clean, study.recipe
    goal = poison.goal
    if not isinstance(goal, TargetedMisclassification | SelfConcealment):
        raise SystemExit(f"{options.poison}: its goal {goal.kind!r} has no target images")
    start = study.start(recipe.model, recipe.width)
    figure, both = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axes, (name, train) in zip(
        both, {"clean": clean, "poisoned": poison.apply(clean)}.items(), strict=True
    ):
        logits: list[Tensor] = []
        watch = Watch(goal.images, logits)
        trained = training.train(train, recipe, seed=options.seed, defense=watch, model=start)
        logits.append(training.predict(trained.model, goal.images))
        mean = torch.stack(logits).mean(1)
        named = {clean.class_names[goal.true_label]: goal.true_label}
        if isinstance(goal, TargetedMisclassification):
            named[clean.class_names[goal.target]] = goal.target
        for (label, place), style in zip(named.items(), STYLES[1::-1], strict=False):
            axes.plot(mean[:, place], **style, markersize=4, label=label)
        others = [place for place in range(mean.shape[1]) if place not in named.values()]
        if others:
            axes.plot(mean[:, others].amax(1), color="0.5", linewidth=0.8, label="largest other")
        axes.set(title=f"{name} victim", xlabel="epochs", ylabel="the target's logits" * (name == "clean"))
    both[0].legend(frameon=False)
    figure.savefig(options.out)


def draw_budget(options: argparse.Namespace) -> None:
    """Success against budget, of the victims whose training the adversary expects."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    budgets: set[float] = set()
    lines = 0
    for label in options.labels:
        path = metapoison_success.RESULTS / f"metapoison_success_{label}.json"
        study = json.loads(path.read_text(encoding="utf-8"))
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in study["rows"]:
            if row["victim"] == "same":
                groups.setdefault(row["attack"], []).append(row)
        for attack, rows in groups.items():
            rates = np.array([row["success"]["rate"] for row in rows])
            bounds = np.array([row["success"]["interval"] for row in rows]).T
            budgets |= {100 * row["budget"] for row in rows}
            lines += 1
            axes.errorbar(
                [100 * row["budget"] * 1.02**lines for row in rows],  # beside each other
                100 * rates,
                100 * np.abs(bounds - rates),
                **STYLES[(lines - 1) % len(STYLES)],
                capsize=3,
                label=f"{attack}{', ' + label if len(options.labels) > 1 else ''}",
            )
        for row in study["control"]:
            if row["victim"] == "same":
                axes.axhline(100 * row["success"]["rate"], color="0.6", linestyle=":")
    axes.set(xlabel="budget, % of the training set", ylabel="success, %", ylim=(-3, 103), xscale="log")
    axes.set_xticks(sorted(budgets), [f"{budget:g}" for budget in sorted(budgets)])
    axes.set_xticks([], minor=True)
    # Above the axes, where it crosses neither the control's line nor an interval.
    figure.legend(frameon=False, fontsize="small", loc="outside upper center", ncols=3)
    figure.savefig(options.out)


def _study(options: argparse.Namespace) -> metapoison_success.Study:
    """The study that lies in `--study`."""
    written = json.loads((Path(options.study) / "study.json").read_text(encoding="utf-8"))
    return metapoison_success.Study(metapoison_success.parse(["--out", options.study], **written))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    for name, work in (
        ("loss", draw_loss),
        ("poisons", draw_poisons),
        ("dynamics", draw_dynamics),
        ("budget", draw_budget),
    ):
        verb = verbs.add_parser(name)
        verb.set_defaults(work=work)
        verb.add_argument("--out", required=True)
        if name == "loss":
            verb.add_argument("poisons", nargs="+")
        elif name == "budget":
            verb.add_argument("labels", nargs="+")
        else:
            verb.add_argument("poison")
            verb.add_argument("--study", required=True, help="the directory of the study")
            verb.add_argument("--count", type=int, default=10)
            verb.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Draw."""
    options = parse()
    options.work(options)


if __name__ == "__main__":
    main()
