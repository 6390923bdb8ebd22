"""The measured tables are what the stored results say."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

STORY = {
    "results": {
        "clean_accuracy_before": 0.9,
        "clean_accuracy_after": 0.89,
        "clean_accuracy_control": 0.895,
        "attack_success_before": 0.98,
        "attack_success_after": 0.0,
        "precision": 0.9615,
        "recall": 1.0,
        "flagged": 78,
        "measured": {"recall": {"rate": 1.0, "successes": 75, "trials": 75, "interval": [0.951, 1.0]}},
    },
    "seconds": {"trace": 20.0, "total": 123.4},
    "device": {"name": "a processor", "threads": 2},
    "versions": {"torch": "2.13.0", "python": "3.11.2"},
    "started": "2026-11-21T10:00:00+00:00",
}


def line(
    attack: str,
    *,
    defense: str = "none",
    detector: str = "none",
    control: str = "",
    hits: int = 0,
    precision: float | None = None,
) -> dict[str, Any]:
    """A line of a recipe's record."""
    return {
        "attack": attack,
        "defense": defense,
        "detector": detector,
        "control": control,
        "success": {"rate": hits / 10, "successes": hits, "trials": 10, "interval": [0.0179, 0.4042]},
        "clean_accuracy": {"mean": 0.66, "deviation": 0.0, "n": 10},
        "average_precision": {"mean": precision, "deviation": None, "n": 4},
    }


RESULTS: dict[str, Mapping[str, Any]] = {
    "demo": STORY,
    "cifar10_badnets": {
        "machine": {"device": "CPU", "threads": 2},
        "clean_accuracy_before": {"rate": 0.8, "successes": 8000, "trials": 10000, "interval": [0.79, 0.81]},
        "attack_success_before": {"rate": 0.9, "successes": 900, "trials": 1000, "interval": [0.88, 0.92]},
        "clean_accuracy_control": {"rate": 0.81, "successes": 8100, "trials": 10000, "interval": [0.8, 0.82]},
        "recipe": {"model": "resnet9", "epochs": 8},
        "presets": {
            "calibrated": {
                "flagged": 510,
                "precision": 0.95,
                "recall": 0.97,
                "p_value": None,
                "seconds": {"find": 90.5, "factors": 60.0, "heal": 300.0},
                "clean_accuracy_after": {
                    "rate": 0.8,
                    "successes": 8000,
                    "trials": 10000,
                    "interval": [0.79, 0.81],
                },
                "attack_success_after": {
                    "rate": 0.01,
                    "successes": 10,
                    "trials": 1000,
                    "interval": [0.0, 0.02],
                },
            }
        },
        "seconds": {"train": 310.0, "control": 305.0},
    },
    "influence": {
        "ratios": {
            "kronfluence query by query": 41.26,
            "kronfluence batched": 4.0,
            "kronfluence factors": 1.2,
        },
        "agreement": {"relative_damping_same_sign": 1.0},
        "seconds": {
            "factors": 2.0,
            "scores": 1.0,
            "kronfluence_factors": 2.4,
            "kronfluence_batched": 4.0,
            "kronfluence_query_by_query": 41.26,
        },
        "work": {"model": "resnet9, width 8", "by batch": {"1": 2}},
        "machine": {"processor": "a processor", "cores": 2},
        "command": "python -m benchmarks.influence --json",
    },
    "training": {"ratios": {"plain loop, sample": 2.54}, "images_per_second": {"sample: ours": 5000.4}},
    "growth": {
        "points": [
            {
                "images": 1250,
                "queries": 50,
                "seconds": {"factors": 1.0, "queries": 0.1, "scores": 2.0},
                "peak_bytes": 5e8,
            }
        ]
    },
    "unlearning": {
        "lines": [
            {
                "condition": condition,
                "method": method,
                "victims": 3,
                "attack_success": success,
                "clean_accuracy": accuracy,
                "seconds": 2.0,
                "part_of_retraining": part,
                "as_good_in_a_fifth": True,
            }
            for condition, method, success, accuracy, part in (
                ("half", "recant (ours)", 0.3, 0.9, 0.2),
                ("exact", "recant (ours)", 0.0, 0.905, 0.15),
                ("exact", "retrain", 0.0, 0.913, 1.0),
            )
        ]
    },
    "detectors-sample": {
        "lines": [
            line("badnets", detector="delta-influence (calibrated)", precision=0.99),
            line("badnets", detector="trak", precision=0.7),
            line("badnets", detector="spectre", precision=0.2),
            line("badnets", detector="perfect", precision=1.0, control="perfect filter"),
        ]
    },
    "matching-cifar10": {
        "lines": [
            line("gradient-matching", control="no attack"),
            line("gradient-matching", defense="epic (a)", hits=10),
            line("gradient-matching", defense="epic (b)", hits=1),
            line("gradient-matching", defense="random-drop like epic (b)", hits=0, control="random drop"),
        ]
    },
    "metapoison_success_fine_tuning_poisoned_trajectory": {
        "rows": [
            {"attack": attack, "budget": 0.02, "victim": victim, "success": success}
            for attack, victim, success in (
                (
                    "metapoison",
                    "same",
                    {"rate": 0.75, "successes": 15, "trials": 20, "interval": [0.53, 0.89]},
                ),
                ("metapoison", "vgg11", {"rate": 0.0, "successes": 0, "trials": 20, "interval": [0.0, 0.2]}),
                ("gradient-matching", "same", {"rate": 0.7, "successes": 14, "trials": 20}),
            )
        ],
        "ahead": [
            {
                "of": "gradient-matching",
                "budget": 0.02,
                "victim": "same",
                "difference": 0.05,
                "interval": [-0.1, 0.2],
            }
        ],
    },
    "transfer": {
        "rows": [
            {
                "attack": attack,
                "knowledge": "white box",
                "layer": "not augmented, fitted",
                "success": {"rate": rate, "successes": 1, "trials": 20},
            }
            for attack, rate in (
                ("feature-collision-released", 0.15),
                ("convex-polytope", 0.35),
                ("bullseye-polytope", 1.0),
            )
        ]
    },
    "triggers": {
        "attacks": {
            "badnets": {"labels": "dirty", "success": {"rate": 0.99, "successes": 99, "trials": 100}},
            "wanet": {"labels": "dirty", "success": {"rate": 0.95, "successes": 95, "trials": 100}},
            "sig": {"labels": "clean", "success": {"rate": 0.1, "successes": 10, "trials": 100}},
        }
    },
    "false_alarms": {"model": "convnet-bn", "errors": 25, "false_alarms": 1, "interval": [0.0071, 0.1954]},
    "something_else": {"nested": {"a|b": [1, 2]}, "rows": [{"x": 1}, {"y": None}], "flag": True, "empty": []},
}


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "scripts/make_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_up_to_date(tables: ModuleType) -> None:
    for name, content in tables.written().items():
        assert (ROOT / name).read_text(encoding="utf-8") == content, (
            f"{name}: run python scripts/make_tables.py"
        )


def test_a_long_command_is_told_by_the_name_of_its_result(tables: ModuleType) -> None:
    long = f"python -m benchmarks.crafting --recipe '{'x ' * 200}' --write from_scratch"
    assert tables.short(long) == "python -m benchmarks.crafting … --write from_scratch"
    unnamed = long.replace(" --write from_scratch", "")
    for command in ("make demo", "python -m benchmarks.crafting --write quick", unnamed):
        assert tables.short(command) == command


def test_every_known_result_is_told(tables: ModuleType) -> None:
    told = tables.numbers(RESULTS)
    for words in (
        "| 123 s |",
        "98.0 % → 0.0 %",
        "90.0 % → 89.0 %; never poisoned: 89.5 %",
        "100.0 % (75 of 75)",
        "41.3x",
        "2.5x (plain loop, sample)",
        "1 of 25 natural errors (95 % interval 0.7 to 19.5 %)",
        "90.0 % (900 of 1,000) → 1.0 % (10 of 1,000)",
        "train 310 s, trace 90.5 s, heal 300 s",
        "success 0.0 %, accuracy 90.5 %, in 0.15 of the time; retraining: success 0.0 %, accuracy 91.3 %",
        "0.990 (n = 4); trak: 0.700",
        "10.0 % (1 of 10), 1.8 to 40.4 %; accuracy 66.0 %",
        "95.0 % (95 of 100): wanet, of 2",
        "75.0 % (15 of 20), 53.0 to 89.0 %; gradient matching: 70.0 % (14 of 20), "
        "MetaPoison ahead by 5 points (-10 to 20)",
        "15 %, 35 %, 100 % (n = 20; feature collision as released)",
    ):
        assert words in told, words
    assert "not measured | published: 99.1 % → 0.4 %" in tables.numbers(RESULTS, tables.GPU_ROWS)


def test_any_result_gets_a_section(tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    for name, record in RESULTS.items():
        (tmp_path / f"benchmarks/results/{name}.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "benchmarks/results/growth.svg").touch()
    page = tables.page(tables.read_results(tmp_path), tmp_path)
    for words in (
        "## The demo",
        "| recall | 100.0 % (75 of 75), 95.1 to 100.0 % |",
        "*a processor, 2 threads, python 3.11.2, torch 2.13.0; 2026-11-21*",
        "| 1,250 | 50 | 1.0 s | 0.1 s | 2.0 s | 500 MB |  |",
        "![How time and memory grow](../benchmarks/results/growth.svg)",
        "## Something else",
        "| a\\|b | 1, 2 |",
        "| flag | yes |",
        "| preset | calibrated |",
        "| p value | - |",
        "*CPU, 2 threads*",
        "Not measured.",
    ):
        assert words in page, words
    assert page == tables.page(tables.read_results(tmp_path), tmp_path)


def test_a_recipe_brings_its_own_page(tables: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "recipes/results"
    folder.mkdir(parents=True)
    (folder / "badnets-sample.json").write_text('{"trials": 9}', encoding="utf-8")
    (folder / "badnets-sample.md").write_text("# badnets-sample\n\n## Rows\n\n| a |\n", encoding="utf-8")
    page = tables.page(tables.read_results(tmp_path), tmp_path)
    assert "## Badnets sample\n\n### Rows\n\n| a |" in page
    assert "trials" not in page


def test_the_page_of_defenses_names_each(tables: ModuleType) -> None:
    assert tables.defenses(None) == "Not measured."
    lines = [
        {**line("gradient-matching", control="no defense", hits=8), "costs": {"seconds": {"train": 2.0}}},
        {
            **line("gradient-matching", defense="epic (a)", hits=1),
            "costs": {"seconds": {"train": 3.0}},
            "dropped": {"rate": 0.1, "successes": 10, "trials": 100},
            "drop_recall": {"rate": 0.5, "successes": 5, "trials": 10},
        },
    ]
    told = tables.defenses({"lines": lines, "date": "2026-11-21"})
    assert "| no defense | 8 of 10 (2 to 40 %) | 66.0 % |  |  | 1.0 |" in told
    assert "| epic (a) | 1 of 10 (2 to 40 %) | 66.0 % | 10.0 % | 50.0 % | 1.5 |" in told


def test_the_page_of_detectors_names_each(tables: ModuleType) -> None:
    assert tables.found_by(None) == "Not measured."
    few = {"rate": 0.5, "successes": 5, "trials": 10}
    nothing = {"rate": None, "successes": 0, "trials": 0}
    lines = [
        {
            **line("badnets", detector=detector, control=control, precision=0.9),
            "caught": few,
            "precision": few if detector != "none" else nothing,
            "success_rate": {"mean": 0.25},
        }
        for detector, control in (("none", "no attack"), ("trak", ""), ("random, as many", "random filter"))
    ]
    told = tables.found_by({"lines": lines})
    assert "| badnets | no attack |  |  |  | 25.0 % | 66.0 % |" in told
    assert "| badnets | trak | 0.900 | 50.0 % (5 of 10) | 50.0 % (5 of 10) | 25.0 % | 66.0 % |" in told
    assert "random" not in told


def test_without_results_nothing_is_claimed(tables: ModuleType, tmp_path: Path) -> None:
    rows = tables.numbers({}).splitlines()[2:]
    assert rows
    assert all("| not measured |" in row for row in rows)
    assert "Not measured." in tables.page({}, tmp_path)


def test_a_readme_without_markers_is_refused(tables: ModuleType) -> None:
    with pytest.raises(SystemExit, match="needs the lines"):
        tables.in_readme("# unpoison\n", {})
