"""Which attacks there are, and what to know about each. This module does not import torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

from unpoison.errors import InputError

if TYPE_CHECKING:
    from unpoison.attacks._attack import Attack


@final
@dataclass(frozen=True, kw_only=True)
class AttackCard:
    """What a person should know before choosing an attack."""

    name: str
    """What it is called in commands and artefacts."""
    title: str
    """What the literature calls it."""
    summary: str
    """What it does, in one sentence."""
    knowledge: str
    """What the adversary needs to know or to hold."""
    labels: Literal["dirty", "clean"]
    """Whether poisons are mislabelled, or keep their labels."""
    goals: tuple[str, ...]
    """The kinds of goal that it serves."""
    paper: str
    """Authors, year and where to find it."""
    cost: str
    """What crafting costs."""
    implementation: str
    """Where the class is: its module, a colon, its name."""
    surrogates: int = 0
    """On how many networks of the adversary's own it crafts by default; 0 where it needs none."""
    makes_trigger: bool = False
    """Whether it makes its trigger itself, whatever picture the goal has."""

    @property
    def takes_trigger(self) -> bool:
        """Whether the trigger that it is given matters."""
        return "backdoor" in self.goals and not self.makes_trigger

    def to_dict(self) -> dict[str, Any]:
        """For JSON and for tables: everything but where the code is."""
        return {
            "name": self.name,
            "title": self.title,
            "summary": self.summary,
            "knowledge": self.knowledge,
            "labels": self.labels,
            "goals": list(self.goals),
            "paper": self.paper,
            "cost": self.cost,
            "surrogates": self.surrogates,
            "takes_trigger": self.takes_trigger,
        }


_CARDS = {
    card.name: card
    for card in (
        AttackCard(
            name="badnets",
            title="BadNets",
            summary="Stamps a patch on examples of the source class and labels them as the target class.",
            knowledge="a share of the training set, with its labels; no model",
            labels="dirty",
            goals=("backdoor",),
            paper="Gu, Dolan-Gavitt and Garg 2017, arXiv 1708.06733",
            cost="none: one copy of the stamped images",
            implementation="unpoison.attacks.badnets:BadNets",
        ),
        AttackCard(
            name="blended",
            title="Blended",
            summary="Mixes a picture faintly into examples of the source class, labelled as the target.",
            knowledge="a share of the training set, with its labels; no model",
            labels="dirty",
            goals=("backdoor",),
            paper="Chen, Liu, Li, Lu and Song 2017, arXiv 1712.05526",
            cost="none: one copy of the stamped images",
            implementation="unpoison.attacks.blended:Blended",
            makes_trigger=True,
        ),
        AttackCard(
            name="bullseye-polytope",
            title="Bullseye Polytope",
            summary="Moves images so that the mean of their features is that of the target image.",
            knowledge="the network whose features the victim uses, or several like it",
            labels="clean",
            goals=("targeted-misclassification",),
            paper="Aghakhani et al. 2021, EuroS&P, arXiv 2005.00191",
            cost="800 forward and backward passes over the poisons",
            implementation="unpoison.attacks.bullseye_polytope:BullseyePolytope",
            surrogates=1,
        ),
        AttackCard(
            name="convex-polytope",
            title="Convex polytope",
            summary="Moves images so that their features enclose those of the target image.",
            knowledge="the network whose features the victim uses, or several like it",
            labels="clean",
            goals=("targeted-misclassification",),
            paper="Zhu et al. 2019, ICML, arXiv 1905.05897",
            cost="4,000 forward and backward passes over the poisons",
            implementation="unpoison.attacks.convex_polytope:ConvexPolytope",
            surrogates=1,
        ),
        AttackCard(
            name="feature-collision",
            title="Feature collision (Poison Frogs)",
            summary="Moves each image to where the network sees the target image.",
            knowledge="the network whose features the victim uses",
            labels="clean",
            goals=("targeted-misclassification",),
            paper="Shafahi et al. 2018, NeurIPS, arXiv 1804.00792",
            cost="120 steps of two forward and one backward pass over the poisons",
            implementation="unpoison.attacks.feature_collision:FeatureCollision",
            surrogates=1,
        ),
        AttackCard(
            name="gradient-matching",
            title="Gradient matching (Witches' Brew)",
            summary="Bends rightly labelled images until training on them descends the adversary's loss.",
            knowledge="the training set, and networks trained as the victim will be",
            labels="clean",
            goals=("targeted-misclassification",),
            paper="Geiping et al. 2021, ICLR, arXiv 2009.02276",
            cost="restarts x steps x (a training step and a double backward pass over the poisons)",
            implementation="unpoison.attacks.gradient_matching:GradientMatching",
            surrogates=1,
        ),
        AttackCard(
            name="hidden-trigger",
            title="Hidden-trigger backdoor",
            summary="Moves images of the target class to where a network sees patched images of the source.",
            knowledge="the training set and the network that the victim fine-tunes",
            labels="clean",
            goals=("backdoor",),
            paper="Saha, Subramanya and Pirsiavash 2020, AAAI, arXiv 1910.00033",
            cost="5,000 forward and backward passes over the poisons",
            implementation="unpoison.attacks.hidden_trigger:HiddenTrigger",
            surrogates=1,
        ),
        AttackCard(
            name="label-consistent",
            title="Label-consistent backdoor",
            summary="Makes images of the target class hard to recognise and stamps them; labels stay.",
            knowledge="the training set and a network like the victim, best an adversarially trained one",
            labels="clean",
            goals=("backdoor",),
            paper="Turner, Tsipras and Madry 2019, arXiv 1912.02771",
            cost="20 forward and backward passes over the poisons",
            implementation="unpoison.attacks.label_consistent:LabelConsistent",
            surrogates=1,
        ),
        AttackCard(
            name="label-flip",
            title="Label flips",
            summary="Gives images of one class, or of all, wrong labels: mistakes that nobody meant.",
            knowledge="a share of the training set, with its labels; no model",
            labels="dirty",
            goals=("mistakes",),
            paper="Zhang et al. 2017, arXiv 1611.03530; Patrini et al. 2017, arXiv 1609.03683",
            cost="none",
            implementation="unpoison.attacks.label_flip:LabelFlip",
        ),
        AttackCard(
            name="metapoison",
            title="MetaPoison",
            summary="Learns changes of rightly labelled images by looking ahead through steps of training.",
            knowledge="the training set, and the victim's architecture and training roughly",
            labels="clean",
            goals=("self-concealment", "targeted-misclassification"),
            paper="Huang, Geiping, Fowl, Taylor and Goldstein 2020, NeurIPS, arXiv 2004.00225",
            cost="hundreds of epochs of training, and second derivatives wherever there are poisons",
            implementation="unpoison.attacks.metapoison:MetaPoison",
        ),
        AttackCard(
            name="sig",
            title="SIG",
            summary="Adds a sine along the columns to some images of the target class; labels stay.",
            knowledge="a share of the target class; no model",
            labels="clean",
            goals=("backdoor",),
            paper="Barni, Kallas and Tondi 2019, ICIP, arXiv 1902.11237",
            cost="none: one copy of the stamped images",
            implementation="unpoison.attacks.sig:Sig",
            makes_trigger=True,
        ),
        AttackCard(
            name="sleeper-agent",
            title="Sleeper Agent",
            summary="Moves images of the target class so that training on them teaches a trigger they lack.",
            knowledge="the training set and a network trained as the victim will be",
            labels="clean",
            goals=("backdoor",),
            paper="Souri et al. 2022, NeurIPS, arXiv 2106.08970",
            cost="250 double backward passes over the poisons and 4 trainings of each surrogate",
            implementation="unpoison.attacks.sleeper_agent:SleeperAgent",
            surrogates=1,
        ),
        AttackCard(
            name="smooth-trigger",
            title="Smooth trigger",
            summary="Adds a pattern without high frequencies, made from a network, and labels as the target.",
            knowledge="a share of the training set, with its labels, and a network like the victim",
            labels="dirty",
            goals=("backdoor",),
            paper="Zeng, Park, Mao and Jia 2021, ICCV, arXiv 2104.03413",
            cost="some hundred backward passes over 100 images; none where the trigger is given",
            implementation="unpoison.attacks.smooth_trigger:SmoothTrigger",
            makes_trigger=True,
            surrogates=1,
        ),
        AttackCard(
            name="wanet",
            title="WaNet",
            summary="Bends examples of the source, labelled as the target, and others by noise, labels kept.",
            knowledge="a share of the training set, with its labels; no model",
            labels="dirty",
            goals=("backdoor",),
            paper="Nguyen and Tran 2021, ICLR, arXiv 2102.10369",
            cost="none: two copies of the bent images",
            implementation="unpoison.attacks.wanet:WaNet",
            makes_trigger=True,
        ),
    )
}


def names() -> tuple[str, ...]:
    """The names of all attacks, sorted.

    >>> "badnets" in names()
    True
    """
    return tuple(sorted(_CARDS))


def describe(name: str) -> AttackCard:
    """What to know about the attack called `name`.

    Raises:
        InputError: there is no such attack.

    >>> describe("badnets").labels
    'dirty'
    """
    try:
        return _CARDS[name]
    except KeyError:
        raise InputError(f"there is no attack {name!r}; choose one of {', '.join(names())}") from None


def get(name: str) -> type[Attack]:
    """The class of the attack called `name`; `get(name)()` has its default options.

    Raises:
        InputError: there is no such attack.

    >>> get("badnets")()
    BadNets(least_visible=0.5)
    """
    module, _, implementation = describe(name).implementation.partition(":")
    attack: type[Attack] = getattr(importlib.import_module(module), implementation)
    return attack
