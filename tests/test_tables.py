"""The measured tables are what the stored results say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks import _guide, _ledger, _published, _sections, _tables, tables

from unpoison import attacks, defenses, detectors, input_detectors, unlearners

ROOT = Path(__file__).parents[1]


def rate(successes: int, trials: int) -> dict[str, Any]:
    return {"rate": successes / trials, "successes": successes, "trials": trials}


DEMO = {
    "ratios": {},
    "agreement": {},
    "seconds": {"trace": 20.0, "total": 123.4},
    "peak_bytes": {},
    "rates": {
        "recall": rate(75, 75),
        "precision": rate(75, 78),
        "attack success, poisoned": rate(98, 100),
        "attack success, healed": rate(0, 100),
        "attack success, never poisoned": rate(0, 100),
        "clean accuracy, poisoned": rate(900, 1000),
        "clean accuracy, healed": rate(890, 1000),
        "clean accuracy, never poisoned": rate(895, 1000),
    },
    "machine": {"processor": "a processor", "cores": 2, "threads": 1, "python": "3.11.2"},
    "date": "2026-11-21",
    "command": "python -m benchmarks.demo",
    "commit": "abc1234",
}
INFLUENCE = {
    "ratios": {"EK-FAC factors, kronfluence": 1.26, "EK-FAC factors, kronfluence with its files": 1.5},
    "agreement": {"same sign": 1.0},
    "seconds": {
        "EK-FAC factors": {
            "unpoison": {"minimum": 2.0, "median": 2.1, "n": 3},
            "kronfluence": {"minimum": 2.52, "median": 150.0, "n": 3},
            "kronfluence with its files": {"minimum": 3.0, "median": 3.0, "n": 3},
        },
        "a single step": 0.25,
    },
    "peak_bytes": {"EK-FAC factors": {"unpoison": 5e8, "kronfluence": 6e8}},
    "rates": {},
    "differs": {},
}


def line(method: str, *, control: str = "", kind: str = "detector", hits: int = 0) -> dict[str, Any]:
    """A line of a recipe's record."""
    return {
        "attack": "gradient-matching",
        "defense": "none",
        "detector": "none",
        kind: method,
        "control": control,
        "success": rate(hits, 10),
        "success_rate": {"mean": hits / 10},
        "clean_accuracy": {"mean": 0.66},
        "average_precision": {"mean": 0.9 if method != "trak" else 0.7, "n": 4},
        "true_positives": rate(5, 10),
        "precision": {"rate": None, "successes": 0, "trials": 0},
    }


def section_of(name: str) -> _tables.Section:
    """The section of a result."""
    return next(one for _, sections in tables.PAGES.values() for one in sections if one.name == name)


def test_the_pages_are_up_to_date() -> None:
    for name, content in tables.written().items():
        assert (ROOT / name).read_text(encoding="utf-8") == content, (
            f"{name}: run python -m benchmarks.tables"
        )
    kept = {f"{tables.FOLDER}/{path.name}" for path in (ROOT / tables.FOLDER).glob("*")}
    assert kept <= set(tables.written()), "pages that nothing writes any more"


def test_every_stored_result_is_on_a_page() -> None:
    pages = tables.pages(tables.read_results())
    told = "\n".join(content for name, content in pages.items() if name != tables.OVERVIEW)
    for name, record in tables.read_results().items():
        assert _tables.provenance(record) in told, name


def test_rows_say_what_was_measured() -> None:
    told = tables.numbers({"demo": DEMO, "influence": INFLUENCE})
    for words in (
        "| 123 s | under 150 s | `python -m benchmarks.demo` |",
        "98.0 % (98 of 100) → 0.0 % (0 of 100) | ≥ 90 % → ≤ 2 % |  |",
        "90.0 % (900 of 1,000) → 89.0 % (890 of 1,000); never poisoned: 89.5 % (895 of 1,000)",
        "96.2 % (75 of 78)",
        "| 1.3x; 1.5x (kronfluence with its files) | ≥ 1x |",
        "| influence of one query on them, against kronfluence | not measured |",
        "| TRAK beside traker | not measured |",
    ):
        assert words in told, words


def test_rows_of_speed_name_what_was_compared() -> None:
    results = tables.read_results()
    empty = {
        row.what
        for section in tables.PAGES["speed"][1]
        for row in section.rows
        if section.name in results and not row.value(results[section.name])
    }
    assert empty <= {"TRAK on 5,000 images, against `traker` with the same projection"}, "not yet measured"


def test_a_row_names_what_there_is(tmp_path: Path) -> None:
    entry = {"benchmark": "training", "rows": [["what", "", "fastest", "x"]]}
    with pytest.raises(AttributeError, match="fastest"):
        _sections.section(entry)


def test_a_comparison_tells_both_sides() -> None:
    told = "\n".join(_tables.general(INFLUENCE))
    both = "| 2.5 s (150 s) | 2.0 s (2.1 s) | 3 | 1.3x | nothing: equal work | 600 MB | 500 MB |"
    assert f"| EK-FAC factors | kronfluence {both}" in told
    assert "| a single step | 0.25 s |" in told
    changed = {**INFLUENCE, "differs": {"EK-FAC factors": "fewer passes"}}
    assert "| 1.3x | fewer passes |" in "\n".join(_tables.general(changed))


def test_a_section_names_machine_date_and_commit() -> None:
    told = _tables.Section("demo", "The demo", "What it does.").write(DEMO)
    assert "| recall | 100.0 % (75 of 75), 95.1 to 100.0 % |" in told
    last = "a processor, 2 cores, 1 threads, python 3.11.2; 2026-11-21; commit abc1234*"
    assert told.endswith(f"*`python -m benchmarks.demo`; {last}")
    edited = _tables.provenance({"commit": "0123456789abcdef-dirty"})
    assert edited == "*commit 0123456789ab-dirty*"


def test_a_docstring_is_the_text_of_a_section() -> None:
    doc = "A title.\n\n    python -m benchmarks.one\n\nWhat was measured:\n\n- this;\n"
    section = _tables.Section.of("benchmarks.one", doc)
    assert (section.name, section.title, section.about) == ("one", "A title", "What was measured:\n\n- this;")


def test_recipes_are_ranked_and_held_out() -> None:
    lines = [
        line("none", control="no attack"),
        line("calibrated"),
        line("trak", hits=3),
        line("random, as many as trak", control="random filter"),
    ]
    section = section_of("delta-influence-matching-held-out")
    record = {"lines": lines, "page": "# name\n\n## Rows\n\n| a |", "experiment": {"description": "Why."}}
    assert [row.value(record) for row in section.rows] == [
        "0.900 (n = 4); trak: 0.700",
        "0.0 %, 50.0 % (5 of 10) found",
    ]
    told = section.write(record)
    assert "| gradient-matching | trak | 30.0 % (3 of 10), 10.8 to 60.3 % | 30.0 % | 66.0 % | 0.7 |" in told
    assert "random" not in told
    assert told.startswith(f"## {section.title}\n\nWhy.\n\n| attack |")
    assert "### Rows\n\n| a |" in told


def test_of_several_presets_of_a_defense_the_best_is_told() -> None:
    lines = [
        line("none", kind="defense", control="no defense", hits=10),
        line("epic (a)", kind="defense", hits=4),
        line("epic (b)", kind="defense", hits=1),
        line("random-drop, as many as epic (b)", kind="defense", control="random drop"),
        line("recompression-filter", kind="defense", hits=2),
    ]
    undefended, epic, _ = (row.value({"lines": lines}) for row in section_of("matching-cifar10").rows)
    assert undefended == "100.0 % (10 of 10), 72.2 to 100.0 %; accuracy 66.0 %"
    assert epic == "10.0 % (1 of 10), 1.8 to 40.4 %; accuracy 66.0 %"


def test_studies_tell_the_control() -> None:
    rows = [
        {"attack": attack, "budget": 0.05, "victim": victim, "success": rate(hits, 20)}
        for attack, victim, hits in (
            ("metapoison", "same", 15),
            ("metapoison", "vgg11", 0),
            ("gradient-matching", "same", 14),
        )
    ]
    ahead = {"of": "gradient-matching", "budget": 0.05, "victim": "same", "difference": 0.05}
    control = [{"victim": "same", "success": rate(1, 20)}]
    record = {"rows": rows, "control": control, "ahead": [{**ahead, "interval": [-0.1, 0.2]}]}
    assert section_of("metapoison_success_from_scratch").rows[0].value(record) == (
        "75.0 % (15 of 20), 53.1 to 88.8 %; gradient matching: 70.0 % (14 of 20), MetaPoison ahead by 5 "
        "points (-10 to 20); clean control: 1 of 20"
    )


def test_a_result_that_no_page_knows_gets_one(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks/results"
    folder.mkdir(parents=True)
    record = {"nested": {"a|b": [1, 2]}, "rows": [{"x": 1}, {"y": None, "z": {"ok": True}}], "flag": True}
    (folder / "something_else.json").write_text(json.dumps(record), encoding="utf-8")
    pages = tables.pages(tables.read_results(tmp_path))
    told = pages[f"{tables.FOLDER}/{tables.OTHERS}.md"]
    for words in ("## Something else", "Nested: a|b 1, 2.", "| flag | yes |", "| x | z |", "|  | ok yes |"):
        assert words in told, words
    assert f"results/{tables.OTHERS}" in pages[tables.OVERVIEW]
    assert pages == tables.pages(tables.read_results(tmp_path))


def test_without_results_nothing_is_claimed() -> None:
    rows = tables.numbers({}, every_row=True).splitlines()[2:]
    assert rows
    assert all("| not measured |" in row for row in rows)
    assert all("| not measured |" in row for row in tables.numbers({}).splitlines()[2:])
    assert "Not measured." in tables.pages({})[f"{tables.FOLDER}/speed.md"]


def test_a_number_whose_script_is_gone_names_the_recipe_of_today() -> None:
    row = _tables.Row("rate", "", lambda record: "1 %", "studies/crafting")
    gone, there = "python -m benchmarks.crafting --write x", "python -m benchmarks.tables"
    recipe = "`unpoison bench recipes/studies/crafting.toml`"
    assert row.cells({"command": gone})[-1] == f"{recipe} (measured by a script of version 0.1)"
    assert row.cells({"command": there})[-1] == recipe
    assert row.cells(None)[-1] == recipe
    assert "version 0.1" in _tables.provenance({"command": gone})
    assert "version 0.1" not in _tables.provenance({"command": there})


def test_the_guide_claims_nothing_that_was_not_measured() -> None:
    rows = _guide.situations({}).splitlines()[2:]
    assert len(rows) == len(_guide.SITUATIONS)
    assert all(f"| {_tables.NOT_MEASURED} |" in row for row in rows)
    record = {"rates": {"found": rate(39, 39), "false_alarms_01": {"successes": 0, "trials": 0}}}
    first = _guide.situations({"verdict": record}).splitlines()[2]
    assert "| attacks found at level .01: 100.0 % (39 of 39) |" in first


def test_the_guide_names_methods_that_there_are() -> None:
    known = {name for package in (attacks, defenses, detectors, unlearners) for name in package.names()}
    verbs = {"trace", "scan", "screen", "heal", "repair", "index", "craft"}
    for situation in _guide.SITUATIONS:
        named = {word.split(" ")[-1] for word in re.findall(r"`([a-z -]+)`", situation.take)}
        assert named <= known | verbs | {"published-matching"}, situation.what


@pytest.mark.parametrize(
    ("published", "measured", "order"),
    [
        ((0.95, 0.1), (0.86, 0.19), "yes"),
        ((0.95, 0.1), (1.0, 0.0), "yes"),
        ((0.95, 0.1), (0.84, 0.19), "no: poison"),
        ((0.95, 0.1), (0.86, 0.21), "no: clean"),
        ((0.95, 0.1), (0.0, 1.0), "no: poison and clean"),
        ((0.95, None), (0.9, 1.0), "yes"),
        ((None, None), (0.9, 0.0), _published.UNKNOWN),
    ],
)
def test_a_measured_rate_is_compared_with_the_published_one(
    published: tuple[float | None, float | None], measured: tuple[float, float], order: str
) -> None:
    assert _published.order_of(published, measured) == order


def test_published_figures_are_of_methods_that_there_are_and_nothing_unmeasured_is_judged() -> None:
    detecting = {*detectors.names(), *input_detectors.names()}
    assert {row["name"] for row in _published.FACTS["detectors"]} <= detecting
    every = [*_published.FACTS["attacks"], *_published.FACTS["detectors"]]
    assert {row.get("attack", row["name"]) for row in every} <= set(attacks.names())
    rows = [line for part in _published.page({}) for line in part.splitlines() if line.startswith("| ")]
    assert sum("| not measured |" in row for row in rows) == len(rows) - 4


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match="needs the lines"):
        tables.between(tables.README, "# unpoison\n", tables.BEGIN, tables.END, "| a |")


def test_the_ledger_takes_the_nearest_facts_and_tells_them_once() -> None:
    sections = [
        _tables.Section(name, name.upper(), rows=(_tables.Row("hit", "", lambda record: "1 %"),))
        for name in ("study_a", "study_b", "study_own", "other", "speed")
    ]
    results = {"study_a": {}, "study_b": {}, "study_own": {}, "other": {}, "speed": {"rates": {}}}
    facts = {
        name: dict.fromkeys(("chosen", "confirmed", "version"), f"of {name}")
        for name in ("study_*", "study_own")
    }
    rows = _ledger.ledger(sections, results, facts).splitlines()[-4:]
    assert [row.count("of study_*") for row in rows] == [3, 0, 0, 0]
    assert [row.count("of study_own") for row in rows] == [0, 0, 3, 0]
    assert rows[3].count("not recorded") == 3


def test_every_published_rate_is_in_the_ledger() -> None:
    assert _ledger.UNKNOWN not in tables.pages(tables.read_results())[tables.LEDGER].partition("| ---")[2]
