"""Keep the results of a recipe: recipes/results/NAME.json and NAME.md, with date and machine.

unpoison bench recipes/NAME.toml --out STORE
python -m recipes.keep STORE

Of several attacks the record also holds comparisons on the targets and victims that they share.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from unpoison.errors import InputError
from unpoison.evaluation import Results, compare, leaderboard

RESULTS = Path(__file__).parent / "results"


def keep(store: Path, command: str, *, results: Path = RESULTS, **more: Any) -> None:
    """Write the record and the page of a finished store.

    Arguments:
        store: where `unpoison bench` left its record and its table.
        command: what made it.
        results: where to write.
        **more: further entries of the record; `runs` are shown as a table.

    Raises:
        SystemExit: no recipe is finished there, or several are.
    """
    tables = sorted(path for path in store.glob("*.json") if path.with_suffix(".md").exists())
    if len(tables) != 1:
        raise SystemExit(f"{store}: {len(tables)} finished recipes there, expected one")
    record = json.loads(tables[0].read_text(encoding="utf-8")) | more
    name = record["recipe"]
    record["comparisons"] = comparisons(Results.read(store, name))
    results.mkdir(exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = _page(record, tables[0].with_suffix(".md").read_text(encoding="utf-8"), command)
    (results / f"{name}.md").write_text(page, encoding="utf-8")


def comparisons(results: Results) -> list[dict[str, Any]]:
    """How much more often one attack succeeds than another with equal budget and kind of victims.

    The interval of the difference is Tango's over trials, and Student's over targets, which are independent.
    """
    undefended = [line for line in leaderboard(results) if line.control == "no defense"]
    found = []
    for first, second in itertools.combinations(undefended, 2):
        if (first.budget, first.victim) != (second.budget, second.victim):
            continue
        try:
            difference = compare(first, second)
        except InputError:  # they have no target in common
            continue
        found.append(
            {
                "attack": first.attack,
                "than": second.attack,
                "budget": first.budget,
                "victim": first.victim,
                "trials": difference.n,
                "success": list(difference.success),
                "by_target": {
                    **difference.success_by_target.to_dict(),
                    "interval": difference.success_by_target.interval(),
                },
            }
        )
    return found


def _page(record: dict[str, Any], table: str, command: str) -> str:
    machine, versions = record["machine"], record["versions"]
    lines = [
        f"# {record['recipe']}",
        "",
        record["experiment"]["description"],
        "",
        f"{record['date']}, {machine['cores']} cores ({machine['type']}), torch {versions['torch']}, "
        f"unpoison {versions['unpoison']}; {record['trials']} of {record['planned']} trials. "
        f"Made by `{command}`.",
        "",
        table,
    ]
    if "runs" in record:
        lines += [
            f"The same table came out {len(record['runs'])} ways:"
            if record["identical"]
            else "The tables DIFFER:",
            "",
            "| run | trials | seconds | digest of the table |",
            "|---|---|---|---|",
        ]
        for way, run in record["runs"].items():
            if run.get("killed_after_seconds"):
                way += f" (kill -9 after {', '.join(map(str, run['killed_after_seconds']))} s)"
            lines.append(f"| {way} | {run['trials']} | {run['seconds']} | `{run['table']}` |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Keep a store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store", type=Path)
    store = parser.parse_args().store
    name = next((path.stem for path in store.glob("*.md")), "NAME")
    keep(store, f"unpoison bench recipes/{name}.toml")


if __name__ == "__main__":
    main()
