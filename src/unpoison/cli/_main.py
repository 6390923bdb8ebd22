"""`main`: parse, call the verb, turn what happens into one of the exit statuses of `_status`."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from unpoison.cli._console import Console
from unpoison.cli._interrupts import Interrupts, Terminated
from unpoison.cli._status import BAD_INPUT, BUG, DONE, INTERRUPTED, TERMINATED
from unpoison.errors import InputError, MissingExtraError, UnpoisonError, printable

if TYPE_CHECKING:
    from unpoison.cli._options import Verb

_ADVICE = {
    errno.ENOENT: "no such file or folder; check the path",
    errno.EISDIR: "is a folder; give a file",
    errno.ENOTDIR: "lies in a file, not in a folder; check the path",
    errno.EACCES: "permission denied; check who may read or write it",
    errno.EROFS: "cannot be written, its file system is read-only; name another place",
    errno.ENOSPC: "there is no space left on the device; free some, or name another place",
}


class _Body(Protocol):
    def __call__(self, options: Verb, console: Console, interrupts: Interrupts) -> int: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `unpoison` and return its exit status.

    Arguments:
        arguments: what follows `unpoison` on the command line; those of this process when None.

    >>> main(["--version"])
    unpoison ...
    0
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with Interrupts() as interrupts:
            return _run(given, interrupts)
    except UnpoisonError as error:
        return _complain(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        return _complain("interrupted; nothing was written", INTERRUPTED)
    except Terminated:
        return _complain("terminated; nothing was written", TERMINATED)
    except BrokenPipeError:
        # Whoever read our output has gone (`unpoison ... | head`); Python must not flush it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        if error.filename is None and error.strerror is None:
            return _bug()
        place = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        told = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        return _complain(f"{place}{told}", BAD_INPUT)
    except Exception:
        return _bug()


def _run(arguments: Sequence[str], interrupts: Interrupts) -> int:
    if arguments == ["--version"]:
        from unpoison import __version__

        print(f"unpoison {__version__}")  # noqa: T201
        return DONE
    if arguments[:1] == ["craft"] and "--list" in arguments:
        print(_list_of_attacks())  # noqa: T201
        return DONE
    began = time.perf_counter()
    options = parse(arguments)
    if options is None:
        return DONE
    verb = type(options).__name__.lower()
    # The verb's body is what imports torch; until here nothing has.
    module = {"trace": "search", "scan": "search", "similar": "index"}.get(verb, verb)
    body = cast("_Body", getattr(importlib.import_module(f"unpoison.cli._{module}"), verb))
    console = Console(results=not options.run.json, since=began, as_json=options.run.progress == "json")
    return body(options, console, interrupts)


def _list_of_attacks() -> str:
    """Every attack with its paper, the labels of its poisons, what it needs and what it costs."""
    from unpoison import attacks

    return "\n".join(
        f"{method.name}: {method.title} ({method.paper})\n"
        f"    labels     {method.labels}\n"
        f"    goals      {', '.join(method.goals)}\n"
        f"    presets    {', '.join(method.presets)}\n"
        f"    knowledge  {method.knowledge}\n"
        f"    cost       {method.cost}"
        for method in map(attacks.describe, attacks.names())
    )


def parse(arguments: Sequence[str]) -> Verb | None:
    """The options that the arguments spell, or None when help was asked for and has been given.

    Raises:
        InputError: they spell none.
        MissingExtraError: tyro, which reads command lines, is not installed.
    """
    try:
        import tyro
    except ImportError:
        raise MissingExtraError("the command needs tyro, which is not installed; pip install tyro") from None
    from unpoison.cli._options import CommandLine

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options: Verb = tyro.cli(
                CommandLine,
                prog="unpoison",
                description="Find, remove and withstand poison in training data.",
                args=list(arguments),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as end:
        if not end.code:
            return None
        raise InputError(one_line(complaint.getvalue())) from None
    return options


def one_line(box: str) -> str:
    """What tyro says in a box of several lines, in one.

    >>> one_line('''
    ... ╭─ Value error ───────────────────────────────╮
    ... │ Error parsing --seed: invalid literal: 'a'  │
    ... │ ─────────────────────────────────────────── │
    ... │ For full helptext, see unpoison --help      │
    ... ╰─────────────────────────────────────────────╯
    ... ''')
    "error parsing --seed: invalid literal: 'a'; see unpoison --help"
    """
    if "╭" in box:
        lines = [re.sub(r"^│ ?|\s*│$", "", line.rstrip()) for line in box.splitlines()]
    else:  # where standard output is not UTF-8 there is no frame; the title stands above the first rule
        lines = [line.removeprefix("  ").rstrip() for line in box.splitlines()]
        lines = lines[
            next((place for place, line in enumerate(lines) if set(line.strip()) == {"-"}), -1) + 1 :
        ]
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r"[╭╰].*|\s*(─+|-{5,}|)\s*", line):
            parts.append([])
        elif not line.startswith("     "):  # what is indented that far is the help of an option
            parts[-1].append(line.strip())
    said = [part for part in parts if part and not part[0].startswith("Argument helptext")]
    helps = re.findall(r"(unpoison(?: [a-z]+)? --help)", box)
    said = [part for part in said if not part[0].startswith("For full helptext")]
    sentences = []
    for part in said:
        head, rest = part[0], part[1:]
        if head.endswith(":") and rest:
            text = f"{head} {', '.join(entry for entry in rest if not entry.startswith('in '))}"
        else:
            text = " ".join(part)
        text = re.sub(r"\s+", " ", text).rstrip(". ")
        sentences.append(text[:1].lower() + text[1:])
    hint = f"; see {helps[-1]}" if helps else ""
    return ("; ".join(sentences) or "the command line could not be read") + hint


def _complain(text: str, status: int) -> int:
    print(f"unpoison: error: {printable(' '.join(text.split()))}", file=sys.stderr)  # noqa: T201
    return status


def _bug() -> int:
    traceback.print_exc()
    return _complain("this is a bug in unpoison; please report it with the lines above", BUG)
