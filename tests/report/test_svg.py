from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unpoison.report._svg import Canvas, Scale, element, fitted, number, plain

finite = st.floats(-1e12, 1e12, allow_nan=False)


@given(st.text())
def test_plain_text_is_one_writable_line_without_overrides(text: str) -> None:
    line = plain(text)
    line.encode("utf-8")
    assert not set(line) & set("\n\r\t\x00\u202e\u202a\u2028\u200f")
    assert line.count("\u2068") == line.count("\u2069") <= 1


def test_a_right_to_left_name_is_isolated_and_an_override_is_dropped() -> None:
    assert plain("שלום") == "\u2068שלום\u2069"
    assert plain("bag\u202egab") == "baggab"
    assert plain("\ud800") == "\ufffd"


def test_elements_escape_attributes_and_text() -> None:
    drawn = element("text", "</svg><script>", aria_label='"><x onload=1>')
    assert str(drawn) == ('<text aria-label="&#34;&gt;&lt;x onload=1&gt;">&lt;/svg&gt;&lt;script&gt;</text>')


@given(st.lists(finite, min_size=1, max_size=50))
def test_a_fitted_scale_shows_every_value_in_order(values: list[float]) -> None:
    scale = fitted(values, 0.0, 100.0)
    pixels = scale(sorted(values))
    assert ((pixels >= 0) & (pixels <= 100)).all()
    assert (np.diff(pixels) >= -1e-9).all()
    assert scale.low <= min(values) <= max(values) <= scale.high
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * (scale.high - scale.low)  # a tick may sit on the end of the axis, give or take rounding
    assert all(scale.low - slack <= tick <= scale.high + slack for tick in ticks)
    assert np.isfinite(scale.edges(10)).all()


def test_few_outliers_bend_the_axis_instead_of_flattening_the_rest() -> None:
    values = np.append(np.random.default_rng(0).normal(0, 100, 5_000), [-7.7e6, 2.4e6])
    scale = fitted(values, 0.0, 600.0)
    assert scale.kind == "asinh"
    assert scale.at(200.0) - scale.at(-200.0) > 60
    assert fitted(values[:-2], 0.0, 600.0).kind == "linear"


def test_an_axis_of_equal_or_no_finite_values_still_has_a_width() -> None:
    for values in ([], [3.0], [0.0, 0.0], [np.nan, np.inf]):
        scale = fitted(values, 0.0, 10.0)
        assert scale.high > scale.low


def test_dots_become_one_path_and_count_is_kept() -> None:
    canvas = Canvas(10, 10, "t", "d", "i")
    canvas.dots(np.arange(5.0), np.arange(5.0), "pale-dot")
    assert len(canvas.parts) == 1
    assert canvas.parts[0].count("h0") == 5


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (999999.0, "999,999"), (1234.5678, "1,235"), (-7.7e6, "−7.7 × 10⁶"), (0.05, "0.05")],
)
def test_numbers_are_written_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_a_log_scale_puts_zero_on_the_base_line() -> None:
    scale = Scale(0.5, 1000.0, 100.0, 0.0, "log")
    assert scale.at(0.0) == 100.0
    assert scale.at(1.0) < 100.0
