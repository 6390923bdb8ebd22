"""What the studies gave that were made before recipes could express them.

MetaPoison's success (metapoison_success_*), transfer of feature-space attacks (transfer) and what the
findings of Delta-Influence carry (delta_influence_studies). Each result names the command and date that made
it; its script is gone. A result goes when a recipe has measured it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from benchmarks._tables import Record, Row, Section, percent, proportion

ATTACKS: Final = ("feature-collision-released", "convex-polytope", "bullseye-polytope")


def hits(budget: float) -> Callable[[Record], str]:
    """MetaPoison's success at a budget, those of the other attacks, and the clean control."""

    def value(record: Record) -> str:
        told, wanted = {}, (budget, "same")
        for row in record["rows"]:
            if (row["budget"], row["victim"]) == wanted:
                told[row["attack"]] = proportion(row["success"], interval=row["attack"] == "metapoison")
        for row in record.get("ahead", ()):
            if (row["budget"], row["victim"]) == wanted and row["interval"]:
                points = [f"{100 * one:.0f}" for one in (row["difference"], *row["interval"])]
                told[row["of"]] += ", MetaPoison ahead by {} points ({} to {})".format(*points)
        parts = [told.pop("metapoison"), *(f"{name.replace('-', ' ')}: {one}" for name, one in told.items())]
        clean = next(row["success"] for row in record["control"] if row["victim"] == "same")
        return "; ".join((*parts, f"clean control: {clean['successes']} of {clean['trials']}"))

    return value


def transferred(record: Record) -> str:
    """White box, with the fitted layer and the layer as published."""
    told = []
    for layer in ("not augmented, fitted", "as published"):
        found = {
            row["attack"]: row["success"]
            for row in record["rows"]
            if (row["knowledge"], row["layer"]) == ("white box", layer)
        }
        shares = ", ".join(percent(found[name]["rate"]) for name in ATTACKS if name in found)
        told += [f"{shares} (n = {found[ATTACKS[-1]]['trials']}, layer {layer})"] if shares else []
    return "; ".join(told)


TITLES: Final = {
    "from_scratch": "From scratch, surrogates from one training",
    "from_scratch_plain_collision": "From scratch, feature collision without a watermark",
    "from_scratch_separate": "From scratch, surrogates trained apart, 50 poisons in a batch",
    "from_scratch_ten": "From scratch, surrogates trained apart, 10 poisons in a batch",
    "from_scratch_ten_transfer": "The same poisons on other architectures",
    "fine_tuning": "Fine-tuning, clean trajectory",
    "fine_tuning_poisoned_trajectory": "Fine-tuning, poisoned trajectory",
    "fine_tuning_spread": "Fine-tuning, poisons where they fall",
    "fine_tuning_watermark": "Fine-tuning, with a watermark",
    "fine_tuning_watermark_collision": "Fine-tuning, feature collision with a watermark, unbounded",
    "self_concealment_2": "Self-concealment, 2 %",
    "self_concealment_5": "Self-concealment, 5 %",
    "self_concealment_2_poisoned_trajectory": "Self-concealment, 2 %, poisoned trajectory",
    "third_class_4": "Third class, 4 %",
    "third_class_8": "Third class, 8 %, 40 poisons in a batch and 10 steps",
    "third_class_8_spread": "Third class, 8 %, 20 poisons in a batch and 16 steps",
    "third_class_cats": "Third class, 4 %, poisons are cats",
    "third_class_4_clean_trajectory": "Third class, 4 %, surrogates trained apart",
    "third_class_4_poisoned_trajectory": "Third class, 4 %, poisoned trajectory",
    "third_class_8_poisoned_trajectory": "Third class, 8 %, poisoned trajectory",
    "third_class_10": "Third class, 10 %, poisoned trajectory",
    "several_classes_10": "Poisons of several classes, 10 %",
}
AHEAD: Final = "MetaPoison ahead"
ROWS: Final = {
    "fine_tuning_poisoned_trajectory": Row(
        "MetaPoison, 2 % of a fine-tuning set: victims hit; others",
        f"more than half; {AHEAD}",
        hits(0.02),
        "studies/metapoison-fine-tuning",
    ),
    "from_scratch": Row(
        "MetaPoison from scratch, 5 % of 5,000 images (feature collision with watermark)",
        AHEAD,
        hits(0.05),
        "studies/metapoison-from-scratch",
    ),
    "from_scratch_ten": Row(
        "the same at 2 %, 10 poisons in a batch in place of 50, surrogates trained apart",
        AHEAD,
        hits(0.02),
        "studies/metapoison-from-scratch-2",
    ),
    "third_class_10": Row(
        "MetaPoison, a third class, 10 % of a fine-tuning set: victims hit",
        "more than half",
        hits(0.1),
        "studies/metapoison-goals",
    ),
}
METAPOISON: Final = (
    *(
        Section(f"metapoison_success_{name}", title, rows=(ROWS[name],) if name in ROWS else ())
        for name, title in TITLES.items()
    ),
    Section("metapoison-several-targets", "Three targets at once, 2 % of a fine-tuning set"),
)
TRANSFER: Final = Section(
    "transfer",
    "Feature-space attacks on published transfer set-ups",
    "20 set-ups of the poisoning benchmark; the layer that is fine-tuned is trained as published, without "
    "augmentation, or fitted until it has converged.",
    (
        Row(
            "feature collision (as released), convex polytope, Bullseye on published transfer set-ups",
            "the published order: 22, 33, 85 %",
            transferred,
            "studies/transfer-learning",
        ),
    ),
)
STUDIES: Final = Section(
    "delta_influence_studies",
    "What the findings carry, and what they need",
    "BadNets and the smooth trigger are 75 of the sample's 5,000 images, gradient matching 50 of 2,500 "
    "images of CIFAR-10 that a pretrained network is fine-tuned on; one victim each. `published` is the "
    "preset made for the attack. The rows of `calibrated` on gradient matching were made before it used "
    "artifact features. Complement: a part of the poison is left out of a training. Changes: the draws leave "
    "the label, or the image, as it is. Known: a share of the poison was removed before. Successes are of "
    "the inputs, correct answers of the tested, found verdicts of the trials; margins are below zero where "
    "the attack succeeds.",
)
