"""What Delta-Influence needs, and whether what it finds carries the effect.

    OMP_NUM_THREADS=1 python -m benchmarks.delta_influence_studies --out STORE [--minutes 5] --json
    python -m benchmarks.delta_influence_studies --tables

Three attacks, three victims each: BadNets and a smooth trigger on 1.5 % of the bundled sample, as in
recipes/detectors-sample.toml, and gradient matching on a network that is fine-tuned on a part of CIFAR-10, as
in recipes/detectors-matching.toml (left out where CIFAR-10 does not lie beside that recipe). A victim is
asked about one wrong answer. The studies:

- complement: training anew without the detected poison, without the undetected, without as much poison drawn
  at random, and without all that was flagged. What carries the effect is what heals when it is taken away;
- changes: draws that change the image alone, the label alone, or both;
- draws: how many there are. The tolerance of the published votes is scaled with them;
- observations: how many wrong answers are asked about at once;
- known: a share of the poison has been found and removed by somebody before, the victim is trained without
  it, and what the calibrated rule finds of the rest is removed as well.

Training anew is what made the victim, from the same start, with another seed. It sees all but the removed
examples; success is counted on the test images (of gradient matching: one).

A piece is one study on one victim. Each is kept in the directory `--out`, so a run that is stopped, or given
`--minutes`, goes on where it was. What all pieces gave is in benchmarks/results/delta_influence_studies.json;
`--tables` prints it as the tables of docs/delta_influence.md. About three minutes a victim on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final
from unittest import mock

import torch
from torch import Tensor, nn

import unpoison.detectors.delta_influence as method
from benchmarks._harness import machine, say
from unpoison import attacks, data, detectors
from unpoison._artefacts import read_json, write_json
from unpoison._seeds import derive_seed, generator
from unpoison.data import TrainingSet
from unpoison.detectors import (
    DeltaInfluence,
    Findings,
    Observation,
    Votes,
    average_precision,
)
from unpoison.detectors._transforms import TRANSFORMS
from unpoison.errors import InputError
from unpoison.evaluation import Experiment, measure
from unpoison.evaluation._stages import attack_of
from unpoison.influence import ClassificationTask, Factors, fit_factors
from unpoison.threats import Backdoor, Budget, PatchTrigger, PoisonSet, TargetedMisclassification
from unpoison.training import Recipe, predict, train

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "delta_influence_studies.json"
MATCHING = ROOT / "recipes" / "detectors-matching.toml"
TRIALS = ((("Sandal", "Bag"), 0), (("Shirt", "Trouser"), 0), (("Sandal", "Bag"), 1))
"""Source, target and seed of the backdoors: the first trials of recipes/detectors-sample.toml."""
ATTACKS = {
    "badnets": "published",
    "smooth-trigger": "published-smooth",
    "gradient-matching": "published-matching",
}
"""The attacks, each with the preset that was published for it."""
Row = dict[str, Any]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the studies try."""

    calibrated: DeltaInfluence = dataclasses.field(
        default_factory=lambda: detectors.get("delta-influence", preset="calibrated")
    )
    draws: tuple[int, ...] = (1, 5, 10, 25, 50)
    observations: tuple[int, ...] = (1, 2, 4, 8)
    shares: tuple[float, ...] = (0.5, 0.8, 0.9)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """An attack on one training set, and how its victims are trained: from scratch where `start` is None."""

    attack: str
    number: int
    words: str
    clean: TrainingSet
    test: TrainingSet
    recipe: Recipe
    poison: PoisonSet
    published: DeltaInfluence
    start: nn.Module | None = None
    train_seed: int = 0
    heal_seed: int = 1000


class Victim:
    """A poisoned network, and what all studies of it share: factors, and trainings anew."""

    def __init__(self, scene: Scene, settings: Settings) -> None:
        self.scene, self.settings = scene, settings
        self.poisoned = scene.poison.apply(scene.clean)
        self.is_poison = scene.poison.membership(len(self.poisoned)).cpu()
        self.model = self._train(torch.empty(0, dtype=torch.int64), scene.train_seed)
        self._healed: dict[tuple[int, ...], Row] = {}
        self._found: dict[tuple[DeltaInfluence, int, int, str], Findings] = {}

    @functools.cached_property
    def factors(self) -> Factors:
        """Of the victim on its training set; every preset reads the same ones."""
        return fit_factors(self.model, self.poisoned, ClassificationTask(), seed=self.scene.number)

    @functools.cached_property
    def wrong_images(self) -> Tensor:
        """UInt8[m c h w]: the adversary's inputs that are answered as they want."""
        return wrong_images(self.model, self.scene)

    def observation(self, first: int = 0, count: int = 1) -> Observation:
        """Some of the wrong answers.

        Raises:
            InputError: there are fewer.
        """
        images = self.wrong_images[first : first + count]
        if len(images) < count:
            raise InputError(
                f"{self.scene.attack} {self.scene.number}: only {len(self.wrong_images)} inputs are "
                f"answered as the adversary wants, not {first + count}"
            )
        return Observation(images, self.scene.poison.goal.target)  # type: ignore[attr-defined]

    def find(
        self, detector: DeltaInfluence, first: int = 0, count: int = 1, changed: str = "both"
    ) -> Findings:
        """What Delta-Influence finds, asked about some of the wrong answers; several studies ask the same."""
        key = (detector, first, count, changed)
        if key not in self._found:
            with changing(changed, grey=self.poisoned.image_shape[0] == 1):
                self._found[key] = detector.find(
                    self.model, self.poisoned, self.observation(first, count), factors=self.factors
                )
        return self._found[key]

    def without(self, removed: Tensor) -> Row:
        """What a network is like that was trained anew without Int64[k] examples."""
        key = tuple(sorted(removed.tolist()))
        if key not in self._healed:
            healed = self._train(removed, self.scene.heal_seed)
            self._healed[key] = {"removed": len(key), **state_of(healed, self.scene)}
        return self._healed[key]

    def row(self, study: str, detector: str, setting: str, *parts: Mapping[str, Any]) -> Row:
        """A row of the record."""
        scene = self.scene
        row: Row = {
            "study": study,
            "attack": scene.attack,
            "experiment": scene.number,
            "pair": scene.words,
            "detector": detector,
            "setting": setting,
        }
        for part in parts:
            row |= part
        said = {
            name: row[name]
            for name in ("flagged", "caught", "p_value", "successes", "correct")
            if name in row
        }
        precision = row.get("average_precision")
        say(
            f"{study} {scene.attack} {scene.number}: {detector}, {setting}: {said}"
            + ("" if precision is None else f", average precision {precision:.3f}")
        )
        return row

    def judged(self, findings: Findings) -> Row:
        """Findings held against the truth."""
        return judged(findings, self.is_poison)

    def _train(self, removed: Tensor, seed: int) -> nn.Module:
        include = torch.ones(len(self.poisoned), dtype=torch.bool)
        include[removed] = False
        scene = self.scene
        return train(self.poisoned, scene.recipe, seed=seed, include=include, model=scene.start).model


def wrong_images(model: nn.Module, scene: Scene) -> Tensor:
    """UInt8[m c h w]: inputs that are answered as the adversary wants, and rightly without their doing."""
    goal = scene.poison.goal
    images, places = goal.victims(scene.test)
    achieved = goal.achieved(predict(model, images).argmax(1))
    if isinstance(goal, Backdoor):
        own = scene.test.subset(places)
        achieved &= predict(model, own.images).argmax(1) == own.labels
    return images[achieved]


def state_of(model: nn.Module, scene: Scene) -> Row:
    """How often the attack succeeds, by what margin, and how often clean images are answered rightly.

    The margin is the mean over the adversary's inputs of the greatest other logit less the wanted one: below
    zero where the attack succeeds.
    """
    measured = measure(model, scene.test, scene.poison.goal)
    assert measured.attack_success is not None
    goal = scene.poison.goal
    margin = goal.margin(predict(model, goal.victims(scene.test)[0])).mean()
    return {
        "successes": measured.attack_success.successes,
        "inputs": measured.attack_success.trials,
        "margin": float(margin),
        "correct": measured.clean_accuracy.successes,
        "tested": measured.clean_accuracy.trials,
    }


def judged(findings: Findings, is_poison: Tensor) -> Row:
    """Findings held against Bool[n], the truth."""
    return {
        "flagged": len(findings.flagged),
        "caught": int(is_poison[findings.flagged].sum()),
        "poisons": int(is_poison.sum()),
        "average_precision": average_precision(findings.scores, is_poison),
        "p_value": findings.p_value,
        "found": findings.poison_found,
    }


@contextlib.contextmanager
def changing(what: str, *, grey: bool) -> Iterator[None]:
    """Let the draws of Delta-Influence change the `image` alone, the `label` alone, or `both`.

    The detector has no option for it, as nobody should use it. On grey images the exchange of red and green
    changes nothing, and is no draw where the image alone is to change.
    """

    def unchanged(image: Tensor, generator: torch.Generator) -> Tensor:
        return image

    def kept(how: str, label: int, classes: int, count: int, randomness: torch.Generator) -> Tensor:
        return torch.full((count,), label)

    with contextlib.ExitStack() as stack:
        if what == "label":
            same = dict.fromkeys(TRANSFORMS, unchanged)
            stack.enter_context(mock.patch.object(method, "TRANSFORMS", same))
        if what == "image":
            seen = {
                name: transform
                for name, transform in TRANSFORMS.items()
                if not (grey and name == "colour switch")
            }
            stack.enter_context(mock.patch.object(method, "TRANSFORMS", seen))
            stack.enter_context(mock.patch.object(method, "_other_labels", kept))
        yield


def with_draws(detector: DeltaInfluence, draws: int) -> DeltaInfluence:
    """The detector with another number of draws, the tolerance of its votes in proportion."""
    rule = detector.rule
    if isinstance(rule, Votes):
        rule = Votes(rule.threshold, round(rule.tolerance * draws / detector.draws))
    return dataclasses.replace(detector, draws=draws, rule=rule)


def both(victim: Victim) -> dict[str, DeltaInfluence]:
    """Delta-Influence as calibrated, and as published for the attack."""
    return {"calibrated": victim.settings.calibrated, "published": victim.scene.published}


def complement(victim: Victim) -> Iterator[Row]:
    """Which part of the poison carries the effect?"""
    poison = victim.is_poison.nonzero()[:, 0]
    yield victim.row("complement", "none", "victim", state_of(victim.model, victim.scene))
    yield victim.row("complement", "none", "all poison", victim.without(poison[:0]))
    yield victim.row("complement", "none", "no poison", victim.without(poison))
    for name, detector in both(victim).items():
        findings = victim.find(detector)
        truth = victim.judged(findings)
        detected = findings.flagged[victim.is_poison[findings.flagged]]
        undetected = poison[~torch.isin(poison, detected)]
        order = torch.randperm(len(poison), generator=generator(victim.scene.number, "complement"))
        parts = {
            "without the flagged": findings.flagged,
            "without the detected poison": detected,
            "without the undetected poison": undetected,
            "without as much poison at random": poison[order[: len(detected)]],
        }
        if name == "calibrated":
            ranked = findings.ranking()
            ranked = ranked[victim.is_poison[ranked]]
            middle = len(ranked) // 2
            parts["without the half ranked first"] = ranked[:middle]
            parts["without the half ranked last"] = ranked[middle:]
            parts["without a random half"] = poison[order[:middle]]
        for setting, removed in parts.items():
            yield victim.row("complement", name, setting, truth, victim.without(removed))


def changes(victim: Victim) -> Iterator[Row]:
    """Are both changes needed, that of the image and that of the label?"""
    for name, detector in both(victim).items():
        for what in ("both", "image", "label"):
            findings = victim.find(detector, changed=what)
            yield victim.row("changes", name, what, victim.judged(findings), victim.without(findings.flagged))


def draws(victim: Victim) -> Iterator[Row]:
    """How many draws are enough?"""
    for name, detector in both(victim).items():
        for count in victim.settings.draws:
            findings = victim.find(with_draws(detector, count))
            yield victim.row("draws", name, str(count), victim.judged(findings))


def observations(victim: Victim) -> Iterator[Row]:
    """Do more wrong answers help? Single ones are taken several times, as they differ."""
    most = max(victim.settings.observations)
    for name, detector in both(victim).items():
        for count in victim.settings.observations:
            if count > len(victim.wrong_images):
                continue
            asked = detector
            if isinstance(detector.rule, Votes):
                # All the draws of all the observations vote.
                rule = Votes(detector.rule.threshold, detector.rule.tolerance * count)
                asked = dataclasses.replace(detector, draws=detector.draws, rule=rule)
            for first in range(0, min(most, 4), count):
                if first + count > len(victim.wrong_images):
                    break
                findings = victim.find(asked, first, count)
                yield victim.row("observations", name, str(count), victim.judged(findings))


def known(victim: Victim) -> Iterator[Row]:
    """What is found of the rest when a share of the poison is known and removed?"""
    scene = victim.scene
    poison = victim.is_poison.nonzero()[:, 0]
    order = torch.randperm(len(poison), generator=generator(scene.number, "known"))
    for share in (0.0, *victim.settings.shares):
        removed = poison[order[: round(share * len(poison))]]
        rest = torch.ones(len(victim.poisoned), dtype=torch.bool)
        rest[removed] = False
        places = rest.nonzero()[:, 0]
        left = victim.poisoned.subset(places)
        model = victim.model if not share else victim._train(removed, scene.heal_seed)
        before = state_of(model, scene)
        setting = f"{100 * share:g} %"
        images = wrong_images(model, scene)
        nobody: Row = {"flagged": 0, "caught": 0, "poisons": len(poison) - len(removed)}
        truth, found = nobody, removed[:0]
        if len(images):
            detector = victim.settings.calibrated
            observation = Observation(images[0], scene.poison.goal.target)  # type: ignore[attr-defined]
            findings = detector.find(model, left, observation) if share else victim.find(detector)
            truth, found = judged(findings, victim.is_poison[places]), places[findings.flagged]
        # What healing would give: what was known is removed, and what was flagged.
        after = victim.without(torch.cat([removed, found]))
        told = {f"before_{key}": value for key, value in before.items()}
        yield victim.row("known", "calibrated", setting, {"observed": bool(len(images))}, truth, told, after)


STUDIES: dict[str, Callable[[Victim], Iterable[Row]]] = {
    "complement": complement,
    "changes": changes,
    "draws": draws,
    "observations": observations,
    "known": known,
}


def asked_of(attack: str) -> tuple[str, ...]:
    """The studies of an attack: of gradient matching there is one wrong answer."""
    return tuple(study for study in STUDIES if (attack, study) != ("gradient-matching", "observations"))


@functools.lru_cache(maxsize=1)
def _sample() -> tuple[TrainingSet, TrainingSet]:
    splits = data.sample()
    assert splits.test is not None
    return splits.train, splits.test


def trigger_scene(attack: str, number: int) -> Scene:
    """A backdoor in the bundled sample, as in recipes/detectors-sample.toml."""
    clean, test = _sample()
    recipe = Recipe.preset("sample", width=8, epochs=6, warmup_epochs=1)
    pair, seed = TRIALS[number]
    source, target = (clean.class_names.index(name) for name in pair)
    goal = Backdoor(PatchTrigger.white_corner(), source, target)
    surrogate = None
    if attack == "smooth-trigger":
        surrogate = train(clean, recipe, seed=derive_seed(seed, "surrogate", 0)).model
    poison = attacks.get(attack)().craft(
        goal, clean, budget=Budget(share=0.015), surrogate=surrogate, seed=derive_seed(seed, "craft")
    )
    return Scene(
        attack=attack,
        number=number,
        words=" → ".join(pair),
        clean=clean,
        test=test,
        recipe=recipe,
        poison=poison,
        published=detectors.get("delta-influence", preset=ATTACKS[attack], seed=number),
        train_seed=derive_seed(seed, "train"),
        heal_seed=derive_seed(seed, "heal"),
    )


@functools.lru_cache(maxsize=1)
def _matching() -> tuple[Experiment, TrainingSet, TrainingSet, nn.Module, nn.Module]:
    """The experiment, its sets, the pretrained network and the adversary's own, fine-tuned from it."""
    experiment = Experiment.read(MATCHING)
    described, pretraining = experiment.data, experiment.pretraining
    assert pretraining is not None
    assert pretraining.rows is not None
    assert described.rows is not None
    assert described.test is not None
    assert described.test_rows is not None
    splits = data.load(experiment.path(described.source), test=experiment.path(described.test))
    assert splits.test is not None
    clean = splits.train.subset(range(*described.rows))
    test = splits.test.subset(range(*described.test_rows))
    start = train(
        splits.train.subset(range(*pretraining.rows)),
        experiment.pretraining_recipe(pretraining),
        seed=pretraining.seed,
    ).model
    surrogate = train(
        clean,
        experiment.surrogate_recipe(experiment.attacks[0]),
        seed=derive_seed(experiment.seeds[0], "surrogate", 0),
        model=start,
    ).model
    return experiment, clean, test, start, surrogate


def matching_scene(number: int) -> Scene:
    """Gradient matching against a fine-tuned network, as in recipes/detectors-matching.toml."""
    experiment, clean, test, start, surrogate = _matching()
    image, choice, seed = experiment.targets.images[number], experiment.attacks[0], experiment.seeds[0]
    assert isinstance(image.target, str)
    goal = TargetedMisclassification.of(test, image.test_index, target=clean.class_names.index(image.target))
    poison = attack_of(choice).craft(
        goal,
        clean,
        budget=Budget(share=choice.budget[0]),
        surrogate=[start, surrogate],
        seed=derive_seed(seed, "craft"),
    )
    return Scene(
        attack=choice.name,
        number=number,
        words=f"{image.source} → {image.target}",
        clean=clean,
        test=test,
        recipe=experiment.recipe,
        poison=poison,
        published=detectors.get("delta-influence", preset=ATTACKS[choice.name], seed=number),
        start=start,
        train_seed=derive_seed(seed, "train"),
        heal_seed=derive_seed(seed, "heal"),
    )


def scene_of(attack: str, number: int) -> Scene:
    """The attack's scene of that number."""
    return matching_scene(number) if attack == "gradient-matching" else trigger_scene(attack, number)


def at_hand(attack: str) -> bool:
    """Whether the attack's data are there."""
    if attack != "gradient-matching":
        return True
    described = Experiment.read(MATCHING).data
    places = [described.source, str(described.test)]
    return all((MATCHING.parent / place).exists() for place in places)


def place_of(out: Path, study: str, attack: str, number: int) -> Path:
    """Where a piece is kept."""
    return out / f"{study}-{attack}-{number}.json"


def work(
    out: Path,
    pieces: Iterable[tuple[str, str, int]],
    *,
    scene: Callable[[str, int], Scene] = scene_of,
    settings: Settings | None = None,
    minutes: float | None = None,
) -> int:
    """Do the pieces (attack, study, number) that are not kept yet; how many were left undone."""
    out.mkdir(parents=True, exist_ok=True)
    end = None if minutes is None else time.monotonic() + 60 * minutes
    victim, whose, left = None, None, 0
    for attack, study, number in pieces:
        place = place_of(out, study, attack, number)
        if place.exists():
            continue
        if end is not None and time.monotonic() > end:
            left += 1
            continue
        if victim is None or whose != (attack, number):
            victim, whose = Victim(scene(attack, number), settings or Settings()), (attack, number)
        started = time.process_time()
        rows = list(STUDIES[study](victim))
        write_json(place, {"rows": rows, "seconds": time.process_time() - started})
    return left


def kept(out: Path) -> tuple[list[Row], dict[str, float]]:
    """All rows of all pieces in a fixed order, and what each piece took."""
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for attack in ATTACKS:
        for study in STUDIES:
            for place in sorted(out.glob(f"{study}-{attack}-*.json")):
                piece = read_json(place)
                rows += piece["rows"]
                seconds[place.stem] = piece["seconds"]
    return rows, seconds


def summary(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """For each study a line for each attack, detector and setting: sums of counts, means of the rest."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        key = (row["study"], row["attack"], row["detector"], row["setting"])
        groups.setdefault(key, []).append(row)
    lines: dict[str, list[Row]] = {study: [] for study in STUDIES}
    for (study, attack, detector, setting), own in groups.items():
        line: Row = {"attack": attack, "detector": detector, "setting": setting}
        line["trials"] = len(own)
        for name in ("flagged", "caught", "poisons", "removed", "successes", "inputs", "correct", "tested"):
            for full in (name, f"before_{name}"):
                if any(full in row for row in own):
                    line[full] = sum(row.get(full, 0) for row in own)
        for name in ("average_precision", "margin", "before_margin"):
            values = [row[name] for row in own if row.get(name) is not None]
            if values:
                line[name] = statistics.fmean(values)
        if any("found" in row for row in own):
            line["found"] = sum(bool(row.get("found")) for row in own)
        lines[study].append(line)
    return lines


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _hits(line: Row, prefix: str = "") -> str:
    """Success: a rate for a backdoor, hits of all experiments for single images."""
    hits, inputs = line[f"{prefix}successes"], line[f"{prefix}inputs"]
    return f"{hits} of {inputs}" if inputs <= 2 * line["trials"] else _percent(hits, inputs)


def _accuracy(line: Row) -> str:
    return _percent(line["correct"], line["tested"])


def _detection(line: Row) -> list[str]:
    trials = line["trials"]
    precision = line.get("average_precision")
    return [
        f"{line['found']} of {trials}" if "found" in line else "–",
        f"{line['flagged'] / trials:.0f}",
        _percent(line["caught"], line["poisons"]),
        _percent(line["caught"], line["flagged"]),
        "–" if precision is None else f"{precision:.3f}",
    ]


_FOUND = ["poison found", "flagged, mean", "recall", "precision", "average precision"]
_COLUMNS: dict[str, tuple[list[str], Callable[[Row], list[str]]]] = {
    "complement": (
        ["removed, mean", "attack success", "margin", "accuracy"],
        lambda line: [
            f"{line.get('removed', 0) / line['trials']:.0f}",
            _hits(line),
            f"{line['margin']:+.1f}",
            _accuracy(line),
        ],
    ),
    "changes": (
        [*_FOUND, "success after", "accuracy after"],
        lambda line: [*_detection(line), _hits(line), _accuracy(line)],
    ),
    "draws": (_FOUND, _detection),
    "observations": (_FOUND, _detection),
    "known": (
        ["success before", *_FOUND[1:], "success after", "accuracy after"],
        lambda line: [_hits(line, "before_"), *_detection(line)[1:], _hits(line), _accuracy(line)],
    ),
}


def table(lines: Iterable[Row], study: str) -> str:
    """The Markdown table of a study's lines."""
    names, cells = _COLUMNS[study]
    heads = ["attack", "detector", "setting", "trials", *names]
    rows = [heads, ["---"] * len(heads)]
    for line in lines:
        words = [line["attack"], line["detector"], line["setting"], str(line["trials"])]
        rows.append([*words, *cells(line)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the directory of the pieces")
    parser.add_argument("--json", action="store_true", help="print the whole record, as one JSON object")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--tables", action="store_true", help="print the tables of the record that is kept")
    parser.add_argument("--minutes", type=float, help="begin no piece after so many")
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--numbers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    if options.out is None and not options.tables:
        parser.error("--out: where to keep the pieces")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Do what is missing, print, and keep the record."""
    options = parse(arguments)
    if options.tables:
        record = json.loads(RESULTS.read_text(encoding="utf-8"))
        print("\n\n".join(table(record[study], study) for study in STUDIES))
        return
    torch.set_num_threads(1)
    wanted = []
    for attack in options.attacks:
        if not at_hand(attack):
            say(f"{attack}: left out; put CIFAR-10 beside {MATCHING.name}")
            continue
        wanted += [
            (attack, study, number)
            for number in options.numbers
            for study in asked_of(attack)
            if study in options.studies
        ]
    left = work(options.out, wanted, minutes=options.minutes)
    if left:
        say(f"{left} pieces are left; give the same command again")
    rows, seconds = kept(options.out)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python -m benchmarks.delta_influence_studies --out STORE --json",
        "machine": machine(1),
        **summary(rows),
        "seconds": seconds,
    }
    if not options.no_write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(record if options.json else record["seconds"], ensure_ascii=False))


if __name__ == "__main__":
    main()
