"""How results read as Markdown: rates, seconds, ratios, and a section of a page for any result.

A `Section` says what was measured and shows the result; its rows go into the README's table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, final

from unpoison._statistics import Proportion

Record = Mapping[str, Any]
NOT_MEASURED: Final = "not measured"
GONE: Final = "measured by a script of version 0.1"


@final
@dataclass(frozen=True)
class Row:
    """A row of the README's table: what was measured, what was wanted, and how the record's value reads.

    `recipe` has taken the place of the script that measured it.
    """

    what: str
    wanted: str
    value: Callable[[Record], str]
    recipe: str = ""

    def cells(self, record: Record | None) -> list[str]:
        """What, value, wanted and command."""
        value = "" if record is None else self.value(record)
        command = "" if record is None else command_of(record)
        if self.recipe:
            command = f"unpoison bench recipes/{self.recipe}.toml"
        made = "" if record is None or not is_gone(command_of(record)) else f" ({GONE})"
        return [self.what, value or NOT_MEASURED, self.wanted, f"`{command}`{made}" if command else ""]


@final
@dataclass(frozen=True)
class Section:
    """What is said about one result: its name and title, what was measured, its rows and its tables."""

    name: str
    title: str
    about: str = ""
    rows: tuple[Row, ...] = ()
    tables: Callable[[Record], Iterator[str]] | None = None

    @classmethod
    def of(
        cls,
        module: str,
        doc: str | None,
        rows: tuple[Row, ...] = (),
        tables: Callable[[Record], Iterator[str]] | None = None,
    ) -> Self:
        """The section of a benchmark, titled and described by its docstring, less the lines of commands.

        Arguments:
            module: whose last part is the result's name.
            doc: the docstring.
            rows: of the README's table.
            tables: its own, in place of the general ones.
        """
        title, _, rest = (doc or "").partition("\n")
        about = "\n".join(line for line in rest.splitlines() if not line.startswith("    ")).strip()
        return cls(module.rpartition(".")[2], title.rstrip("."), about, rows, tables)

    def write(self, record: Record | None) -> str:
        """The section, title included."""
        parts = [f"## {self.title}", self.about, f"{NOT_MEASURED.capitalize()}."]
        if record is not None:
            tables = self.tables or (general if {"ratios", "rates"} <= set(record) else generic)
            parts[2:] = [*tables(record), provenance(record)]
        return "\n\n".join(part for part in parts if part)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without its empty columns; "" without rows."""
    kept = [place for place, _ in enumerate(header) if any(row[place] for row in rows)]
    lines = [[line[place] for place in kept] for line in (header, ["---"] * len(header), *rows)]
    escaped = (" | ".join(cell.replace("|", chr(92) + "|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in escaped) if rows else ""


def proportion(value: Record, *, interval: bool = True) -> str:
    """A rate in percent with its n, and its 95 % interval."""
    rate = Proportion(value["successes"], value["trials"])
    if not rate.trials:
        return "none to measure on"
    told = f"{100 * rate.rate:.1f} % ({rate.successes:,} of {rate.trials:,})"
    low, high = rate.interval()
    return f"{told}, {100 * low:.1f} to {100 * high:.1f} %" if interval else told


def times(ratio: float) -> str:
    """A ratio of times, to a tenth; a small one to its first digit.

    >>> times(18.26), times(0.64), times(0.0217)
    ('18.3x', '0.6x', '0.02x')
    """
    return f"{ratio:.1f}x" if ratio >= 0.095 else f"{ratio:.1g}x"


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f} %"


def against(what: str) -> Callable[[Record], str]:
    """How many times as fast as the peers that did the work `what`: the first, and the others by name."""

    def value(record: Record) -> str:
        told = ""
        for name, ratio in record["ratios"].items():
            peer = name.removeprefix(f"{what}, ")
            if peer != name:
                told += f"; {times(ratio)} ({peer})" if told else times(ratio)
        return told

    return value


def seconds(value: float) -> str:
    """Seconds with the digits that mean something."""
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.1f} s" if value >= 1 else f"{value:.2g} s"


def spread(value: Any) -> str:
    """The least and the median seconds of repeated runs; or of one."""
    if not isinstance(value, Mapping):
        return seconds(value)
    median = f" ({seconds(value['median'])})" if "median" in value else ""
    return seconds(value["minimum"]) + median


def size(count: float) -> str:
    """Bytes in megabytes."""
    return f"{count / 1e6:,.0f} MB"


def rates_of(record: Record) -> str:
    """The table of a record's rates."""
    return table(("rate", "measured"), [[name, proportion(one)] for name, one in record["rates"].items()])


def general(record: Record) -> Iterator[str]:
    """The tables of a record in the shape of `_harness`."""
    yield rates_of(record)
    rows, plain = [], []
    for what, sides in record["seconds"].items():
        if not isinstance(sides, Mapping):
            plain.append([what, spread(sides)])
            continue
        (ours, mine), *peers = sides.items()
        memory = record["peak_bytes"].get(what, {})
        for peer, theirs in peers or [("", None)]:
            rows.append([what, peer, spread(theirs) if theirs else "", spread(mine), str(mine["n"])])
            compared = times(record["ratios"][f"{what}, {peer}"]) if theirs else ""
            differs = record.get("differs", {}).get(what, "nothing: equal work") if theirs else ""
            rows[-1] += [
                compared,
                differs,
                *(size(memory[side]) if side in memory else "" for side in (peer, ours)),
            ]
    header = ("work", "peer", "its seconds, least (median)", "ours", "n", "times as fast", "what differs")
    yield table((*header, "its peak memory", "ours"), rows)
    yield table(("stage", "seconds"), plain)
    agreement = record["agreement"]
    yield table(("agreement", "value"), [[name, text(value)] for name, value in agreement.items()])
    told = "; ".join(f"{name}: {text(value)}" for name, value in record.get("work", {}).items())
    yield f"The work: {told}." if told else ""


def points(what: str) -> Callable[[Record], Iterator[str]]:
    """The tables of a record whose points are processes of their own: seconds and memory, then rates."""

    def tables(record: Record) -> Iterator[str]:
        kinds: dict[tuple[str, ...], list[list[str]]] = {}
        for name, taken in record["seconds"].items():
            held = record["peak_bytes"][name]
            row = [name, *map(seconds, taken.values()), *map(size, held.values())]
            kinds.setdefault((*taken, *held), []).append(row)
        for columns, rows in kinds.items():
            yield table((what, *columns), rows)
        yield rates_of(record)

    return tables


def generic(record: Record) -> Iterator[str]:
    """Any other record: what is flat as one table, each nested part as another; or the page it brings."""
    if "page" in record:  # of a recipe; without its title, its other headings one level down
        lines = record["page"].strip().splitlines()[1:]
        yield "\n".join(f"#{line}" if line.startswith("#") else line for line in lines).strip()
        return
    hidden = ("machine", "device", "versions", "date", "started", "command", "commit", "schema")
    shown = {name.replace("_", " "): value for name, value in record.items() if name not in hidden and value}
    flat = {name: value for name, value in shown.items() if not isinstance(value, Mapping | list)}
    yield table(("result", "value"), [[name, text(value)] for name, value in flat.items()])
    for name, value in shown.items():
        if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            columns = list(dict.fromkeys(key for one in value for key in one))
            rows = [[text(one.get(column)) for column in columns] for one in value]
            yield f"{name.capitalize()}:"
            yield table([column.replace("_", " ") for column in columns], rows)
        elif name not in flat:
            yield f"{name.capitalize()}: {text(value)}."


def text(value: Any) -> str:
    """Any JSON value in a cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        if {"successes", "trials"} <= set(value):
            return proportion(value)
        return ", ".join(f"{str(name).replace('_', ' ')} {text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(text(inner) for inner in value)
    return "" if value is None else " ".join(str(value).split())


def command_of(record: Record) -> str:
    """The command that made a result; of a recipe the one that runs it."""
    recipe = record.get("recipe")
    made = f"unpoison bench recipes/{recipe}.toml" if isinstance(recipe, str) else ""
    return str(record.get("command", made)).strip()


def is_gone(command: str) -> bool:
    """Whether the script of a command has been replaced by a recipe."""
    module = re.match(r"python -m benchmarks\.(\w+)", command)
    return module is not None and not Path(__file__).with_name(f"{module[1]}.py").exists()


def provenance(record: Record) -> str:
    """Command, machine, date and commit in one line."""
    machine: dict[str, Any] = {}
    for part in ("machine", "device", "versions"):
        machine |= record.get(part) or {}
    named = [str(machine[key]) for key in ("device", "processor", "name") if machine.get(key)]
    named += [f"{machine[key]} {key}" for key in ("cores", "threads") if machine.get(key)]
    named += [f"{key} {machine[key]}" for key in ("python", "torch") if machine.get(key)]
    command, date = command_of(record), str(record.get("date", record.get("started", "")))[:10]
    commit = re.sub(r"^(\w{12})\w+", r"\1", record.get("commit") or "")  # with "-dirty", where it is
    made = f"{GONE}: `{command}`" if is_gone(command) else f"`{command}`"
    parts = (made if command else "", ", ".join(named), date, f"commit {commit}" if commit else "")
    return f"*{'; '.join(part for part in parts if part)}*" if any(parts) else ""
