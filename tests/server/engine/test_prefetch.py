"""What is read ahead stays within its bytes, and is what was expected last."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.kv import ChunkKV
from server.engine.prefetch import Prefetch, Wish
from server.engine.transfer import Arrival

BUDGET = 10
SIZES = {(video, index): 1 + (3 * video + 5 * index) % 7 for video in range(3) for index in range(6)}


def wish(key: tuple[int, int]) -> Wish:
    return Wish(SimpleNamespace(key=key[0]), key[1], 4 * SIZES[key])  # type: ignore[arg-type]


def arrival(key: tuple[int, int]) -> Arrival:
    keys, values = torch.zeros(2, 1, 1, SIZES[key], 1, dtype=torch.float16)
    return Arrival(ChunkKV(keys, values, "low", 2), 4 * SIZES[key])


@dataclass
class Books:
    prefetch: Prefetch = field(default_factory=lambda: Prefetch(4 * BUDGET))
    held: set[tuple[int, int]] = field(default_factory=set)

    def check(self) -> None:
        self.held = {key for key in SIZES if key in self.prefetch._held}
        assert self.prefetch.nbytes == sum(4 * SIZES[key] for key in self.held) <= 4 * BUDGET

    def read_all(self) -> list[tuple[int, int]]:
        read = []
        while (wished := self.prefetch.next()) is not None:
            assert wished.key not in self.held
            self.prefetch.hold(wished.key, arrival(wished.key))
            read.append(wished.key)
            self.check()
        return read


KEYS = st.sampled_from(sorted(SIZES))
STEPS = st.one_of(
    st.tuples(st.just("expect"), st.lists(KEYS, max_size=6, unique=True)),
    st.tuples(st.just("read"), st.integers(0, 3)),
    st.tuples(st.just("read all"), st.none()),
    st.tuples(st.just("take"), KEYS),
    st.tuples(st.just("hold"), KEYS),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=20), st.lists(KEYS, min_size=1, max_size=6, unique=True))
def test_it_stays_within_its_bytes(steps: list[tuple[str, object]], last: list[tuple[int, int]]) -> None:
    books = Books()
    for name, argument in steps:
        match name, argument:
            case "expect", list(keys):
                books.prefetch.expect([wish(key) for key in keys])
            case "read", int(number):
                for _ in range(number):
                    wished = books.prefetch.next()
                    if wished is not None:
                        books.prefetch.hold(wished.key, arrival(wished.key))
            case "read all", _:
                books.read_all()
            case "take", key:
                assert (books.prefetch.take(key) is not None) == (key in books.held)
                assert books.prefetch.take(key) is None
            case "hold", key:
                books.prefetch.hold(key, arrival(key))
        books.check()
    books.prefetch.expect([wish(key) for key in last])
    books.read_all()
    room, fits = BUDGET, set()
    for key in last:
        if SIZES[key] <= room:
            fits.add(key)
            room -= SIZES[key]
    assert fits <= books.held, "what was expected last has not pushed itself out"


def test_a_later_question_supersedes_what_was_expected_of_its_video() -> None:
    books = Books()
    books.prefetch.expect([wish((0, 0)), wish((0, 1))])
    books.prefetch.expect([wish((1, 0))])
    books.prefetch.expect([wish((0, 2))])
    assert books.read_all() == [(0, 2), (1, 0)]


def test_without_room_nothing_is_read_ahead() -> None:
    prefetch = Prefetch(0)
    prefetch.expect([wish((0, 0))])
    assert prefetch.next() is None
    prefetch.hold((0, 0), arrival((0, 0)))
    assert prefetch.nbytes == 0 and prefetch.take((0, 0)) is None


def test_what_is_expected_again_stays_and_the_rest_goes_first() -> None:
    books = Books()
    one, other, new = (key for key, size in SIZES.items() if size == 4)
    for key in (one, other):
        books.prefetch.hold(key, arrival(key))
    books.prefetch.expect([wish(one), wish(new)])
    assert books.read_all() == [new]
    assert books.held == {one, new}
