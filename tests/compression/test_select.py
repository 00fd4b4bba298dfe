from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression.chunk import Chunk
from compression.select import CacheSizes, Dial, SelectionError, fewest, peaks, select

CHUNKS = [Chunk(index, 16.0 * index, 16.0 * (index + 1), 16) for index in range(6)]
SIZES = CacheSizes(prefix=9, low=[64] * 6, high=[4] * 6)
SCORES = [0.1, 0.5, 0.2, 0.5, 0.0, 0.9]


def chosen(**dial: object) -> tuple[int, ...]:
    return select(SCORES, Dial(**dial), CHUNKS, SIZES, default_reload=3).chunks  # type: ignore[arg-type]


def test_the_default_takes_the_best_and_ties_go_to_the_earlier_chunk() -> None:
    assert chosen() == (5, 1, 3)


def test_reload_clamps_to_the_number_of_chunks() -> None:
    assert chosen(reload=0) == ()
    assert chosen(reload=99) == (5, 1, 3, 2, 0, 4)


def test_modes() -> None:
    assert chosen(mode="high") == ()
    assert chosen(mode="low") == (5, 1, 3, 2, 0, 4)
    assert chosen(mode="auto") == chosen()


def test_explicit_chunks_come_best_first_and_once() -> None:
    assert chosen(chunks=(4, 5, 4, 0)) == (5, 0, 4)


def test_a_time_range_limits_the_candidates_of_every_dial() -> None:
    assert chosen(start_s=0.0, end_s=33.0) == (1, 2, 0)
    assert chosen(mode="low", start_s=90.0) == (5,)
    assert chosen(chunks=(0, 1), end_s=20.0) == (1, 0)


def test_chunks_of_several_videos_are_numbered_through() -> None:
    chunks = [Chunk(index % 3, 16.0 * (index % 3), 16.0 * (index % 3 + 1), 16) for index in range(6)]
    for dial, expected in (
        (Dial(mode="low"), (5, 1, 3, 2, 0, 4)),
        (Dial(chunks=(5, 0)), (5, 0)),
        (Dial(reload=3, start_s=16.0, end_s=32.0), (1, 4)),
    ):
        assert select(SCORES, dial, chunks, SIZES, default_reload=3).chunks == expected


@pytest.mark.parametrize(
    ("dial", "param"),
    [
        ({"chunks": (6,)}, "chunks"),
        ({"chunks": (-1,)}, "chunks"),
        ({"chunks": (0, 5), "end_s": 16.0}, "chunks"),
        ({"chunks": (0,), "start_s": 90.0}, "chunks"),
        ({"budget_tokens": 32}, "budget_tokens"),
        ({"start_s": 5.0, "end_s": 5.0}, "start_s"),
        ({"start_s": 96.0}, "start_s"),
    ],
)
def test_a_dial_that_cannot_be_met_names_its_field(dial: dict[str, object], param: str) -> None:
    with pytest.raises(SelectionError) as caught:
        chosen(**dial)
    assert caught.value.param == param


@given(
    budget=st.integers(33, 500),
    scores=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    low=st.lists(st.integers(4, 100), min_size=6, max_size=6),
)
def test_a_budget_is_kept_and_used(budget: int, scores: list[float], low: list[int]) -> None:
    sizes = CacheSizes(prefix=9, low=low, high=[4] * 6)
    selection = select(scores, Dial(budget_tokens=budget), CHUNKS, sizes, default_reload=3)
    assert sizes.mixed(selection) <= budget
    left = [index for index in range(6) if index not in selection]
    assert all(sizes.mixed(selection) + low[index] - 4 > budget for index in left)


def test_peaks_are_as_many_as_stand_out() -> None:
    assert peaks([0.1, 0.8, 0.05, 0.5], 0.4, 3) == (1, 3)
    assert peaks([0.1, 0.8, 0.05, 0.1], 0.4, 3) == (1,)
    assert peaks([0.3, 0.3, 0.3, 0.3], 0.4, 3) == (0, 1, 2)
    assert peaks([], 0.4, 3) == ()


def test_fewest_are_as_many_as_share_the_scores() -> None:
    assert fewest([0.1, 0.8, 0.0, 0.1], 0.8, 3) == (1,)
    assert fewest([0.1, 0.6, 0.0, 0.3], 0.8, 3) == (1, 3)
    assert fewest([0.25, 0.25, 0.25, 0.25], 0.9, 3) == (0, 1, 2)
    assert fewest([], 0.9, 3) == ()
