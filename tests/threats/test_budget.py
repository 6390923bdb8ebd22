from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unpoison.errors import InputError
from unpoison.threats import Budget


@pytest.mark.parametrize(
    ("share", "n", "count"),
    [
        (0.015, 5000, 75),
        (0.01, 50000, 500),
        (1.0, 7, 7),
        (0.001, 10, 1),
        (0.145, 100, 15),
        (0.025, 100, 3),
        (0.024, 100, 2),
    ],
)
def test_a_share_is_rounded_to_the_nearest_half_upwards_and_at_least_one(
    share: float, n: int, count: int
) -> None:
    assert Budget(share=share).count_in(n) == count


@given(st.floats(1e-6, 1.0), st.integers(1, 10**7))
def test_a_share_allows_between_one_and_all(share: float, n: int) -> None:
    count = Budget(share=share).count_in(n)
    assert 1 <= count <= n
    assert count == 1 or abs(count - share * n) <= 0.5 + 1e-6


@given(
    st.one_of(
        st.floats(1e-6, 1.0).map(lambda s: Budget(share=s)),
        st.integers(1, 10**6).map(lambda c: Budget(count=c)),
    )
)
def test_json_round_trip(budget: Budget) -> None:
    assert Budget.from_json(budget.to_json()) == budget


def test_a_count_is_kept_and_cannot_exceed_the_set() -> None:
    assert Budget(count=75).count_in(75) == 75
    assert Budget(count=75).share_of(5000) == 0.015
    with pytest.raises(InputError, match="count 75 is more than the 74 examples"):
        Budget(count=75).count_in(74)
    with pytest.raises(InputError, match="empty"):
        Budget(share=0.1).count_in(0)


@pytest.mark.parametrize(
    ("share", "count", "message"),
    [
        (None, None, "either share"),
        (0.1, 3, "either share"),
        (0.0, None, "outside"),
        (1.5, None, "outside"),
        (float("nan"), None, "outside"),
        (None, 0, "below 1"),
        (None, 2.5, "not a whole number"),
        (None, True, "not a whole number"),
    ],
)
def test_nonsense_is_refused(share: float | None, count: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget(share=share, count=count)


def test_unknown_keys_are_named() -> None:
    with pytest.raises(InputError, match="'part'"):
        Budget.from_json({"part": 0.1})
