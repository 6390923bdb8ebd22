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
