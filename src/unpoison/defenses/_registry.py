"""Which defenses there are, and what to know about each. This module does not import torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, final

from unpoison.errors import InputError, nearest

if TYPE_CHECKING:
    from unpoison.training import Defense


@final
@dataclass(frozen=True, kw_only=True)
class DefenseCard:
    """What a person should know before choosing a defense."""

    name: str
    """What it is called in commands and artefacts."""
    title: str
    """What the literature calls it."""
    summary: str
    """What it does, in one sentence."""
    paper: str
    """Authors, year and where to find it; "ours" for what is not published elsewhere."""
    cost: str
    """What it adds to a training run."""
    presets: tuple[str, ...] = ()
    """The names of the settings that it carries besides its default."""
    extra: str | None = None
    """The optional dependency that it needs."""
    implementation: str
    """Where the class is: its module, a colon, its name."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON and for tables: everything but where the code is."""
        return {
            "name": self.name,
            "title": self.title,
            "summary": self.summary,
            "paper": self.paper,
            "cost": self.cost,
            "presets": list(self.presets),
            "extra": self.extra,
        }


_CARDS = {
    card.name: card
    for card in (
        DefenseCard(
            name="cutmix",
            title="CutMix",
            summary="Pastes a rectangle of another image into each, and shares the label by area.",
            paper="Yun et al., ICCV 2019, arXiv 1905.04899",
            cost="none to speak of",
            implementation="unpoison.defenses.cutmix:CutMix",
        ),
        DefenseCard(
            name="cutout",
            title="Cutout",
            summary="Blacks out a square of every image.",
            paper="DeVries and Taylor 2017, arXiv 1708.04552",
            cost="none to speak of",
            implementation="unpoison.defenses.cutout:Cutout",
        ),
        DefenseCard(
            name="dp-sgd",
            title="DP-SGD",
            summary="Clips the gradient of every example and adds noise to their sum; reports its epsilon.",
            paper="Abadi et al., CCS 2016, arXiv 1607.00133",
            cost="two to several times the training; needs a network without batch norm",
            extra="dp",
            implementation="unpoison.defenses.dp_sgd:DPSGD",
        ),
        DefenseCard(
            name="epic",
            title="EPIC",
            summary="Every few epochs drops the examples that are alone in gradient space.",
            paper="Yang, Liu and Mirzasoleiman, ICML 2022, arXiv 2210.09671",
            cost="a round: one forward pass and, at 50,000 examples of 10 classes, seconds of clustering",
            presets=(
                "paper-200-0.1",
                "paper-200-0.2",
                "paper-200-0.3",
                "released-200-0.1",
                "released-200-0.2",
                "released-200-0.3",
                "released-40-0.1",
                "released-40-0.2",
                "released-40-0.3",
                "released-40-eps16-0.1",
                "released-40-eps16-0.2",
                "released-40-eps16-0.3",
                "released-fine-tune",
                "released-tiny-imagenet",
                "released-transfer",
            ),
            implementation="unpoison.defenses.epic:EPIC",
        ),
        DefenseCard(
            name="feature-squeezing",
            title="Feature squeezing",
            summary="Drops examples that are grainy, and whose features move when they are recompressed.",
            paper="ours, after Xu, Evans and Qi, NDSS 2018, arXiv 1704.01155",
            cost="once a recompression and three forward passes",
            implementation="unpoison.defenses.feature_squeezing:FeatureSqueezing",
        ),
        DefenseCard(
            name="friendly-noise",
            title="Friendly Noise (FRIENDS)",
            summary="Adds to every image the largest noise that leaves its answer alone, and random noise.",
            paper="Liu, Yang and Mirzasoleiman, NeurIPS 2022, arXiv 2208.10224",
            cost="once, as much as 30 epochs; one byte a pixel",
            presets=("friends-b", "friends-g"),
            implementation="unpoison.defenses.friendly_noise:FriendlyNoise",
        ),
        DefenseCard(
            name="isolation",
            title="Isolation",
            summary="In a few rounds drops the few examples that lie far from their class in gradient space.",
            paper="ours, after EPIC",
            cost="a round: one forward pass and under a second of neighbour search",
            implementation="unpoison.defenses.isolation:Isolation",
        ),
        DefenseCard(
            name="jpeg",
            title="JPEG recompression",
            summary="Recompresses every training image once.",
            paper="Das et al. 2017, arXiv 1705.02900; against poison Bhat et al. 2024, arXiv 2405.18627",
            cost="seconds for 50,000 images of 32x32",
            presets=("quality-25", "quality-75"),
            implementation="unpoison.defenses.jpeg:JPEG",
        ),
        DefenseCard(
            name="loss-drop",
            title="Drop of the highest losses",
            summary="A control: drops the examples of highest loss, as many and when another defense does.",
            paper="a control",
            cost="a round: one forward pass",
            implementation="unpoison.defenses.loss_drop:LossDrop",
        ),
        DefenseCard(
            name="maxup",
            title="MaxUp",
            summary="Augments every image several times and learns from the worst copy.",
            paper="Gong et al., CVPR 2021, arXiv 2002.09024",
            cost="as many trainings as there are copies, 4 by default",
            implementation="unpoison.defenses.maxup:MaxUp",
        ),
        DefenseCard(
            name="mixup",
            title="Mixup",
            summary="Trains on weighted means of images, with equally weighted labels.",
            paper="Zhang et al., ICLR 2018, arXiv 1710.09412",
            cost="none to speak of",
            implementation="unpoison.defenses.mixup:Mixup",
        ),
        DefenseCard(
            name="noisy-gradient",
            title="Clipped and noisy gradients",
            summary="Clips the gradient of the batch and adds noise to it; promises nothing.",
            paper="Hong et al. 2020, arXiv 2002.11497; as in Geiping et al., ICLR 2021, arXiv 2009.02276",
            cost="none to speak of",
            presets=("sleeper-agent",),
            implementation="unpoison.defenses.noisy_gradient:NoisyGradient",
        ),
        DefenseCard(
            name="random-drop",
            title="Drop at random",
            summary="A control: drops examples at random, as many and when another defense does.",
            paper="a control",
            cost="none",
            implementation="unpoison.defenses.random_drop:RandomDrop",
        ),
    )
}


def names() -> tuple[str, ...]:
    """The names of all defenses, sorted.

    >>> "epic" in names()
    True
    """
    return tuple(sorted(_CARDS))


def describe(name: str) -> DefenseCard:
    """What to know about the defense called `name`.

    Raises:
        InputError: there is no such defense.

    >>> describe("epic").title
    'EPIC'
    """
    try:
        return _CARDS[name]
    except KeyError:
        raise InputError(f"there is no defense {name!r}; choose one of {', '.join(names())}") from None


def get(name: str, *, preset: str | None = None, seed: int = 0, **options: Any) -> Defense:
    """The defense called `name`, ready to be given to `train`.

    Arguments:
        name: one of `names()`.
        preset: one of `describe(name).presets`; None is the default.
        seed: of everything random in it; a defense that draws nothing has none and ignores it.
        **options: fields of its class to set otherwise.

    Raises:
        InputError: there is no such defense, preset or option, or an option is out of range.

    >>> get("epic", preset="paper-200-0.2").warm_up
    20
    """
    card = describe(name)
    if preset is not None and preset not in card.presets:
        known = f"choose one of {', '.join(card.presets)}" if card.presets else "it has none"
        raise InputError(f"{name}: there is no preset {preset!r}; {known}")
    module, _, implementation = card.implementation.partition(":")
    defense: Any = getattr(importlib.import_module(module), implementation)
    accepted = [field.name for field in fields(defense) if field.init]
    for option in options:
        if option not in accepted:
            raise InputError(f"{name}: there is no option {option!r}; {nearest(option, accepted)}")
    if "seed" in accepted:
        options = {"seed": seed, **options}
    try:
        made: Defense = defense(**options) if preset is None else defense.preset(preset, **options)
    except TypeError as error:
        raise InputError(f"{name}: an option cannot have such a value: {error}") from None
    return made
