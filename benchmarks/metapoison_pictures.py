"""The pictures of the MetaPoison paper, each a command that draws from what a craft or a study has stored.

    python -m benchmarks.metapoison_pictures loss POISON... --out loss.svg
    python -m benchmarks.metapoison_pictures poisons POISON --data D --out poisons.png [--count 10]
    python -m benchmarks.metapoison_pictures dynamics POISON --data D --out dynamics.svg [--seed 0]
    python -m benchmarks.metapoison_pictures budget SUMMARY.json... --out budget.svg

- loss: the adversarial loss of the ensemble against the craft step, its mean and the range over the
  surrogates, for each of several poison sets;
- poisons: some originals, the poisons, and five times their difference;
- dynamics: what a clean and a poisoned victim say of the target after each epoch: its logits for its true
  class and for the one it is to be taken for, and the largest of the others;
- budget: success against budget with Wilson intervals, from summaries of `benchmarks.metapoison_success`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, final

import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor, nn

mpl.use("Agg")

import matplotlib.pyplot as plt

from unpoison import data, training
from unpoison.data import TrainingSet
from unpoison.threats import PoisonSet, SelfConcealment, TargetedMisclassification
from unpoison.training import Recipe


def draw_loss(options: argparse.Namespace) -> None:
    """The ensemble's losses against the craft step."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for directory in options.poisons:
        history = PoisonSet.load(directory).configuration["history"]
        steps = [step["step"] for step in history]
        losses = np.array([step["losses"] for step in history])
        (line,) = axes.plot(steps, losses.mean(1), marker=".", label=Path(directory).name)
        axes.fill_between(steps, losses.min(1), losses.max(1), alpha=0.2, color=line.get_color(), linewidth=0)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="craft step", ylabel="adversarial loss")
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)
    figure.savefig(options.out)


def draw_poisons(options: argparse.Namespace) -> None:
    """Originals, poisons and what lies between them."""
    poison = PoisonSet.load(options.poison)
    clean = _clean(options, poison)
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
    clean = _clean(options, poison)
    goal = poison.goal
    if not isinstance(goal, TargetedMisclassification | SelfConcealment):
        raise SystemExit(f"{options.poison}: its goal {goal.kind!r} has no target images")
    recipe = Recipe.from_dict(poison.configuration["recipe"])
    if options.epochs:
        recipe = dataclasses.replace(recipe, epochs=options.epochs)
    figure, both = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axes, (name, train) in zip(
        both, {"clean": clean, "poisoned": poison.apply(clean)}.items(), strict=True
    ):
        logits: list[Tensor] = []
        trained = training.train(train, recipe, seed=options.seed, defense=Watch(goal.images, logits))
        logits.append(training.predict(trained.model, goal.images))
        mean = torch.stack(logits).mean(1)
        named = {clean.class_names[goal.true_label]: goal.true_label}
        if isinstance(goal, TargetedMisclassification):
            named[clean.class_names[goal.target]] = goal.target
        for label, place in named.items():
            axes.plot(mean[:, place], label=label)
        others = [place for place in range(mean.shape[1]) if place not in named.values()]
        if others:
            axes.plot(mean[:, others].amax(1), color="0.6", label="largest other")
        axes.set(title=f"{name} victim", xlabel="epochs", ylabel="the target's logits" * (name == "clean"))
    both[0].legend(frameon=False)
    figure.savefig(options.out)


def draw_budget(options: argparse.Namespace) -> None:
    """Success against budget."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for path in options.summaries:
        summary = json.loads(Path(path).read_text(encoding="utf-8"))
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in summary["rows"]:
            groups.setdefault((row["attack"], row["victim"]), []).append(row)
        for (attack, victim), rows in groups.items():
            rows = sorted(rows, key=lambda row: row["budget"])
            rates = np.array([row["success"]["rate"] for row in rows])
            bounds = np.array([row["success"]["interval"] for row in rows]).T
            axes.errorbar(
                [100 * row["budget"] for row in rows],
                100 * rates,
                100 * np.abs(bounds - rates),
                marker="o",
                capsize=3,
                label=f"{attack}, {victim} ({summary['goal']}, n = {rows[0]['success']['trials']})",
            )
        control = summary["control"]["success"]["rate"]
        if control is not None:
            axes.axhline(100 * control, color="0.6", linestyle=":")
    axes.set(xlabel="budget, % of the training set", ylabel="success, %", ylim=(-3, 103), xscale="log")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(options.out)


def _clean(options: argparse.Namespace, poison: PoisonSet) -> TrainingSet:
    """The set that the poison was crafted for; of `--images`, as the study takes them."""
    clean = data.load(options.data).train
    if options.images is not None and options.images < len(clean):
        each = options.images // clean.num_classes
        first = [(clean.labels == label).nonzero().squeeze(1)[:each] for label in range(clean.num_classes)]
        clean = clean.subset(torch.cat(first).sort().values)
    poison.apply(clean)  # refuses another set
    return clean


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
            verb.add_argument("summaries", nargs="+")
        else:
            verb.add_argument("poison")
            verb.add_argument("--data", default="sample")
            verb.add_argument("--images", type=int, help="the study's --images")
            verb.add_argument("--count", type=int, default=10)
            verb.add_argument("--epochs", type=int)
            verb.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Draw."""
    options = parse()
    options.work(options)


if __name__ == "__main__":
    main()
