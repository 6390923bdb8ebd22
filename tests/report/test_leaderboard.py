"""The leaderboard: every number has its n, every cell links to its trials, no text of data is executed."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from chromium import BROWSER, FLAGS, in_browser
from trials import TRIAL
from unpoison.evaluation import Results, leaderboard
from unpoison.evaluation._results import _KEYED
from unpoison.report import leaderboard_html, leaderboard_latex, leaderboard_markdown, write_leaderboard
from unpoison.report._matrix import matrices

HOSTILE = "<script>alert(1)</script> | & % \\input{x} {{ 7 * 7 }}"


def make_results(*changes: dict[str, Any], planned: int = 9, failures: tuple[str, ...] = ()) -> Results:
    rows = [{**TRIAL, "key": f"{place:032x}", **one} for place, one in enumerate(changes)]
    table = pa.Table.from_pylist(rows, schema=_KEYED)
    return Results("made", table, planned, failures, Path(), {"description": f"from data: {HOSTILE}"})


FOUND = {
    "control": "",
    "detector": "corner",
    "unlearner": "retrain",
    "observed": True,
    "flagged": 9,
    "found": True,
    "true_positives": 5,
    "false_positives": 4,
    "clean_examples": 490,
    "average_precision": 0.5,
    "class_false_positives": [4, 0],
    "class_clean": [240, 250],
    "attack_successes": 1,
    "clean_correct": 78,
    "seconds_find": 2.0,
    "seconds_heal": 1.0,
}


class Inventory(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def inventory(page: str) -> Inventory:
    found = Inventory()
    found.feed(page)
    return found


def test_the_policy_allows_the_one_style_and_the_one_script() -> None:
    page = leaderboard_html(make_results({}, FOUND))
    [policy] = [
        a["content"] for _, a in inventory(page).tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    for name in ("style", "script"):
        [text] = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")


def test_nothing_is_fetched_and_no_attribute_is_executed() -> None:
    for tag, attributes in inventory(leaderboard_html(make_results({}, FOUND))).tags:
        assert tag not in ("img", "iframe", "object")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name != "style"
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith(("#", "data:"))


def test_every_cell_links_to_its_trials() -> None:
    page = inventory(leaderboard_html(make_results({}, FOUND, {**FOUND, "seed": 1})))
    anchors = {a["id"] for _, a in page.tags if "id" in a}
    links = [a["href"] for tag, a in page.tags if tag == "a" and str(a["href"]).startswith("#trials-")]
    assert {"#trials-1", "#trials-2"} == set(links)
    assert {str(link)[1:] for link in links} <= anchors
    assert f"{2:032x}" in page.text


def test_numbers_stand_beside_their_n() -> None:
    text = leaderboard_markdown(make_results({}, FOUND, {**FOUND, "seed": 1, "clean_correct": 82}))
    line = next(line for line in text.splitlines() if "corner → retrain" in line)
    assert "2.5 ± 0.0 % (0 of 2 trials; 0.0–65.8 %)" in line
    assert "80.0 ± 2.8 % (n = 2)" in line
    assert "50.0 % (10 of 20; 29.9–70.1 %)" in line
    assert "1.7 % (n = 2)" in line
    assert "0.500 ± 0.000 (n = 2)" in line
    assert line.endswith("| 2 |")
    cells = [cell for cell in line.split(" | ")[2:-1] if cell != "–"]
    assert all(re.search(r"n = \d|\d of \d", cell) for cell in cells), cells


def test_a_repair_is_judged_by_what_it_removed() -> None:
    repair = {"rounds": 2, "outcome": "repaired", "removed": 12, "removed_poisons": 10}
    left = {**repair, "seed": 1, "rounds": 3, "outcome": "poison remains", "removed": 8, "removed_poisons": 8}
    text = leaderboard_markdown(make_results({}, {**FOUND, **repair}, {**FOUND, **left}))
    heading = next(line for line in text.splitlines() if line.startswith("| Method"))
    line = next(line for line in text.splitlines() if "corner → retrain" in line)
    cells = dict(zip(heading.split(" | "), line.split(" | "), strict=True))
    assert cells["Recall"].startswith("90.0 % (18 of 20;")
    assert cells["Precision"].startswith("90.0 % (18 of 20;")
    assert cells["False positives"].startswith("0.2 % (2 of 980;")
    assert cells["Repaired"].startswith("50.0 % (1 of 2;")
    assert cells["Rounds"] == "2.50 (1 of 2 end with an empty trace)"


def test_certificates_and_noise_stand_beside_their_n() -> None:
    votes = [{"seed": seed, "certified": [80, 60 - seed, 50, 40, 30, 20]} for seed in (0, 1)]
    text = leaderboard_markdown(make_results(*votes))
    assert "59.5 % (119 of 200; " in text
    assert "; 20.0 % under 5)" in text
    short = leaderboard_markdown(make_results({"certified": [80]}))
    assert "0 % (0 of 100; " in short
    assert "; 0 % under 5)" in short
    noise = [
        {"seed": seed, "noise_score": score, "noise_remembered": 7, "noise_total": 50}
        for seed, score in ((0, 1.5), (1, 2.5))
    ]
    assert "| 2.000 ± 0.707 (n = 2; 14 of 100 remembered) |" in leaderboard_markdown(make_results(*noise))
    plain = leaderboard_markdown(make_results({}))
    assert "Certified" not in plain
    assert "Noise" not in plain


def test_empty_columns_are_left_out() -> None:
    assert "Filter bias" not in leaderboard_markdown(make_results({}))
    assert "Filter bias" in leaderboard_markdown(make_results({}, FOUND))


@pytest.mark.parametrize("place", ["detector", "source", "attack"])
def test_text_from_data_stays_text(place: str) -> None:
    hostile = make_results({**FOUND, place: HOSTILE}, failures=(HOSTILE,))
    page = leaderboard_html(hostile)
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in page
    assert "49" not in inventory(page).text.replace("490", "").split("alert(1)")[1][:40]
    assert "<script" not in leaderboard_markdown(hostile)
    if place == "detector":
        assert r"alert(1)$<$/script$>$ | \& \% \textbackslash{}input\{x\}" in leaderboard_latex(hostile)


def test_markdown_and_latex_have_as_many_cells_as_headings() -> None:
    results = make_results({}, {**FOUND, "detector": "a|b&c"})
    rows = [line for line in leaderboard_markdown(results).splitlines() if line.startswith("|")]
    assert len({len(re.split(r"(?<!\\)\|", row)) for row in rows}) == 1
    latex = [line for line in leaderboard_latex(results).splitlines() if line.endswith(r"\\")]
    assert len({len(re.split(r"(?<!\\)&", line)) for line in latex}) == 1
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", leaderboard_latex(results))
    assert columns is not None
    assert len(columns[1]) == len(re.split(r"(?<!\\)&", latex[0]))


def test_a_matrix_has_a_row_for_each_method_and_a_column_for_each_attack() -> None:
    attacks = ("badnets", "wanet", HOSTILE)
    alone = {**FOUND, "unlearner": "none"}
    results = make_results(
        *({"attack": attack, "attack_successes": 2} for attack in attacks),
        *(
            {**FOUND, "attack": attack, "true_positives": count}
            for attack, count in zip(attacks, (5, 3, 1), strict=True)
        ),
        *(
            {**alone, "attack": attack, "detector": "other", "number": n}
            for attack in attacks[:2]
            for n in (0, 1)
        ),
    )
    found = {matrix.title: matrix for matrix in matrices(leaderboard(results))}
    # A detector that healed nothing says nothing of success; nor does the absence of a defense of recall.
    assert [name for name, _ in found["Attack success"].rows] == ["no defense", "corner → retrain"]
    recall = found["Recall"]
    assert [name for name, _ in recall.rows] == ["corner → retrain", "other"]
    total = TRIAL["poisons"]
    assert recall.rows[0][1] == (5 / total, 3 / total, 1 / total)
    assert recall.rows[1][1] == (5 / total, 5 / total, None)
    assert recall.trials == (1, 2)
    assert [cells[-1] for _, cells in recall.shaded_rows()] == [("30.0 %", 2), ("50.0 %", 2)]
    assert found["Seconds"].rows[0] == ("corner → retrain", (3.0, 3.0, 3.0))
    assert [shade for _, shade in next(iter(found["Seconds"].shaded_rows()))[1]] == [5, 5, 5, 5]
    markdown, page = leaderboard_markdown(results), leaderboard_html(results)
    assert (
        "**Recall**: share of the poisoned examples that are flagged; each number is of 1 to 2 trials."
        in markdown
    )
    assert "| other | 50.0 % | 50.0 % | – | 50.0 % |" in markdown
    assert "<script>alert" not in page
    assert page.count('class="board matrix"') == len(found)


def test_a_number_is_of_the_trials_that_have_it() -> None:
    rows = [{**FOUND, "attack": attack, "seed": seed} for attack in ("a", "b", "c") for seed in (0, 1)]
    rows += [{**row, "detector": "other"} for row in rows]
    rows[0] = {**rows[0], "observed": False, "average_precision": None}
    found = {matrix.title: matrix for matrix in matrices(leaderboard(make_results(*rows)))}
    assert found["Average precision"].trials == (1, 2)
    assert found["Recall"].trials == (2, 2)


def test_healing_without_a_part_of_the_poison_is_named_by_the_part() -> None:
    rows = [{**FOUND, "attack": attack, "control": part} for attack in "abc" for part in ("", "undetected")]
    found = {matrix.title: matrix for matrix in matrices(leaderboard(make_results(*rows)))}
    assert [name for name, _ in found["Attack success"].rows] == [
        "corner → retrain",
        "corner → retrain, undetected",
    ]


def test_two_attacks_make_no_matrix() -> None:
    results = make_results({}, FOUND, {"attack": "wanet"}, {**FOUND, "attack": "wanet"})
    assert not list(matrices(leaderboard(results)))
    assert "Methods against attacks" not in leaderboard_html(results)


def test_growth_is_shown_where_there_are_several_budgets() -> None:
    assert "Growth with the budget" not in leaderboard_html(make_results({}, FOUND))
    assert "Growth with the budget" in leaderboard_html(make_results({}, {"budget": 0.04}))


def test_methods_are_compared_with_no_defense_and_with_each_other() -> None:
    other = {**FOUND, "detector": "other"}
    page = leaderboard_html(make_results({"control": "no attack"}, {}, FOUND, other))
    section = page.split('id="comparisons"')[1].split("</section>")[0]
    pairs = re.findall(r'<tr><td class="text">(.*?)</td><td class="text">(.*?)</td>', section)
    assert pairs == [
        ("corner → retrain", "no defense"),
        ("other → retrain", "no defense"),
        ("corner → retrain", "other → retrain"),
    ]


def test_failures_and_missing_trials_are_shown() -> None:
    page = inventory(leaderboard_html(make_results({}, planned=9, failures=("ValueError: broken",))))
    assert "of 9 in the recipe" in page.text
    assert "ValueError: broken" in page.text


def test_no_trials_at_all_is_still_a_page(tmp_path: Path) -> None:
    for suffix in ("html", "md", "tex"):
        write_leaderboard(tmp_path / f"board.{suffix}", make_results())
    assert "Trials" in (tmp_path / "board.html").read_text()
    assert (tmp_path / "board.tex").read_text().startswith("% made: 0 of 9 trials")


def test_the_same_results_give_the_same_bytes() -> None:
    assert leaderboard_html(make_results({}, FOUND)) == leaderboard_html(make_results({}, FOUND))


def opened(page: str, script: str, other: str, folder: Path, *, width: int = 1400) -> str:
    """The page as a browser has it after running `other` in place of its script."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    changed = page.replace(script, other).replace(digest(script), digest(other))
    (folder / "page.html").write_text(changed, encoding="utf-8")
    assert BROWSER is not None
    wanted = ["--dump-dom", f"--window-size={width},2000", f"--user-data-dir={folder / 'profile'}"]
    command = [BROWSER, "--headless", *FLAGS, *wanted, f"file://{folder / 'page.html'}"]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()


@in_browser
@pytest.mark.parametrize(("clicks", "order"), [(1, ["0.78", "0.8", "0.9"]), (2, ["0.9", "0.8", "0.78"])])
def test_a_click_sorts(clicks: int, order: list[str], tmp_path: Path) -> None:
    page = leaderboard_html(make_results({}, FOUND, {**FOUND, "detector": "other", "clean_correct": 90}))
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    clicking = script + "document.querySelectorAll('.sortable th button')[3].click();" * clicks
    board = opened(page, script, clicking, tmp_path).split("<tbody>")[1].split("</tbody>")[0]
    values = [re.findall('data-value="([^"]*)"', row) for row in board.split("<tr")[1:]]
    assert [row[3] for row in values] == order


DEFENDED = {
    "control": "",
    "defense": "epic (released-40-0.1)",
    "attack_successes": 0,
    "dropped": 100,
    "dropped_poisons": 8,
    "examples": 500,
    "seconds_train": 15.0,
}


def test_a_defense_is_compared_with_no_defense_in_drops_and_time() -> None:
    results = make_results({"seconds_train": 10.0}, DEFENDED)
    page = leaderboard_markdown(results)
    [undefended, defended] = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert undefended.startswith("| no defense |")
    assert "10 s (1.00x; n = 1)" in undefended
    assert defended.startswith("| epic (released-40-0.1) |")
    assert "15 s (1.50x; n = 1)" in defended
    assert "80.0 % (8 of 10;" in defended  # recall
    assert "8.0 % (8 of 100;" in defended  # precision
    assert "18.8 % (92 of 490;" in defended  # false positives
    for written in (leaderboard_html(results), leaderboard_latex(results)):
        for words in ("epic (released-40-0.1)", "Recall", "False positives", "1.50x"):
            assert words in written


def test_without_defenses_the_table_has_no_time_of_training() -> None:
    page = leaderboard_markdown(make_results({"seconds_train": 10.0}, {**FOUND, "seconds_train": 10.0}))
    assert "Training" not in page.splitlines()[0]


def test_one_input_a_trial_gives_one_rate_and_one_column() -> None:
    one = {"attack_total": 1, "attack_successes": 1}
    results = make_results(one, {**FOUND, **one, "attack_successes": 0})
    [heading, _, undefended, found, *_] = leaderboard_markdown(results).splitlines()
    assert heading.count("ttack success") == 1
    assert "100 % (1 of 1; 20.7–100.0 %)" in undefended
    assert "0 % (0 of 1; 0.0–79.3 %)" in found
    section = leaderboard_html(results).split('id="comparisons"')[1].split("</section>")[0]
    assert "Successful trials" not in section
    assert section.count("Attack success") == 1
    several = leaderboard_html(make_results({}, FOUND)).split('id="comparisons"')[1].split("</section>")[0]
    assert "Successful trials" in several


@in_browser
@pytest.mark.parametrize("width", [700, 1100, 1400, 1800])
def test_nothing_of_the_table_is_cut_off(width: int, tmp_path: Path) -> None:
    """Every column is used; the script reports how far the widest row reaches beyond the page."""
    page = leaderboard_html(make_results({"seconds_train": 10.0, "peak_bytes": 8e8}, FOUND, DEFENDED))
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    measuring = script + (
        "const right = (e) => e.getBoundingClientRect().right;"
        "document.title = `${Math.max(...[...document.querySelectorAll('.sortable td')].map(right))}"
        " ${innerWidth}`;"
    )
    title = re.search(
        r"<title>([\d.]+) (\d+)</title>", opened(page, script, measuring, tmp_path, width=width)
    )
    assert title is not None
    assert int(title[2]) == width
    assert width / 2 < float(title[1]) <= width
