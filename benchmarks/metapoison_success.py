"""How often MetaPoison succeeds, against its budget, in pieces that can be stopped and taken up again.

    python -m benchmarks.metapoison_success --out DIR --data sample
    python -m benchmarks.metapoison_success --out DIR --data 'DIR/cifar10-train-*.parquet' --test FILE \\
        --rows 10000 11000 --pretraining-rows 0 10000 --recipe '{"width": 16, "epochs": 10}'

The paper's own setting, on a GPU (a preset of the paper brings its recipe and all options but `--stack`):

    python -m benchmarks.metapoison_success --out DIR --data 'DIR/cifar10-train-*.parquet' --test FILE \\
        --preset published --budgets 0.01 0.1 --victims 8 --together 10 --stack 24 --device cuda

What is done, each piece once, its result a line of DIR/pieces.jsonl and its artefacts beside it:

1. `--choosing` clean networks, with seeds of their own, say which test images of the source class are right;
   the first `--targets` that all of them get right are the targets. The choice sees no poison;
2. clean victims, with the seeds of the poisoned ones: the control;
3. poisons for every attack, budget and target. MetaPoison crafts `--together` targets on one ensemble (on a
   poisoned trajectory each on its own) and goes on after the last craft step that was done; other attacks
   craft on choosing networks, under the same eps, and on the one victims start from, if there is one;
4. victims, each with its own seed, for every poison, architecture and seed. A hit is the target predicted as
   the adversary wants, on the poison as loaded from disk, with the victim in evaluation mode.

`--goal` chooses what is wanted: "targeted" (poisons of the target class), "third-class" (poisons of
`--third`) or "self-concealment" (poisons of the source class). With `--pretraining-rows`, victims and
surrogates start from one network that was trained on those examples, and the surrogates know it; victims of
another architecture start from their own. `--minutes` ends the run after the piece or the craft step at hand,
and `--summary` only prints what there is: success by attack, budget and victim with Wilson intervals, beside
the control, and by how much MetaPoison is ahead of each other attack on the same targets and seeds, with an
interval over targets. `--write LABEL` keeps it as benchmarks/results/metapoison_success_LABEL.json.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student_t  # type: ignore[import-untyped]
from torch import nn

from unpoison import attacks, data, training
from unpoison._statistics import Proportion
from unpoison.attacks import Attack, MetaPoison
from unpoison.attacks import get as get_attack
from unpoison.attacks.metapoison import PRESETS, CraftStep
from unpoison.data import TrainingSet
from unpoison.threats import (
    Budget,
    ColorGrid,
    Goal,
    LInf,
    PoisonSet,
    SelfConcealment,
    TargetedMisclassification,
)
from unpoison.training import Recipe

RESULTS = Path(__file__).parent / "results"
CHOOSING_SEED, PRETRAINING_SEED = 1000, 2000
# The paper's recipe, five times shorter, with its warm-up and its two drops.
FROM_SCRATCH = Recipe(
    model="convnet-bn",
    epochs=40,
    batch_size=125,
    learning_rate=0.1,
    momentum=0,
    nesterov=False,
    weight_decay=0,
    schedule="multistep",
    milestones=(20, 30),
    warmup_epochs=2,
)
# That of recipes/matching-cifar10.toml, for a network that has seen other examples.
PRETRAINING = Recipe(
    model="convnet-bn",
    epochs=8,
    learning_rate=0.1,
    warmup_epochs=2,
    schedule="one-cycle",
    flip=True,
    crop_padding=4,
)
FINE_TUNING = Recipe(
    model="convnet-bn", epochs=12, batch_size=64, learning_rate=0.02, schedule="one-cycle", warmup_epochs=1
)


def say(text: str) -> None:
    """A line of progress for people, apart from the result."""
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


class Pieces:
    """What has been done, one JSON object a line; a line cut short by a kill is not counted."""

    def __init__(self, path: Path, minutes: float | None) -> None:
        self.path = path
        self.ends = None if minutes is None else time.monotonic() + 60 * minutes
        self.done: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    piece = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self.done[piece["key"]] = piece

    def add(self, key: str, piece: dict[str, Any]) -> dict[str, Any]:
        """Store a piece, and end the run where its time is over."""
        piece = {"key": key, **piece}
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * (file.tell() > 0 and not self._whole()) + json.dumps(piece) + "\n")
        self.done[key] = piece
        told = {name: value for name, value in piece.items() if name != "key" and not isinstance(value, dict)}
        say(f"{key}: {told}")
        self.end_in_time()
        return piece

    def end_in_time(self) -> None:
        """End the run where its time is over."""
        if self.ends is not None and time.monotonic() > self.ends:
            raise SystemExit("the minutes are over; the same command goes on from here")

    def _whole(self) -> bool:
        return self.path.read_bytes().endswith(b"\n")


def rows_of(train: TrainingSet, rows: Sequence[int]) -> TrainingSet:
    """The examples from the first of `rows` up to the second."""
    return train.subset(torch.arange(rows[0], min(rows[1], len(train))))


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with some fields changed."""
    return Recipe.from_dict({**recipe.to_dict(), **changes})


class Study:
    """The pieces in their order."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        splits = data.load(options.data, test=options.test)
        assert splits.test is not None
        train, self.test = splits.train, splits.test
        if options.test_rows:
            self.test = rows_of(self.test, options.test_rows)
        self.earlier = rows_of(train, options.pretraining_rows) if options.pretraining_rows else None
        train = rows_of(train, options.rows) if options.rows else train
        if options.images is not None and options.images < len(train):
            # As the public code: the first of each class, as many of each.
            each = options.images // train.num_classes
            first = [
                (train.labels == label).nonzero().squeeze(1)[:each] for label in range(train.num_classes)
            ]
            train = train.subset(torch.cat(first).sort().values)
        self.clean = train.to(options.device)
        self.published = options.preset not in ("small", "sample")
        if self.published:
            recipe = attacks.get("metapoison", preset=options.preset).recipe
        elif options.data == "sample":
            recipe = Recipe.preset("sample")
        else:
            recipe = FINE_TUNING if self.earlier else FROM_SCRATCH
        self.recipe = changed(recipe, json.loads(options.recipe))
        self.out = Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.keep_to_the_same_study()
        self.pieces = Pieces(self.out / "pieces.jsonl", options.minutes)

    def keep_to_the_same_study(self) -> None:
        """End where the directory belongs to a study with other options; only how much of it may grow.

        What MetaPoison crafts with counts whole, so that a default that has changed since is not passed over.
        """
        free = {
            *("out", "minutes", "summary", "write", "threads", "device", "stack"),
            *("budgets", "attacks", "victims", "models", "targets"),
        }
        fixed = {name: value for name, value in vars(self.options).items() if name not in free}
        metapoison = self.attack("metapoison").configuration()
        del metapoison["together"]  # --stack
        fixed = json.loads(json.dumps(fixed | {"metapoison": metapoison}))
        path = self.out / "study.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name in fixed if found.get(name) != fixed[name]]
            if differing:
                raise SystemExit(f"{path}: another study, with another {', '.join(differing)}")
        path.write_text(json.dumps(fixed, indent=2) + "\n", encoding="utf-8")

    @functools.cache  # noqa: B019  (one study a process)
    def start(self, model: str, width: int | None) -> nn.Module | None:
        """The network that everybody fine-tunes, trained on the earlier rows; None from scratch."""
        if self.earlier is None:
            return None
        recipe = changed(PRETRAINING, {"model": model, "width": width})
        recipe = changed(recipe, json.loads(self.options.pretraining))
        where = self.out / "pretrained" / f"{model}-{width}"
        return training.train(
            self.earlier.to(self.options.device), recipe, seed=PRETRAINING_SEED, checkpoints=where
        ).model

    def victim(self, train: TrainingSet, seed: int, model: str | None = None) -> tuple[nn.Module, float]:
        """A network trained on `train`, and the seconds it took."""
        recipe = self.recipe
        if model and model != "same":
            name, *changes = model.split(",")
            named = {key: json.loads(value) for key, value in (change.split("=", 1) for change in changes)}
            if name != "same":
                named = {"model": name, "width": None} | named
            recipe = changed(recipe, named)
        begin = self.start(recipe.model, recipe.width)
        start = time.perf_counter()
        trained = training.train(train, recipe, seed=seed, model=begin)
        return trained.model, time.perf_counter() - start

    def rights(self, key: str, seed: int, model: str | None = None) -> dict[str, Any]:
        """A clean network: its accuracy, and what it says of the test images of the source class."""
        if key in self.pieces.done:
            return self.pieces.done[key]
        network, seconds = self.victim(self.clean, seed, model)
        candidates = (self.test.labels == self.options.source).nonzero().squeeze(1)
        predicted = training.predict(network, self.test.images[candidates]).argmax(1)
        return self.pieces.add(
            key,
            {
                "accuracy": training.accuracy(network, self.test).rate,
                "predicted": dict(zip(map(str, candidates.tolist()), predicted.tolist(), strict=True)),
                "seconds": round(seconds, 1),
            },
        )

    def targets(self) -> list[int]:
        """Places in the test set that all choosing networks get right."""
        told = [
            self.rights(f"choosing/{number}", CHOOSING_SEED + number)["predicted"]
            for number in range(self.options.choosing)
        ]
        right = [
            int(place)
            for place in told[0]
            if all(predicted[place] == self.options.source for predicted in told)
        ]
        return right[: self.options.targets]

    def goal(self, target: int) -> Goal:
        """What is wanted of the test image at `target`."""
        if self.options.goal == "self-concealment":
            return SelfConcealment.of(self.test, target)
        return TargetedMisclassification.of(self.test, target, target=self.options.target)

    def attack(self, name: str) -> Attack:
        """The attack with the options of the command line."""
        options = self.options
        if name != "metapoison":
            return get_attack(name)(**({"eps": options.eps} | json.loads(options.others).get(name, {})))
        changes: dict[str, Any] = {
            "recipe": self.recipe,
            "lifetime": self.recipe.epochs,
            "surrogates": options.surrogates,
            "steps": options.steps,
            "concentrate": options.concentrate,
            "perturbation": ColorGrid() + LInf(options.eps) if options.color else LInf(options.eps),
            "together": options.stack,
            "drop_every": max(options.steps // 3, 1),
        }
        if self.published:
            changes = {"recipe": self.recipe, "together": options.stack}
        if self.earlier:
            changes |= {"start": "pretrained"}
        if options.goal == "third-class":
            changes |= {"poison_classes": (options.third,)}
        return attacks.get("metapoison", preset=options.preset, **(changes | json.loads(options.options)))

    def poison(self, name: str, budget: float, target: int) -> Path:
        """Where the poison for a target is kept."""
        return self.out / "poisons" / f"{name}-{budget:g}-{target}"

    def craft(self, name: str, budget: float, targets: list[int]) -> None:
        """Craft for those targets that have no poison yet; those added later share no ensemble with them."""
        attack, options = self.attack(name), self.options
        shared = isinstance(attack, MetaPoison) and attack.trajectory == "clean"
        size = options.together if shared else 1
        kind = f"craft/{name}/{budget:g}/"
        groups = [key.removeprefix(kind).split("+") for key in self.pieces.done if key.startswith(kind)]
        crafted = set(itertools.chain.from_iterable(groups))
        left = [target for target in targets if str(target) not in crafted]
        for place in range(0, len(left), size):
            group = left[place : place + size]
            first = targets.index(group[0])
            key = kind + "+".join(map(str, group))
            goals = [self.goal(target) for target in group]
            start = time.perf_counter()
            if isinstance(attack, MetaPoison):
                made = attack.craft_together(
                    goals,
                    self.clean,
                    budget=Budget(share=budget),
                    surrogate=self.start(self.recipe.model, self.recipe.width),
                    seed=first,
                    checkpoints=self.out / "crafting" / f"{name}-{budget:g}-{first}",
                    on_step=self.tell,
                )
            else:
                made = (
                    attack.craft(
                        goals[0],
                        self.clean,
                        budget=Budget(share=budget),
                        surrogate=self.surrogates(),
                        seed=first,
                    ),
                )
            for target, poison in zip(group, made, strict=True):
                poison.save(self.poison(name, budget, target))
            self.pieces.add(
                key,
                {
                    "seconds": round(time.perf_counter() - start, 1),
                    "linf": max(float(poison.linf.max()) for poison in made),
                    "poisons": len(made[0]),
                },
            )

    def tell(self, steps: Sequence[CraftStep]) -> None:
        """A line of progress, and the end where the time is over: the step is in its checkpoint."""
        say(
            f"step {steps[0].step}: losses {[round(step.loss, 2) for step in steps]}, "
            f"achieved {[round(step.achieved, 2) for step in steps]}"
        )
        self.pieces.end_in_time()

    @functools.cache  # noqa: B019  (one study a process)
    def surrogates(self) -> list[nn.Module]:
        """What attacks that need trained networks craft on: choosing networks, and where they start."""
        start = self.start(self.recipe.model, self.recipe.width)
        count = self.options.other_surrogates
        trained = [self.victim(self.clean, CHOOSING_SEED + number)[0] for number in range(count)]
        return trained if start is None else [start, *trained]

    def attacked(self, name: str, budget: float, target: int, model: str, seed: int) -> None:
        """One victim of one poison."""
        key = f"victim/{name}/{budget:g}/{target}/{model}/{seed}"
        if key in self.pieces.done:
            return
        poison = PoisonSet.load(self.poison(name, budget, target))
        network, seconds = self.victim(poison.apply(self.clean), seed, model)
        logits = training.predict(network, self.test.images[target : target + 1])
        self.pieces.add(
            key,
            {
                "hit": bool(poison.goal.achieved(logits.argmax(1))[0]),
                "predicted": int(logits.argmax(1)),
                "margin": float(poison.goal.margin(logits)[0]),
                "accuracy": training.accuracy(network, self.test).rate,
                "seconds": round(seconds, 1),
            },
        )

    def run(self) -> None:
        """All pieces."""
        options = self.options
        targets = self.targets()
        say(f"targets: {targets}")
        for model, seed in itertools.product(options.models, range(options.victims)):
            self.rights(f"control/{model}/{seed}", seed, model)
        for budget, name in itertools.product(options.budgets, options.attacks):
            self.craft(name, budget, targets)
            for target, model, seed in itertools.product(targets, options.models, range(options.victims)):
                self.attacked(name, budget, target, model, seed)

    def summary(self) -> dict[str, Any]:
        """Success by attack, budget and victim, beside what the control makes of the same targets."""
        groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
        controls: dict[str, dict[str, bool]] = {}
        for key, piece in self.pieces.done.items():
            kind, *names = key.split("/")
            if kind == "victim":
                name, budget, target, model, seed = names
                named = {**piece, "target": target, "seed": seed}
                groups.setdefault((name, float(budget), model), []).append(named)
                control = self.pieces.done.get(f"control/{model}/{seed}")
                if control is not None:
                    said = torch.tensor([control["predicted"][target]])
                    hit = bool(self.goal(int(target)).achieved(said)[0])
                    controls.setdefault(model, {})[f"{seed}/{target}"] = hit
        rows = [
            {
                "attack": name,
                "budget": budget,
                "victim": model,
                "success": proportion(piece["hit"] for piece in pieces),
                "by_every_victim": proportion(
                    all(piece["hit"] for piece in pieces if piece["target"] == target)
                    for target in {piece["target"] for piece in pieces}
                ),
                "margin": statistics.fmean(piece["margin"] for piece in pieces),
                "accuracy": statistics.fmean(piece["accuracy"] for piece in pieces),
            }
            for (name, budget, model), pieces in sorted(groups.items())
        ]
        clean = [
            {
                "victim": model,
                "success": proportion(hits.values()),
                "accuracy": statistics.fmean(
                    piece["accuracy"]
                    for key, piece in self.pieces.done.items()
                    if key.startswith(f"control/{model}/")
                ),
            }
            for model, hits in controls.items()
        ]
        options, metapoison = vars(self.options), self.attack("metapoison")
        assert isinstance(metapoison, MetaPoison)
        return {
            "goal": options["goal"],
            "data": f"{Path(self.clean.name).name}, {len(self.clean)} images",
            "rows": rows,
            "control": clean,
            "ahead": ahead(groups),
            "seconds": {
                kind: round(
                    sum(piece["seconds"] for key, piece in self.pieces.done.items() if key.startswith(kind))
                )
                for kind in ("choosing", "control", "craft/metapoison", "craft/", "victim")
            },
            "recipe": self.recipe.to_dict(),
            "metapoison": metapoison.configuration(),
            "command": command(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "device": options["device"],
            },
        }


def ahead(groups: Mapping[tuple[str, float, str], Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """By how much more victims fall to MetaPoison than to another attack, paired by target and seed.

    Victims of one target are not independent, targets are: the interval is Student's, over the targets' own
    differences, as a bootstrap of so few would be too narrow. It is left out for fewer than two targets and
    where all of them agree.
    """
    found = []
    for (name, budget, model), pieces in sorted(groups.items()):
        if name == "metapoison":
            continue
        hits = {(piece["target"], piece["seed"]): piece["hit"] for piece in pieces}
        by_target: dict[str, list[int]] = {}
        for piece in groups.get(("metapoison", budget, model), ()):
            place = piece["target"], piece["seed"]
            if place in hits:
                by_target.setdefault(piece["target"], []).append(piece["hit"] - hits[place])
        differences = [statistics.fmean(of_target) for of_target in by_target.values()]
        if not differences:
            continue
        middle, interval = statistics.fmean(differences), None
        if len(set(differences)) > 1:
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            half = float(student_t.ppf(0.975, len(differences) - 1)) * error
            interval = [max(middle - half, -1.0), min(middle + half, 1.0)]
        found.append(
            {
                "of": name,
                "budget": budget,
                "victim": model,
                "targets": len(differences),
                "difference": middle,
                "interval": interval,
            }
        )
    return found


def proportion(hits: Iterable[bool]) -> dict[str, Any]:
    """How many of the trials, with the interval."""
    hits = list(hits)
    return Proportion(sum(hits), len(hits)).to_dict()


def command() -> str:
    """The command line, without what only this machine knows."""
    words = [f"DIR/{Path(word).name}" if word.startswith("/") else word for word in sys.argv[1:]]
    left, skip = [], False
    for word in words:
        if skip or word == "--summary":
            skip = False
        elif word in ("--minutes", "--threads"):
            skip = True
        else:
            left.append(word)
    return f"python -m benchmarks.metapoison_success {shlex.join(left)}"


def parse(arguments: Sequence[str] | None = None, **defaults: Any) -> argparse.Namespace:
    """The command line, or `arguments`; other defaults for what they leave out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="the directory of the study")
    parser.add_argument("--data", default="sample")
    parser.add_argument("--test")
    parser.add_argument("--test-rows", type=int, nargs=2, help="test on these examples; all by default")
    parser.add_argument("--rows", type=int, nargs=2, help="train on these examples; all by default")
    parser.add_argument("--images", type=int, help="of these as many of each class; all by default")
    parser.add_argument("--pretraining-rows", type=int, nargs=2, help="fine-tune a network trained on these")
    parser.add_argument("--pretraining", default="{}", help="changes of its recipe, as JSON")
    parser.add_argument("--recipe", default="{}", help="changes of victims' and surrogates' recipe, as JSON")
    parser.add_argument("--goal", default="targeted", choices=["targeted", "third-class", "self-concealment"])
    parser.add_argument("--source", type=int, default=2, help="the targets' true class")
    parser.add_argument("--target", type=int, default=5, help="what they are to be taken for")
    parser.add_argument("--third", type=int, default=7, help="the class of the poisons of a third class")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--attacks", nargs="+", default=["metapoison"])
    parser.add_argument("--targets", type=int, default=10)
    parser.add_argument("--victims", type=int, default=2)
    parser.add_argument("--choosing", type=int, default=3)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["same"],
        help="victims: an architecture or `same`, and changes of its recipe after commas: "
        "same,weight_decay=2e-4",
    )
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--surrogates", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--concentrate", type=int, default=12)
    parser.add_argument("--eps", type=float, default=8)
    parser.add_argument("--color", action="store_true", help="add the colour grid")
    parser.add_argument("--options", default="{}", help="more options of MetaPoison, as JSON")
    parser.add_argument("--others", default="{}", help="options of the other attacks by name, as JSON")
    parser.add_argument("--other-surrogates", type=int, default=1, help="clean networks they craft on")
    parser.add_argument("--together", type=int, default=10, help="targets crafted on one ensemble")
    parser.add_argument("--stack", type=int, default=1, help="surrogates at once, for a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="end when they are over, with what is at hand done")
    parser.add_argument("--summary", action="store_true", help="only print what there is")
    parser.add_argument("--write", metavar="LABEL", help="keep the summary among the results under this name")
    parser.set_defaults(**defaults)
    return parser.parse_args(arguments)


def main() -> None:
    """Do what is left to do, and sum up."""
    options = parse()
    torch.set_num_threads(options.threads)
    study = Study(options)
    if not options.summary:
        study.run()
    summary = study.summary()
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"metapoison_success_{options.write}.json"
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
