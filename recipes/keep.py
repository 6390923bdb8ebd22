"""Keep what a recipe gave beside it: recipes/results/NAME.json and NAME.md, with date and machine.

unpoison bench recipes/NAME.toml --out STORE
python -m recipes.keep STORE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def keep(store: Path, command: str, *, results: Path = RESULTS, **more: Any) -> None:
    """Write the record and the page of a finished store.

    Arguments:
        store: where `unpoison bench` left its record and its table.
        command: what made it.
        results: where to write.
        **more: what else the record is to hold; `runs` are shown as a table.

    Raises:
        SystemExit: nothing has been finished there, or several recipes.
    """
    tables = sorted(path for path in store.glob("*.json") if path.with_suffix(".md").exists())
    if len(tables) != 1:
        raise SystemExit(f"{store}: {len(tables)} finished recipes there, expected one")
    record = json.loads(tables[0].read_text(encoding="utf-8")) | more
    name = record["recipe"]
    results.mkdir(exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = _page(record, tables[0].with_suffix(".md").read_text(encoding="utf-8"), command)
    (results / f"{name}.md").write_text(page, encoding="utf-8")


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
