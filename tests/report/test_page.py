from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from unpoison._statistics import Proportion
from unpoison.detectors import Cause
from unpoison.report import Outcome, ReportData, identifiers_of, render
from unpoison.report._figures import (
    collapses,
    influence_scatter,
    influence_slope,
    outcome_bars,
    score_histogram,
)

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "שלום עולם",
    "endless " * 80,
    "two\nlines\u202eoverridden",
    "{{ 7 * 7 }}{% raw %}",
    "' onload='alert(4)",
    "",
    "</title></style></svg><script>alert(3)</script>",
    "$\\frac{1}{0}$ &lt;b&gt;",
)


class Inventory(HTMLParser):
    """All tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def inventory(page: str) -> Inventory:
    parser = Inventory()
    parser.feed(page)
    parser.close()
    return parser


def assert_harmless(page: str) -> None:
    """No script, no event handler, no inline style, nothing but fragments and data addresses."""
    found = inventory(page)
    assert {tag for tag, _ in found.tags} & {"script", "iframe", "object", "embed", "base", "form"} == set()
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (
            tag,
            attributes,
        )
        for name in ("src", "href", "xlink:href", "action"):
            address = attributes.get(name)
            assert (
                address is None or address.startswith(("data:image/png;base64,", "#")) or address == "data:,"
            )
    addresses = set(re.findall(r"https?://[^\s\"'<>]*", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"url\((?!#)|@import|//cdn", page)


def hostile_data(make_data: Callable[..., ReportData]) -> ReportData:
    data = make_data(300, poisons=10, names=HOSTILE, draws=10)
    hostile_text = "</pre></details><script>alert(5)</script>"
    return replace(
        data,
        summary=hostile_text,
        threshold_how=hostile_text,
        method=hostile_text,
        attack=hostile_text,
        configuration={hostile_text: {"deep": [hostile_text, "\ud800"]}},
        seconds={hostile_text: 1.0},
        draws=tuple(replace(draw, name=hostile_text) for draw in data.draws),
        runs=(
            (
                hostile_text,
                replace(
                    data.runs[0][1],
                    verb=hostile_text,
                    started=hostile_text,
                    configuration={"a": hostile_text},
                    versions={hostile_text: hostile_text},
                    code={hostile_text: hostile_text},
                    device={hostile_text: [hostile_text]},
                    seconds={hostile_text: 0.0},
                ),
            ),
        ),
    )


def test_strings_from_data_stay_text(make_data: Callable[..., ReportData]) -> None:
    page = render(hostile_data(make_data))
    assert_harmless(page)
    text = "".join(inventory(page).text)
    assert "<script>alert(1)</script>" in text
    assert "{{ 7 * 7 }}" in text
    assert "49" not in re.findall(r"→ (\d+)", text)
    assert "\u202e" not in page
    page.encode("utf-8")


def test_every_predicted_name_is_escaped_in_the_verdict_and_in_the_figures(
    make_data: Callable[..., ReportData],
) -> None:
    data = hostile_data(make_data)
    for label in range(len(HOSTILE)):
        page = render(replace(data, predicted=label, true_label=(label + 1) % len(HOSTILE)))
        assert_harmless(page)
        for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
            ElementTree.fromstring(drawing)


def test_the_policy_allows_exactly_the_style_sheet_that_is_there(
    make_data: Callable[..., ReportData],
) -> None:
    page = render(make_data(300, poisons=10))
    [policy] = [
        a["content"] for t, a in inventory(page).tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    [style] = re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_the_numbers_a_reader_looks_for(make_data: Callable[..., ReportData]) -> None:
    text = " ".join(" ".join(inventory(render(make_data())).text).split())
    for wanted in (
        "Poison found: 77 of 5,000 training examples cause the prediction “Bag” for this “Coat”",
        "97.4 % 75 of 77 flagged",
        "100 % 75 of 75 poisons",
        "98.0 % → 1.0 %",
        "86.1 % → 86.3 %",
        "93.0–99.4 % → 0.2–5.4 % n = 100",
        "False-alarm level 0.01",
        "p-value 0.005",
        "Average precision 0.987",
        "28 × 28 pixels, 1 channel",
        "▲ poison",
        "○ clean",
        "2,000 of 4,925 clean examples, drawn at random",
        "Never poisoned",
        "null distribution",
        "2.13.0",
        '"preset": "calibrated"',
    ):
        assert wanted in text, wanted


def test_what_was_not_measured_is_named(make_data: Callable[..., ReportData]) -> None:
    names = tuple(f"part.{number}<b>" for number in range(8))
    page = render(replace(make_data(), tracked_share=0.12345, untracked=names))
    assert "12.35 % of the model" in page
    assert "without part.0&lt;b&gt;" in page
    assert "part.5&lt;b&gt; and 2 more" in page
    assert "of the model's parameters" not in render(make_data())


def test_without_findings_nothing_is_marked(make_data: Callable[..., ReportData]) -> None:
    page = render(make_data(300, poisons=10, truth=False, found=False))
    text = "".join(inventory(page).text)
    assert "No poison found behind the prediction “Bag” for this “Coat”" in text
    assert "▲" not in text
    assert "Training examples with the highest scores, none of them flagged" in text
    assert '<span class="flag">' not in page
    assert "Before and after healing" not in text


def test_every_image_and_figure_has_words(make_data: Callable[..., ReportData]) -> None:
    found = inventory(render(make_data(300, poisons=10)))
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 1 + 50 + 64
    assert all("alt" in attributes for attributes in images)
    identifiers = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in found.tags:
        if tag == "svg" and attributes.get("role") == "img":
            assert set((attributes["aria-labelledby"] or "").split()) <= set(identifiers)


def test_the_same_data_give_the_same_bytes(make_data: Callable[..., ReportData]) -> None:
    assert render(make_data(500, poisons=10)) == render(make_data(500, poisons=10))


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 300, 200)])
def test_fifty_thousand_examples_fit_into_three_megabytes(
    make_data: Callable[..., ReportData], shape: tuple[int, int, int]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (65, *shape), dtype=np.uint8)
    page = render(make_data(50_000, poisons=500, shape=shape, heavy_tails=True, images=noise))
    assert len(page.encode()) < 3_000_000
    assert_harmless(page)


def test_bars_hold_every_example(make_data: Callable[..., ReportData]) -> None:
    """The hidden description and the caption count all examples; the histogram draws both groups."""
    figure = score_histogram(make_data(1_000, poisons=30))
    assert 'class="dark-bar"' in figure.svg
    assert 'class="pale-bar"' in figure.svg
    assert "970 clean and 30 poison" in figure.svg
    assert "32 lie beyond the threshold (tinted); 32 are flagged" in figure.caption
    nothing = score_histogram(make_data(1_000, poisons=30, truth=False, found=False))
    assert 'class="dark-bar"' not in nothing.svg


def test_the_slope_tells_the_medians(make_data: Callable[..., ReportData]) -> None:
    data = make_data(400, poisons=21)
    poison = data.poison
    assert poison is not None
    before = np.zeros(400)
    before[poison] = 3.25
    after = np.zeros(400)
    after[poison] = -1.5
    figure = influence_slope(replace(data, evidence={"influence_before": before, "influence_after": after}))
    assert "median of the poison examples 3.25 before, −1.5 after" in figure.svg
    assert "median of the clean examples 0 before, 0 after" in figure.svg


def test_values_that_are_not_finite_are_left_out_and_said(make_data: Callable[..., ReportData]) -> None:
    data = make_data(300, poisons=10)
    scores, before = data.scores.copy(), data.evidence["influence_before"].copy()
    scores[:3], before[:3] = (np.nan, np.inf, -np.inf), np.nan
    data = replace(data, scores=scores, evidence={**data.evidence, "influence_before": before})
    page = render(data)
    assert "3 examples without a finite score are left out" in page
    assert not re.search(r'd="[^"]*(nan|inf)', page)


def test_without_evidence_observation_or_examples(make_data: Callable[..., ReportData]) -> None:
    data = make_data(300, poisons=10)
    bare = replace(
        data,
        evidence={},
        observation=None,
        predicted=None,
        true_label=None,
        draws=(),
        draw_images=None,
        seconds={},
    )
    text = "".join(inventory(render(bare)).text)
    assert "The influence collapse" not in text
    assert "There is no observation" in text
    assert "Poison found: 12 of 300 training examples are flagged" in text
    assert collapses(bare) is None
    nothing = ReportData(
        method="m",
        poison_found=False,
        summary="",
        class_names=("a", "b"),
        labels=np.empty(0, np.int64),
        scores=np.empty(0),
        flagged=np.empty(0, np.int64),
        threshold=float("inf"),
        threshold_how="",
    )
    assert_harmless(render(nothing))


def test_rates_without_trials_are_not_drawn_as_if_measured(make_data: Callable[..., ReportData]) -> None:
    data = make_data(300, poisons=10)
    outcomes = (Outcome("Before healing", Proportion(0, 0), None), Outcome("After healing", 0.5, None))
    figure = outcome_bars(replace(data, outcomes=outcomes))
    assert figure is not None
    assert "before healing not measured" in figure.svg
    assert "50.0 % (n not recorded)" in figure.svg
    assert_harmless(render(replace(data, outcomes=outcomes)))


def test_the_scatter_draws_all_poison_and_a_stated_sample_of_the_rest(
    make_data: Callable[..., ReportData],
) -> None:
    figure = influence_scatter(make_data(9_000, poisons=100))
    assert figure.svg.count("h0") == 2_000
    assert (
        "2,000 of 8,900 clean examples, drawn at random; triangles: all 100 poison examples" in figure.caption
    )


CAUSE = Cause(
    kind="label noise",
    examples=12,
    distinct=3.5,
    largest_series=0.25,
    second_label=1,
    second_share=0.75,
    margin_rank=0.04,
)


def text_of(page: str) -> str:
    return " ".join(" ".join(inventory(page).text).split())


def test_the_cause_is_shown_with_its_numbers(make_data: Callable[..., ReportData]) -> None:
    data = make_data(n=500, poisons=20)
    assert "Kind of cause" not in text_of(render(data))
    said = text_of(render(replace(data, cause=CAUSE)))
    assert "Kind of poison" in said
    for shown in ("Label noise", "12", "3.5 (effective number)", "25.0 %", "75.0 % “Trouser”", "0.04 (0: "):
        assert shown in said
    none = replace(make_data(n=500, poisons=20, found=False), cause=replace(CAUSE, examples=0))
    said = text_of(render(none))
    assert "What the answer goes back to, as no poison was found" in said
    assert "effective number" not in said


@pytest.mark.parametrize("traced", [True, False])
def test_identifiers_for_a_ticket_stand_where_poison_was_found(
    make_data: Callable[..., ReportData], traced: bool
) -> None:
    data = make_data(n=500, poisons=20)
    data = data if traced else replace(data, predicted=None, observation=None)
    text = text_of(render(replace(data, poison_found=True)))
    named = {one.id for one in identifiers_of(traced=traced)}
    assert set(re.findall(r"AML\.T\d+|(?:ML|LLM)\d+:\d+", text)) == named
    assert "AML.T0020" in named
    assert "AML.T0020" not in render(replace(data, poison_found=False))


def test_the_p_value_stands_beside_its_level(make_data: Callable[..., ReportData]) -> None:
    data = make_data(n=500, poisons=20)
    assert "p-value 0.005 at most the level, 0.01" in text_of(render(data))
    assert "p-value 0.2 above the level, 0.01" in text_of(render(replace(data, p_value=0.2)))
    assert "the level" not in text_of(render(replace(data, p_value=None))).split("Observation")[0]


def test_a_truth_that_is_not_given_is_said(make_data: Callable[..., ReportData]) -> None:
    data = make_data(n=500, poisons=20)
    assert "the answer may be right" not in text_of(render(data))
    assert "True label not given the answer may be right" in text_of(render(replace(data, true_label=None)))
    assert "Label asked about Bag not the model's answer" in text_of(render(replace(data, answered=False)))


def test_the_rounds_of_a_repair_are_a_table(make_data: Callable[..., ReportData]) -> None:
    data = make_data(n=500, poisons=20)
    assert "Repair in rounds" not in render(data)
    rounds = tuple(
        {
            "answers": answers,
            "copies": {"successes": copies, "trials": 12},
            "p_value": p_value,
            "flagged": flagged,
            "flagged_poison": poison,
        }
        for answers, copies, p_value, flagged, poison in (
            (["Bag", "Bag"], 12, 0.005, 20, 18),
            (["Bag", HOSTILE[0]], 3, None, 0, 0),
        )
    )
    page = render(replace(data, rounds=rounds, repaired="Not repaired"))
    assert_harmless(page)
    said = text_of(page)
    assert "Not repaired." in said
    assert "As given Bag 12 of 12 0.005 20, 18 of them poison" in said
    assert "Healed, round 1 Bag (1), <script>alert(1)</script> (1) 3 of 12 – 0 " in said
