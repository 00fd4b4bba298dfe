"""The interval of a share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.interval import share, wilson


def test_values_of_the_literature() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(0, 500), st.integers(0, 500))
def test_holds_the_share_and_mirrors(right: int, wrong: int) -> None:
    low, high = wilson(right, right + wrong)
    assert 0 <= low <= high <= 1
    if right + wrong:
        assert low - 1e-12 <= right / (right + wrong) <= high + 1e-12
        assert wilson(wrong, right + wrong) == pytest.approx((1 - high, 1 - low))


def test_share() -> None:
    assert share(81, 263) == {"right": 81, "asked": 263, "share": 0.308, "low": 0.2553, "high": 0.3662}
    assert share(0, 0)["share"] is None
