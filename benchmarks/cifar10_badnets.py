"""BadNets on the whole of CIFAR-10: poison, train, trace from one wrong prediction, retrain, measure.

    python -m benchmarks.cifar10_badnets --data DIR_OR_GLOB --test FILE [--recipe NAME] [--epochs N] --json

One victim class (8, ship) and one target class (5, dog), 500 poisons with the four black pixels, as in the
published experiments of Delta-Influence. Beside the victim a control is trained on the clean set, for the
accuracy that healing can hope for. On one GPU the published row is

    python -m benchmarks.cifar10_badnets --data DIR --test FILE --recipe resnet18-40 --device cuda \\
        --presets published calibrated --json

which traces with the published and with the calibrated preset. Numbers go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from unpoison import attacks, data, detectors, evaluation, threats, training, unlearners
from unpoison._memory import peak_bytes
from unpoison.detectors import Observation

RESULTS = Path(__file__).parent / "results"


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run the story once and store what it gave."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--recipe", default="cifar10-small")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--presets", nargs="+", default=["calibrated"])
    parser.add_argument("--poisons", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="store and reuse the trained victim and control here")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()

    splits = data.load(options.data, test=options.test)
    assert splits.test is not None
    clean, test = splits.train.to(options.device), splits.test.to(options.device)
    changes = {name: getattr(options, name) for name in ("epochs", "width") if getattr(options, name)}
    recipe = training.Recipe.preset(options.recipe, **changes)
    goal = threats.Backdoor(threats.PatchTrigger.four_pixels(), 8, 5)
    budget = threats.Budget(count=options.poisons)
    poison = attacks.BadNets().craft(goal, splits.train, budget=budget, seed=options.seed)
    poisoned = poison.apply(splits.train).to(options.device)
    seconds: dict[str, float] = {}

    def timed(stage: str, training_set: data.TrainingSet) -> training.Trained:
        folder = (
            None
            if options.keep is None
            else options.keep / f"{stage}-{training_set.fingerprint[:8]}-{recipe.fingerprint[:8]}"
        )
        if folder is not None and folder.exists():
            return training.Trained.load(folder, device=options.device)
        start = time.perf_counter()
        trained = training.train(training_set, recipe, seed=options.seed)
        seconds[stage] = time.perf_counter() - start
        say(f"{stage}: {seconds[stage]:.0f} s")
        if folder is not None:
            trained.save(folder)
        return trained

    victim = timed("train", poisoned)
    before = evaluation.measure(victim.model, test, goal)
    say(f"victim: accuracy {before.clean_accuracy}, attack success {before.attack_success}")
    images, _ = goal.victims(test)
    fooled = (training.predict(victim.model, images).argmax(1) == goal.target).nonzero()[:, 0]
    observation = Observation(images[fooled[0]], goal.target, goal.source)

    rows: dict[str, Any] = {}
    for preset in options.presets:
        start = time.perf_counter()
        findings = detectors.get("delta-influence", preset=preset, seed=options.seed).find(
            victim.model, poisoned, observation
        )
        elapsed = time.perf_counter() - start
        judgement = findings.judge(poison)
        say(f"{preset}: {elapsed:.0f} s, precision {judgement.precision}, recall {judgement.recall}")
        rows[preset] = {
            "flagged": len(findings.flagged),
            "p_value": findings.p_value,
            "precision": judgement.precision.rate if judgement.precision.trials else None,
            "recall": judgement.recall.rate,
            "average_precision": judgement.average_precision,
            "seconds": {"find": elapsed, **findings.seconds},
        }
        if len(findings.flagged):
            start = time.perf_counter()
            healed = unlearners.Retrain().heal(victim, poisoned, findings.flagged, seed=options.seed)
            rows[preset]["seconds"]["heal"] = time.perf_counter() - start
            after = evaluation.measure(healed.model, test, goal)
            assert after.attack_success is not None
            say(f"{preset}: healed, accuracy {after.clean_accuracy}, attack success {after.attack_success}")
            rows[preset]["clean_accuracy_after"] = after.clean_accuracy.to_dict()
            rows[preset]["attack_success_after"] = after.attack_success.to_dict()
    control = evaluation.measure(timed("control", clean).model, test, goal)
    assert before.attack_success is not None
    device = torch.device(options.device)
    result = {
        "name": "cifar10_badnets",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.cifar10_badnets --data CIFAR10 --test CIFAR10_TEST "
        f"--recipe {options.recipe} --epochs {recipe.epochs} --width {recipe.width} "
        f"--presets {' '.join(options.presets)} --json",
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "training_examples": len(clean),
        "poisons": len(poison.indices),
        "recipe": recipe.to_dict(),
        "clean_accuracy_before": before.clean_accuracy.to_dict(),
        "attack_success_before": before.attack_success.to_dict(),
        "clean_accuracy_control": control.clean_accuracy.to_dict(),
        "presets": rows,
        "seconds": seconds,
        "peak_bytes": peak_bytes(device),
    }
    if not options.no_write:
        RESULTS.mkdir(exist_ok=True)
        name = "cifar10_badnets" if device.type == "cpu" else "cifar10_badnets_gpu"
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
