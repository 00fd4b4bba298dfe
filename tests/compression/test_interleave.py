from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compression.interleave import count_vsts, interleave


def walk(num_visual: int, ratio: int, carry: int) -> tuple[list[bool], int]:
    """The rule as the paper tells it: a counter over visual tokens."""
    mask, counter = [], carry
    for _ in range(num_visual):
        mask.append(False)
        counter += 1
        if counter >= ratio:
            mask.append(True)
            counter = 0
    return mask, counter


@given(num_visual=st.integers(0, 200), ratio=st.integers(1, 40), carry=st.integers(0, 60))
def test_is_the_walk_over_the_tokens(num_visual: int, ratio: int, carry: int) -> None:
    mask, after = interleave(num_visual, ratio, carry)
    assert (mask.tolist(), after) == walk(num_visual, ratio, carry)


@given(sizes=st.lists(st.integers(1, 100), max_size=8), ratio=st.integers(1, 32))
def test_the_carry_makes_chunk_borders_invisible(sizes: list[int], ratio: int) -> None:
    carry, total = 0, 0
    for size in sizes:
        mask, carry = interleave(size, ratio, carry)
        total += int(mask.sum())
    assert (total, carry) == divmod(sum(sizes), ratio)


@given(num_visual=st.integers(0, 200), ratio=st.integers(1, 40))
def test_a_closed_window_ends_with_a_vst_and_carries_nothing(num_visual: int, ratio: int) -> None:
    mask, carry = interleave(num_visual, ratio, 0, close=True)
    assert carry == 0
    assert int(mask.sum()) == -(-num_visual // ratio)
    assert num_visual == 0 or bool(mask[-1])


@given(num_visual=st.integers(0, 200), ratio=st.integers(2, 40), carry=st.integers(0, 60), close=st.booleans())
def test_counting_agrees_with_placing(num_visual: int, ratio: int, carry: int, close: bool) -> None:
    is_vst, left = interleave(num_visual, ratio, carry, close=close)
    assert count_vsts(num_visual, ratio, carry, close=close) == (int(is_vst.sum()), left)
