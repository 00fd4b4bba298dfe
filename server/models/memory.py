"""What the prefill of a chunk sees of the chunks before it."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from compression.cache import KVCache
from compression.kv import ChunkKV

CHEAPER = ("recent-2", "high-memory", "bounded-8")
"""The modes that a video takes where it does not fit in the one asked for, the dearest first."""


@dataclass(frozen=True, slots=True)
class Past:
    """How many of the last chunks are seen as L-KVs, and how many of those before them as H-KVs; None is all. Those
    further back are not seen at all."""

    num_low: int | None
    num_high: int | None

    @classmethod
    def of(cls, prefill_mode: str) -> Self:
        """``exact`` sees every chunk's L-KV; ``recent-N`` the L-KVs of the last N and the H-KVs of the others;
        ``high-memory`` H-KVs, as an answer sees them, which keeps the pass cheap however long the video is;
        ``bounded-N`` the H-KVs of the last N. Raises ValueError for another name."""
        name = re.fullmatch(r"(exact|high-memory)|(recent|bounded)-([1-9]\d*)", prefill_mode)
        if name is None:
            raise ValueError(f"prefill_mode must be exact, recent-N, high-memory or bounded-N, not {prefill_mode!r}")
        if name[1]:
            return cls(None if name[1] == "exact" else 0, None)
        return cls(int(name[3]), None) if name[2] == "recent" else cls(0, int(name[3]))

    @property
    def in_high_pass(self) -> Self:
        """What a pass of its own for the H-KVs sees: as many chunks, none of them as L-KVs."""
        num_high = None if self.num_low is None or self.num_high is None else self.num_low + self.num_high
        return type(self)(0, num_high)

    def seen(self, num_chunks: int) -> tuple[int, int]:
        """How many of the first ``num_chunks`` of a video the next one sees: as L-KVs, the last; as H-KVs, those before
        them."""
        num_low = num_chunks if self.num_low is None else min(num_chunks, self.num_low)
        num_rest = num_chunks - num_low
        return num_low, num_rest if self.num_high is None else min(num_rest, self.num_high)

    def num_tokens(self, num_visual: int, num_chunks: int, low_ratio: int, high_ratio: int) -> int:
        """About as many as :meth:`seen` chunks have, of ``num_chunks`` with ``num_visual`` visual tokens."""
        num_low, num_high = self.seen(num_chunks)
        return num_visual * num_low // (num_chunks * low_ratio) + num_visual * num_high // (num_chunks * high_ratio)


class Memory:
    """The KVs of the prefix and of the chunks that the next one sees."""

    def __init__(self, cache: KVCache, past: Past) -> None:
        """``cache`` holds the prefix, and becomes the memory's own."""
        self.cache = cache
        self._past = past
        self._num_chunks = 0
        self._num_fixed = cache.length
        """KV tokens whose chunks stay as they are."""
        self._chunks: deque[tuple[ChunkKV, ChunkKV]] = deque()
        """Those behind them, of which a next one may change the level, or the place."""

    def append(self, low: ChunkKV, high: ChunkKV) -> None:
        """Adds the next chunk; earlier ones become H-KVs, or are forgotten, as they fall behind."""
        self._num_chunks += 1
        if self._past.num_low is None:
            self.cache.append(low)
            self._num_fixed = self.cache.length
            return
        num_low, num_high = self._past.seen(self._num_chunks)
        self._chunks.append((low, high))
        if self._past.num_high is not None and len(self._chunks) > num_low + num_high:
            self._chunks.popleft()
        self.cache.length = self._num_fixed
        for place, levels in enumerate(self._chunks):
            self.cache.append(levels[0 if place >= len(self._chunks) - num_low else 1])
        while self._past.num_high is None and len(self._chunks) > num_low:
            self._num_fixed += self._chunks.popleft()[1].num_tokens

    def fork(self, past: Past) -> Memory:
        """An independent one with the same content, which goes on as ``past`` says."""
        twin = Memory(self.cache.copy(), past)
        twin._num_chunks, twin._chunks = self._num_chunks, self._chunks.copy()
        twin._num_fixed = self._num_fixed
        return twin


def longest_videos(own: str, longest: Callable[[str], int]) -> tuple[tuple[str, int], ...]:
    """``own`` and the modes that stand in for it, each with its ``longest``; one that takes shorter videos than the one
    before is left out. Another that takes as long ones needs less of a device's memory."""
    modes: list[tuple[str, int]] = []
    for mode in dict.fromkeys((own, *CHEAPER)):
        most = longest(mode)
        if not modes or most >= modes[-1][1]:
            modes.append((mode, most))
    return tuple(modes)


def room_to_ask(max_positions: int) -> int:
    """Positions that a video leaves free, even with no chunk in detail: for a question and its answer."""
    return max_positions // 32
