"""Feature collision, convex polytope and Bullseye against victims that train a new layer on given features.

    python -m benchmarks.transfer --data DIR --cifar100 DIR --out DIR --minutes M

The transfer scenario of the poisoning benchmark (Schwarzschild et al. 2021, arXiv 2006.12557): 25 poisons in
2,500 images of CIFAR-10, within 8/255, for one test image; a feature extractor trained on CIFAR-100 that
stays as it is; a new linear layer. The set-ups (target image, intended class, 25 bases) are the published
ones, in their order. What is done, each piece once, its result a line of `--out`/pieces.jsonl, its artefacts
beside:

1. feature extractors on CIFAR-100: the first of `--networks` is the one that the adversary knows (white box),
   the others are what he does not know (black box);
2. their features of all clean images, augmented as in each of the 40 epochs, and of the test images;
3. for each set-up the poisons of every attack, made on the first extractor alone;
4. for each set-up, attack and extractor victims: 250 images of each class, the first of the training set,
   the poisons among those of their class; and a control in which the bases are as they were. In a set-up all
   start from the same layer and see the examples in the same order, so that they differ by the poisons alone.

A hit is the target image answered with the intended class. The control says how often that happens without
poison, and how often the target is answered wrongly anyway; hits are also counted among the targets that the
control gets right. `--minutes` ends the run after the piece at hand, the same command goes on from there, and
the result is written to benchmarks/results/transfer.json with `--write`.

The layer is trained in three ways (`LAYERS`): as published, on augmented images with a rate of 0.01 for 40
epochs; the same without augmentation; and without augmentation until it fits, with a rate of 0.1 for 160
epochs. Feature collision runs twice: as its public code does (see `FeatureCollision.released`), of which the
published figures are, and with the same settings as the paper's algorithm.

Published: ResNet-18 of width 64 trained on all of CIFAR-100; MobileNetV2 and VGG-11 as black boxes; 100
set-ups; 1,200 steps. Departures: networks are narrow and trained for few epochs on the part of CIFAR-100 that
is given; 300 steps of the two polytopes, after which their losses hardly fall any more; an image's 40
augmented forms are drawn once for all set-ups; crops are padded by reflection; CIFAR-10 is standardised as
CIFAR-100 was. A quarter of an hour for two networks and a minute a set-up, on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._harness import machine
from benchmarks.metapoison_success import Pieces
from unpoison import attacks, data, training
from unpoison._artefacts import atomic_file
from unpoison._seeds import derive_seed, generator
from unpoison._statistics import Proportion
from unpoison.attacks import Attack
from unpoison.data import TrainingSet, augment
from unpoison.models import features
from unpoison.threats import PoisonSet, Setup, read_setups
from unpoison.training import EpochRecord, Recipe, Trained

RESULTS = Path(__file__).parent / "results" / "transfer.json"
SETUPS = "poisoning-benchmark-cifar10-transfer-learning.json"
NETWORKS = ("resnet18:16", "vgg11:16")
CONTROL = "none"
# In per cent: against the network the poisons were made on, and the mean over two others.
PUBLISHED = {
    "feature-collision-released": (22.0, 7.0),
    "feature-collision": (None, None),
    "convex-polytope": (33.0, 7.0),
    "bullseye-polytope": (85.0, 8.5),
}
ATTACKS = tuple(PUBLISHED)
# By what was published, the weakest first.
ORDER = ("feature-collision-released", "convex-polytope", "bullseye-polytope")
PER_CLASS = 250
BATCH, MOMENTUM, DECAY = 128, 0.9, 2e-4
# How the new layer is trained: augmented, learning rate, times the epochs.
LAYERS = {
    "as published": (True, 0.01, 1),
    "not augmented": (False, 0.01, 1),
    "not augmented, fitted": (False, 0.1, 4),
}


def attack_named(name: str, steps: int, bases: Sequence[int]) -> Attack:
    """One of the attacks with the benchmark's settings; `steps` are those of the two polytopes."""
    match name:
        case "feature-collision-released":
            return dataclasses.replace(
                attacks.get("feature-collision", preset="released"), bases=tuple(bases)
            )
        case "feature-collision":
            return dataclasses.replace(
                attacks.get("feature-collision", preset="benchmark"), bases=tuple(bases)
            )
        case "convex-polytope":
            return dataclasses.replace(
                attacks.get("convex-polytope", preset="benchmark"), steps=steps, bases=tuple(bases)
            )
        case _:
            return dataclasses.replace(
                attacks.get("bullseye-polytope", preset="benchmark"), steps=steps, bases=tuple(bases)
            )


def pretraining(model: str, width: int, epochs: int) -> Recipe:
    """How an extractor is trained on CIFAR-100."""
    return Recipe(
        model=model,
        width=width,
        epochs=epochs,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=5e-4,
        schedule="one-cycle",
        warmup_epochs=min(2, epochs / 4),
        flip=True,
        crop_padding=4,
    )


def new_layer(rows: Tensor, labels: Tensor, *, classes: int, rate: float, seed: int) -> nn.Linear:
    """A linear layer trained on features Float[epochs n d], those of one epoch after the other.

    The rate is divided by ten after three quarters of the epochs.
    """
    epochs, count, width = rows.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "layer"))
        layer = nn.Linear(width, classes)
    # By hand, as `torch.optim.SGD` does it but twice as fast; the bias is the weight of a column of ones.
    with torch.no_grad():
        weights = torch.cat([layer.weight, layer.bias[:, None]], 1)
        momentum = torch.zeros_like(weights)
        wanted, ones = F.one_hot(labels, classes).float(), rows.new_ones(count, 1)
        for epoch in range(epochs):
            step = rate * (0.1 if epoch >= epochs * 3 // 4 else 1)
            order = torch.randperm(count, generator=generator(seed, "order", epoch))
            shuffled = torch.cat([rows[epoch][order], ones], 1)
            for seen, said in zip(shuffled.split(BATCH), wanted[order].split(BATCH), strict=True):
                slope = ((seen @ weights.T).softmax(1) - said).T @ seen / len(seen)
                momentum.mul_(MOMENTUM).add_(slope).add_(weights, alpha=DECAY)
                weights.sub_(momentum, alpha=step)
        layer.weight.copy_(weights[:, :-1])
        layer.bias.copy_(weights[:, -1])
    return layer


def distances(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """How far features Float[k d] lie from those of the target: each of them, and their mean."""
    length = wanted.norm()
    return {
        "each": float((found - wanted).norm(dim=1).mean() / length),
        "mean": float((found.mean(0) - wanted).norm() / length),
    }


class Study:
    """The pieces in their order.

    Arguments:
        clean, test: CIFAR-10 in its official order.
        pretraining_set, pretraining_test: what the extractors are trained and measured on.
        setups: all set-ups of the file.
        recipes: how each extractor is trained, by name; the first is the white box.
        out: the directory of the study.
        options: `trials`, `steps`, `epochs` and `per_class` of the victims, `minutes`.
    """

    def __init__(
        self,
        clean: TrainingSet,
        test: TrainingSet,
        pretraining_set: TrainingSet,
        pretraining_test: TrainingSet,
        *,
        setups: Sequence[Setup],
        recipes: dict[str, Recipe],
        out: Path,
        trials: int,
        steps: int = 300,
        epochs: int = 40,
        per_class: int = PER_CLASS,
        minutes: float | None = None,
    ) -> None:
        self.clean, self.test = clean, test
        self.pretraining_set, self.pretraining_test = pretraining_set, pretraining_test
        self.setups, self.recipes, self.out = setups, recipes, out
        self.trials, self.steps, self.epochs, self.per_class = trials, steps, epochs, per_class
        self.white = next(iter(recipes))
        out.mkdir(parents=True, exist_ok=True)
        self.keep_to_the_same_study()
        self.pieces = Pieces(out / "pieces.jsonl", minutes)
        self.networks: dict[str, nn.Module] = {}
        self.read: dict[str, dict[str, Tensor]] = {}
        # What any set-up may need of the clean set, so that more set-ups need no more features.
        self.pool = torch.cat([self.places(number) for number in range(len(setups))]).unique()

    def keep_to_the_same_study(self) -> None:
        """End where the directory belongs to another study; only black boxes and trials may be added."""
        recipes = {name: recipe.fingerprint for name, recipe in self.recipes.items()}
        own = {
            "white box": self.white,
            "steps": self.steps,
            "epochs": self.epochs,
            "examples of a class": self.per_class,
        }
        path = self.out / "study.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else own | {"recipes": recipes}
        differing = [what for what in own if found[what] != own[what]]
        differing += [name for name in recipes if found["recipes"].get(name, recipes[name]) != recipes[name]]
        if differing:
            raise SystemExit(f"{path}: another study, with another {', '.join(differing)}")
        own["recipes"] = found["recipes"] | recipes
        path.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")

    def places(self, number: int) -> Tensor:
        """The clean examples of a set-up's victims: the first of each class, bases left out."""
        setup = self.setups[number]
        free = torch.ones(len(self.clean), dtype=torch.bool)
        free[list(setup.base_indices)] = False
        chosen = []
        for label in range(self.clean.num_classes):
            count = self.per_class - (len(setup.base_indices) if label == setup.base_class else 0)
            chosen.append(((self.clean.labels == label) & free).nonzero().squeeze(1)[:count])
        return torch.cat(chosen)

    def victims_set(self, number: int) -> TrainingSet:
        """What a set-up's victims train on, without poison; the bases come last."""
        setup = self.setups[number]
        setup.check_bases(self.clean)
        return self.clean.subset(torch.cat([self.places(number), torch.tensor(setup.base_indices)]))

    def extractor(self, name: str) -> nn.Module:
        """A network trained on CIFAR-100; stopped and taken up again between epochs."""
        if name in self.networks:
            return self.networks[name]
        path = self.out / "extractors" / name.replace(":", "-")
        if not path.exists():

            def between(record: EpochRecord) -> None:
                if self.pieces.ends is not None and time.monotonic() > self.pieces.ends:
                    raise SystemExit(f"stopped after epoch {record.epoch} of {name}")

            trained = training.train(
                self.pretraining_set,
                self.recipes[name],
                seed=derive_seed(0, name),
                checkpoints=path.with_name(f"{path.name}-checkpoints"),
                on_epoch=between,
            )
            trained.save(path)
        trained = Trained.load(path)
        # Convolutions are quicker so; the numbers are the same but for rounding.
        self.networks[name] = trained.model.to(memory_format=torch.channels_last)
        key = f"extractor/{name}"
        if key not in self.pieces.done:
            accuracy = training.accuracy(trained.model, self.pretraining_test)
            self.pieces.add(key, {"seconds": round(trained.seconds, 1), "accuracy": accuracy.to_dict()})
        return self.networks[name]

    def features(self, name: str, images: Tensor) -> Tensor:
        """Float[n d]: what the last layer of an extractor receives."""
        model = self.extractor(name)
        last = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        return features(model, last, images, side="input", batch_size=128)

    def augmented(self, name: str, images: Tensor, *names: str | int) -> Tensor:
        """Float[epochs n d]: features of images as augmented in each epoch, drawn for the consumer named."""
        return torch.stack(
            [
                self.features(
                    name,
                    augment(images, flip=True, crop_padding=4, generator=generator(0, *names, epoch)),
                )
                for epoch in range(self.epochs)
            ]
        )

    def clean_features(self, name: str) -> dict[str, Tensor]:
        """Of the pool, augmented Float[epochs p d] and plain Float[p d]; of the test images Float[t d]."""
        if name not in self.read:
            path = self.out / "features" / f"{name.replace(':', '-')}.safetensors"
            if not path.exists():
                start = time.perf_counter()
                rows = {
                    "pool": self.augmented(name, self.clean.images[self.pool], "pool"),
                    "plain": self.features(name, self.clean.images[self.pool]),
                    "test": self.features(name, self.test.images),
                }
                with atomic_file(path) as staging:
                    safetensors.torch.save_file(rows, staging)
                self.pieces.add(f"features/{name}", {"seconds": round(time.perf_counter() - start, 1)})
            self.read[name] = safetensors.torch.load_file(path)
        return self.read[name]

    def craft(self, attack: str, number: int) -> None:
        """The poisons of an attack for a set-up, made on the first extractor."""
        key = f"craft/{attack}/{number}"
        if key in self.pieces.done:
            return
        setup, network = self.setups[number], self.extractor(self.white)
        clean = self.victims_set(number)
        bases = range(len(clean) - len(setup.base_indices), len(clean))
        goal = setup.goal(self.test)
        own = attack_named(attack, self.steps, bases)
        start = time.perf_counter()
        poison = own.craft(goal, clean, budget=setup.budget, surrogate=network, seed=number)
        seconds = time.perf_counter() - start
        poison.save(self.out / "poisons" / f"{attack}-{number}")
        wanted = self.features(self.white, goal.images)[0]
        self.pieces.add(
            key,
            {
                "seconds": round(seconds, 1),
                "linf": float(poison.linf.max()),
                "l2": round(float(poison.l2.mean()), 1),
                "before": distances(self.features(self.white, clean.images[list(bases)]), wanted),
                "after": distances(self.features(self.white, poison.images), wanted),
            },
        )

    def victim(self, attack: str, number: int, name: str) -> None:
        """A new layer on the features of `name`, trained on the poison of `attack`, or on none."""
        key = f"victim/{name}/{attack}/{number}"
        if key in self.pieces.done:
            return
        start = time.perf_counter()
        examples = self.victims_set(number)
        poisons = len(self.setups[number].base_indices)
        if attack != CONTROL:
            examples = PoisonSet.load(self.out / "poisons" / f"{attack}-{number}").apply(examples)
        poisoned = examples.images[-poisons:]
        kept, places = self.clean_features(name), torch.searchsorted(self.pool, self.places(number))
        plain = torch.cat([kept["plain"][places], self.features(name, poisoned)])
        drawn = self.augmented(name, poisoned, "poisons", number)
        augmented = torch.cat([kept["pool"][:, places], drawn], 1)
        goal = self.setups[number].goal(self.test)
        target = self.features(name, goal.images)
        found = {}
        for kind, (augments, rate, times) in LAYERS.items():
            layer = new_layer(
                augmented if augments else plain.expand(times * self.epochs, -1, -1),
                examples.labels,
                classes=self.clean.num_classes,
                rate=rate,
                seed=number,
            )
            with torch.no_grad():
                logits = layer(target)
                right = layer(kept["test"]).argmax(1) == self.test.labels
            found[kind] = {
                "hit": bool(goal.achieved(logits.argmax(1))[0]),
                "right": int(logits.argmax(1)) == goal.true_label,
                "predicted": int(logits.argmax(1)),
                "margin": round(float(goal.margin(logits)[0]), 4),
                "accuracy": float(right.float().mean()),
            }
        self.pieces.add(key, {"layers": found, "seconds": round(time.perf_counter() - start, 2)})

    def run(self) -> None:
        """All pieces, set-up by set-up, so that every attack has its trials early."""
        for name in self.recipes:
            self.extractor(name)
        for name in self.recipes:
            self.clean_features(name)
        for number in range(self.trials):
            for attack in ATTACKS:
                self.craft(attack, number)
            for name in self.recipes:
                for attack in (CONTROL, *ATTACKS):
                    self.victim(attack, number, name)

    def finished(self) -> list[int]:
        """The set-ups of which all victims are there, so that every comparison is paired."""
        return [
            number
            for number in range(len(self.setups))
            if all(
                f"victim/{name}/{attack}/{number}" in self.pieces.done
                for name in self.recipes
                for attack in (CONTROL, *ATTACKS)
            )
        ]

    def summary(self) -> dict[str, Any]:
        """Success of every attack against every extractor, beside the control and the published figures."""
        done, numbers = self.pieces.done, self.finished()

        def trials(name: str, attack: str, kind: str) -> list[dict[str, Any]]:
            return [done[f"victim/{name}/{attack}/{number}"]["layers"][kind] for number in numbers]

        def rate(values: Sequence[bool]) -> dict[str, Any]:
            return Proportion(sum(values), len(values)).to_dict()

        def mean(values: Sequence[float]) -> float | None:
            return statistics.fmean(values) if values else None

        rows, controls, pairs, hits = [], [], [], {}
        for kind, name in itertools.product(LAYERS, self.recipes):
            control = trials(name, CONTROL, kind)
            where = {"layer": kind, "victim": name}
            controls.append(
                {
                    **where,
                    "target_wrong": rate([not one["right"] for one in control]),
                    "target_as_intended": rate([one["hit"] for one in control]),
                    "mean_margin": mean([one["margin"] for one in control]),
                    "accuracy": mean([one["accuracy"] for one in control]),
                }
            )
            for attack in ATTACKS:
                own = trials(name, attack, kind)
                rows.append(
                    {
                        "attack": attack,
                        **where,
                        "knowledge": "white box" if name == self.white else "black box",
                        "success": rate([one["hit"] for one in own]),
                        "success_where_control_is_right": rate(
                            [one["hit"] for one, clean in zip(own, control, strict=True) if clean["right"]]
                        ),
                        "published_percent": PUBLISHED[attack][name != self.white],
                        "mean_margin": mean([one["margin"] for one in own]),
                        "accuracy": mean([one["accuracy"] for one in own]),
                    }
                )
                hits[f"{attack}, {name}, {kind}"] = [
                    number for number, one in zip(numbers, own, strict=True) if one["hit"]
                ]
            for weaker, attack in itertools.pairwise(ORDER):
                own, others = trials(name, attack, kind), trials(name, weaker, kind)
                pairs.append(where | compared(attack, own, weaker, others))
        crafting = [
            {
                "attack": attack,
                "seconds": statistics.median(one["seconds"] for one in crafts),
                "mean_l2": mean([one["l2"] for one in crafts]),
                "distance_of_each": mean([one["after"]["each"] for one in crafts]),
                "distance_of_mean": mean([one["after"]["mean"] for one in crafts]),
            }
            for attack in ATTACKS
            if (crafts := [done[f"craft/{attack}/{number}"] for number in numbers])
        ]
        crafts = [done[f"craft/bullseye-polytope/{number}"] for number in numbers]
        return {
            "name": "transfer",
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "command": "python -m benchmarks.transfer --data DIR --cifar100 DIR --out DIR --write",
            "machine": machine(torch.get_num_threads()),
            "setting": {
                "set_ups": len(numbers),
                "poisons": len(self.setups[0].base_indices),
                "examples": self.per_class * self.clean.num_classes,
                "eps": 8,
                "polytope_steps": self.steps,
                "collision_steps": attacks.get("feature-collision", preset="benchmark").steps,
                "epochs": self.epochs,
                "distance_of_mean_before": mean([one["before"]["mean"] for one in crafts]),
                "distance_of_each_before": mean([one["before"]["each"] for one in crafts]),
            },
            "networks": [
                {
                    "network": name,
                    "epochs": recipe.epochs,
                    "examples": len(self.pretraining_set),
                    "seconds": done.get(f"extractor/{name}", {}).get("seconds"),
                    "accuracy": done.get(f"extractor/{name}", {}).get("accuracy"),
                }
                for name, recipe in self.recipes.items()
            ],
            "rows": rows,
            "crafting": crafting,
            "controls": controls,
            "pairs": pairs,
            "set_ups_hit": hits,
        }


def compared(
    attack: str, own: Sequence[dict[str, Any]], weaker: str, others: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """On how many of the same targets only one of two attacks hits, and the sign test's two-sided p."""
    first = sum(one["hit"] and not other["hit"] for one, other in zip(own, others, strict=True))
    second = sum(other["hit"] and not one["hit"] for one, other in zip(own, others, strict=True))
    apart = first + second
    tail = sum(math.comb(apart, hits) for hits in range(max(first, second), apart + 1)) / 2**apart
    return {
        "pair": f"{attack} against {weaker}",
        "only_the_first": first,
        "only_the_second": second,
        "p_value": min(1.0, 2 * tail),
    }


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="CIFAR-10: a folder, with cifar10-*.parquet or archive")
    parser.add_argument("--cifar100", required=True, help="CIFAR-100, likewise")
    parser.add_argument("--setups", help=f"the published set-ups as JSON; {SETUPS} beside the data")
    parser.add_argument("--out", required=True, help="the directory of the study")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="NAME:WIDTH; white box first")
    parser.add_argument("--pretraining-epochs", type=int, default=10)
    parser.add_argument("--trials", type=int, default=25, help="so many of the set-ups")
    parser.add_argument("--steps", type=int, default=300, help="of the two polytopes; published: 1,200")
    parser.add_argument("--minutes", type=float, help="end after the piece at hand when they are over")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="only print what there is")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results")
    return parser.parse_args(words)


def splits(folder: str, name: str) -> data.Splits:
    """The data of a folder: parquet files that bear the name, or whatever else it holds."""
    parts = sorted(Path(folder).glob(f"{name}-train-*.parquet"))
    if not parts:
        return data.load(folder)
    return data.load(Path(folder) / f"{name}-*.parquet")


def main(words: Sequence[str] | None = None) -> None:
    """Do what is left to do, and sum up."""
    options = parse(words)
    torch.set_num_threads(options.threads)
    cifar10, cifar100 = splits(options.data, "cifar10"), splits(options.cifar100, "cifar100")
    assert cifar10.test is not None
    assert cifar100.test is not None
    named = dict(network.split(":") for network in options.networks)
    study = Study(
        cifar10.train,
        cifar10.test,
        cifar100.train,
        cifar100.test,
        setups=read_setups(options.setups or Path(options.data) / SETUPS),
        recipes={
            f"{model}:{width}": pretraining(model, int(width), options.pretraining_epochs)
            for model, width in named.items()
        },
        out=Path(options.out),
        trials=options.trials,
        steps=options.steps,
        minutes=options.minutes,
    )
    try:
        if not options.summary:
            study.run()
    finally:
        result = study.summary()
        if options.write:
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
