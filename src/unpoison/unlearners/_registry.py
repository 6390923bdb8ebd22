"""Which unlearners there are, and what to know about each. This module does not import torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from unpoison.errors import InputError

if TYPE_CHECKING:
    from unpoison.unlearners._unlearner import Unlearner


@final
@dataclass(frozen=True, kw_only=True)
class UnlearnerCard:
    """What a person should know before choosing an unlearner."""

    name: str
    """What it is called in commands and artefacts."""
    title: str
    """What the literature calls it."""
    summary: str
    """What it does, in one sentence."""
    paper: str
    """Authors, year and where to find it."""
    cost: str
    """What healing costs, in parts of the training it repairs."""
    implementation: str
    """Where the class is: its module, a colon, its name."""
    reads_forgotten: bool = False
    """Whether it looks at the examples to forget; the others know the rest alone."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON and for tables: everything but where the code is."""
        return {
            "name": self.name,
            "title": self.title,
            "summary": self.summary,
            "paper": self.paper,
            "cost": self.cost,
            "reads_forgotten": self.reads_forgotten,
        }


_CARDS = {
    card.name: card
    for card in (
        UnlearnerCard(
            name="retrain",
            title="Exact unlearning (EU)",
            summary="Trains from scratch on the examples that are kept.",
            paper="the reference of every comparison, e.g. Goel et al. 2024, arXiv 2402.14015",
            cost="one training",
            implementation="unpoison.unlearners.retrain:Retrain",
        ),
        UnlearnerCard(
            name="fine-tune",
            title="Catastrophic forgetting (CF)",
            summary="Trains the victim on, with the examples that are kept.",
            paper="Goel et al. 2022, arXiv 2201.06640; as compared by Delta-Influence, arXiv 2411.13731",
            cost="half a training by default; one training as published",
            implementation="unpoison.unlearners.fine_tune:FineTune",
        ),
        UnlearnerCard(
            name="recant",
            title="Recanting (ours)",
            summary="Trains the victim on, with its own second-best answers for the examples to forget.",
            paper="of this project; compare Boundary Shrink, Chen et al. 2023, arXiv 2303.11570",
            cost="about an eighth of a training",
            implementation="unpoison.unlearners.recant:Recant",
            reads_forgotten=True,
        ),
        UnlearnerCard(
            name="ssd",
            title="Selective Synaptic Dampening (SSD)",
            summary="Shrinks the parameters that matter to the examples to forget alone; trains nothing.",
            paper="Foster et al. 2024, arXiv 2308.07707",
            cost="one gradient an example, one to three epochs of training",
            implementation="unpoison.unlearners.ssd:SSD",
            reads_forgotten=True,
        ),
        UnlearnerCard(
            name="potion",
            title="Potion (XLF and Poison Trigger Neutralisation)",
            summary="Dampens as SSD does, ever more strongly until the examples to forget are forgotten.",
            paper="Schoepf et al. 2024, arXiv 2406.09173",
            cost="one gradient an example, one to three epochs of training, and a short search",
            implementation="unpoison.unlearners.potion:Potion",
            reads_forgotten=True,
        ),
        UnlearnerCard(
            name="scrub",
            title="SCRUB",
            summary="Leads the model away from itself on the examples to forget, and back to it on the rest.",
            paper="Kurmanji et al. 2023, arXiv 2302.09880",
            cost="three epochs with two forward passes",
            implementation="unpoison.unlearners.scrub:SCRUB",
            reads_forgotten=True,
        ),
        UnlearnerCard(
            name="bad-teaching",
            title="Bad Teaching",
            summary="Follows an ignorant teacher on the examples to forget, and the victim on the rest.",
            paper="Chundawat et al. 2023, arXiv 2205.08096",
            cost="one pass over a third of the examples with three forward passes",
            implementation="unpoison.unlearners.bad_teaching:BadTeaching",
            reads_forgotten=True,
        ),
    )
}


def names() -> tuple[str, ...]:
    """The names of all unlearners, sorted.

    >>> "retrain" in names()
    True
    """
    return tuple(sorted(_CARDS))


def describe(name: str) -> UnlearnerCard:
    """What to know about the unlearner called `name`.

    Raises:
        InputError: there is no such unlearner.

    >>> describe("retrain").cost
    'one training'
    """
    try:
        return _CARDS[name]
    except KeyError:
        raise InputError(f"there is no unlearner {name!r}; choose one of {', '.join(names())}") from None


def get(name: str) -> type[Unlearner]:
    """The class of the unlearner called `name`; `get(name)()` has its default options.

    Raises:
        InputError: there is no such unlearner.

    >>> get("retrain")()
    Retrain(lose_classes=False)
    """
    module, _, implementation = describe(name).implementation.partition(":")
    unlearner: type[Unlearner] = getattr(importlib.import_module(module), implementation)
    return unlearner
