"""Goals, triggers and classes from plain values, as the command and recipes give them.

Every function takes the name of the option that the value came from, for its messages: "--target" on the
command line, "targets.pairs" in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from unpoison.data import TrainingSet
from unpoison.errors import InputError, nearest
from unpoison.threats._availability import Availability
from unpoison.threats._backdoor import AllToAll, Backdoor
from unpoison.threats._given_images import SelfConcealment, TargetedMisclassification
from unpoison.threats._goal import Goal
from unpoison.threats._label_noise import LabelNoise
from unpoison.threats._trigger import PatchTrigger, Trigger

TRIGGERS: Final[Mapping[str, Callable[[], Trigger]]] = MappingProxyType(
    {
        "white-corner": PatchTrigger.white_corner,
        "four-pixels": PatchTrigger.four_pixels,
        "four-white-pixels": lambda: PatchTrigger.four_pixels(value=255),
    }
)
"""The triggers that have a name."""

# What each goal needs, and what else it may be given.
_NEEDED: Final[Mapping[str, tuple[frozenset[str], frozenset[str]]]] = MappingProxyType(
    {
        "backdoor": (frozenset({"target"}), frozenset({"source", "trigger"})),
        "label-noise": (frozenset({"source"}), frozenset({"target"})),
        "targeted-misclassification": (frozenset({"target", "test_indices"}), frozenset({"source"})),
        "self-concealment": (frozenset({"test_indices"}), frozenset({"source"})),
        "all-to-all": (frozenset(), frozenset({"trigger"})),
        "availability": (frozenset(), frozenset()),
    }
)


def find_class(value: str | int, class_names: Sequence[str], *, option: str = "class") -> int:
    """The number of a class that is given by name (in any case) or by number.

    Raises:
        InputError: there is no such class, or several have the name.

    >>> find_class("bag", ("shoe", "Bag")), find_class("0", ("shoe", "Bag")), find_class(1, ("shoe", "Bag"))
    (1, 0, 1)
    """
    text = str(value)
    if isinstance(value, str):
        named = [label for label, name in enumerate(class_names) if name == text] or [
            label for label, name in enumerate(class_names) if name.casefold() == text.casefold()
        ]
        if len(named) == 1:
            return named[0]
        if named:
            raise InputError(f"{option} {text}: the classes {named} all have this name; give the number")
    if text.isascii() and text.isdigit() and int(text) < len(class_names):
        return int(text)
    shown = ", ".join(class_names[:12]) + (", ..." if len(class_names) > 12 else "")
    raise InputError(
        f"{option} {text}: no such class; give a name ({shown}) or a number 0..{len(class_names) - 1}"
    )


def make_trigger(value: str | Trigger, *, option: str = "trigger") -> Trigger:
    """The trigger of that name, or the picture in that file, flush into the bottom right corner.

    Raises:
        InputError: it is neither a known name nor an image file.

    >>> make_trigger("white-corner").name
    'white 3x3 corner'
    """
    if isinstance(value, Trigger):
        return value
    if value in TRIGGERS:
        return TRIGGERS[value]()
    if not Path(value).is_file():
        raise InputError(f"{option} {value}: neither one of {', '.join(TRIGGERS)} nor an image file")
    return PatchTrigger.from_image(value, row=None, column=None)


def make_goal(
    served: Sequence[str],
    kind: str | None = None,
    *,
    class_names: Sequence[str],
    source: str | int | None = None,
    target: str | int | None = None,
    trigger: str | Trigger | None = None,
    test_set: TrainingSet | None = None,
    test_indices: Sequence[int] = (),
    options: Mapping[str, str] = MappingProxyType({}),
) -> Goal:
    """The goal that plain values describe, for an attack that serves some kinds of goal.

    - "backdoor" needs target; it may have source (default: all classes but the target) and trigger (default:
      "white-corner").
    - "label-noise" needs source; it may have target (default: any other class).
    - "targeted-misclassification" needs target and test_indices; source checks the class of the images.
    - "self-concealment" needs test_indices; source checks the class of the images.
    - "all-to-all" may have trigger, "availability" nothing. These have to be named, unless the attack serves
      nothing else.

    Arguments:
        served: `describe(attack).goals`.
        kind: one of them; None takes the first for which what it needs, and nothing else, is given.
        class_names: of the training set.
        source: a class, by name or number.
        target: a class, by name or number.
        trigger: a trigger, its name, or an image file.
        test_set: where the test images lie.
        test_indices: the test images that a goal is about, one or several of one class.
        options: what these arguments are called where they come from, for messages.

    Raises:
        InputError: the attack does not serve the kind, something is missing, has no use or does not exist.
    """
    names = ("kind", "source", "target", "trigger", "test_indices")
    called = {name: options.get(name, name) for name in names}
    values = {"source": source, "target": target, "trigger": trigger, "test_indices": test_indices or None}
    given = {name for name, value in values.items() if value is not None}
    kind = _kind(served, kind, given, called)
    labels: dict[str, Any] = {
        name: None if value is None else find_class(value, class_names, option=called[name])
        for name, value in (("source", source), ("target", target))
    }
    if kind == "availability":
        return Availability()
    if kind in ("backdoor", "all-to-all"):
        stamp = make_trigger("white-corner" if trigger is None else trigger, option=called["trigger"])
        if kind == "all-to-all":
            return AllToAll(stamp, len(class_names))
        return Backdoor(stamp, labels["source"], labels["target"])
    if kind == "label-noise":
        return LabelNoise(labels["source"], labels["target"])
    if test_set is None:
        raise InputError(f"{called['test_indices']}: there is no test set")
    outside = [index for index in test_indices if not 0 <= index < len(test_set)]
    if outside:
        raise InputError(
            f"{called['test_indices']}: test image {outside[0]} is outside 0..{len(test_set) - 1}"
        )
    concealed = SelfConcealment.of(test_set, test_indices)
    own = concealed.true_label
    if labels["source"] not in (None, own):
        raise InputError(
            f"{called['source']} {class_names[labels['source']]}: test image {test_indices[0]} is of class "
            f"{class_names[own]}"
        )
    if kind == "self-concealment":
        return concealed
    if labels["target"] == own:
        raise InputError(
            f"{called['target']} {class_names[own]}: test image {test_indices[0]} is of this class already"
        )
    return TargetedMisclassification.of(test_set, test_indices, target=labels["target"])


def _kind(served: Sequence[str], kind: str | None, given: set[str], called: Mapping[str, str]) -> str:
    """The kind of goal; everything it needs is given, and nothing without use."""
    if kind is not None and kind not in served:
        raise InputError(f"{called['kind']} {kind}: {nearest(kind, served)}")
    if kind is None:
        # What needs nothing has to be named: it is not what is wanted where something was forgotten.
        choice = [one for one in served if one not in _NEEDED or _NEEDED[one][0]] or list(served)
        fitting = [
            one
            for one in choice
            if one in _NEEDED and _NEEDED[one][0] <= given <= _NEEDED[one][0] | _NEEDED[one][1]
        ]
        kind = fitting[0] if fitting else choice[-1]
    if kind not in _NEEDED:
        raise InputError(
            f"{called['kind']} {kind}: can be made in Python alone; there are {', '.join(_NEEDED)}"
        )
    needed, optional = _NEEDED[kind]
    for name in sorted(needed - given):
        raise InputError(f"{called[name]}: the goal {kind!r} needs it")
    for name in sorted(given - needed - optional):
        raise InputError(f"{called[name]}: the goal {kind!r} has no use for it")
    return kind
