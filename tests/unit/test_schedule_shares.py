"""Max-min fairness of the token budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.schedule.shares import fair_shares


@pytest.mark.parametrize(
    ("budget", "wanted", "shares"),
    [
        (100, [], []),
        (100, [30], [30]),
        (100, [1000], [100]),
        (100, [1000, 10], [90, 10]),
        (100, [1000, 1000, 10], [45, 45, 10]),
        (101, [1000, 1000, 10], [46, 45, 10]),
        (2, [5, 5, 5], [1, 1, 0]),
        (0, [5, 5], [0, 0]),
    ],
)
def test_examples(budget: int, wanted: list[int], shares: list[int]) -> None:
    assert fair_shares(budget, wanted) == shares


@given(st.integers(0, 500), st.lists(st.integers(1, 200), max_size=12))
def test_shares_are_max_min_fair(budget: int, wanted: list[int]) -> None:
    shares = fair_shares(budget, wanted)
    assert all(0 <= share <= want for share, want in zip(shares, wanted, strict=True))
    assert sum(shares) == min(budget, sum(wanted))
    unsatisfied = [share for share, want in zip(shares, wanted, strict=True) if share < want]
    # nobody has more than one token over someone who wanted more than they got
    assert not unsatisfied or max(shares) <= min(unsatisfied) + 1
