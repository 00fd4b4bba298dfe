"""How long a video may be before its prefill, or a question about it, passes a model's position limit."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from compression.interleave import count_vsts
from server.models.base import ModelSpec
from server.models.memory import Past, room_to_ask
from server.models.videoxl.compression_config import CompressionConfig

_MOST_CHUNKS = 100_000
"""Where the KVs kept of a chunk are so few that the limit is never met, this is long enough."""


@lru_cache
def longest_video(spec: ModelSpec, compression: CompressionConfig, num_prefix_tokens: int) -> int:
    """The most frames that a video may have for all of its windows to fit behind their memory, in both passes, and for
    its H-KVs to leave room for a question; so does any video with fewer.

    It counts chunk by chunk, up to seconds for small chunks in a large limit, so the numbers are kept.
    """
    size, limit = spec.frames_per_chunk, spec.max_positions
    passes = _Passes(compression, compression.past, num_prefix_tokens, room_to_ask(limit))
    num_chunks = 0
    while num_chunks < _MOST_CHUNKS and passes.peak(size * spec.tokens_per_frame, last=True) <= limit:
        num_chunks += 1
        if passes.peak(size * spec.tokens_per_frame, last=False) > limit:
            return num_chunks * size
        passes.append(size * spec.tokens_per_frame)
    rest = [n for n in range(size) if passes.peak(n * spec.tokens_per_frame, last=True) <= limit]
    return num_chunks * size + max(rest, default=0)


@dataclass(slots=True)
class _Passes:
    """The two passes over a video, in numbers: KV tokens of the chunks so far, and the carries."""

    compression: CompressionConfig
    past: Past
    num_prefix: int
    num_room: int
    low_carry: int = 0
    high_carry: int = 0
    low: list[int] = field(default_factory=lambda: [0])
    """L-KV tokens of the first 0, 1, ... chunks together."""
    high: list[int] = field(default_factory=lambda: [0])

    @property
    def num_chunks(self) -> int:
        return len(self.low) - 1

    def peak(self, num_visual: int, *, last: bool) -> int:
        """Positions that the larger of the two passes needs for the next window, or that a question needs behind the
        ``last``."""
        (low, _), (high, _) = self._count(num_visual, last)
        window = num_visual + max(self._seen(self.past) + low, self._seen(self.past.in_high_pass) + high)
        if not last:
            return window
        return max(window, self.num_prefix + self.high[-1] + self._kept(num_visual, last)[1] + self.num_room)

    def append(self, num_visual: int) -> None:
        """A chunk that is not the last."""
        low, high = self._kept(num_visual, False)
        (_, self.low_carry), (_, self.high_carry) = self._count(num_visual, False)
        self.low.append(self.low[-1] + low)
        self.high.append(self.high[-1] + high)

    def _seen(self, past: Past) -> int:
        """KV tokens in the memory of the next window."""
        num_low, num_high = past.seen(self.num_chunks)
        middle = self.num_chunks - num_low
        return self.num_prefix + self.low[-1] - self.low[middle] + self.high[middle] - self.high[middle - num_high]

    def _kept(self, num_visual: int, last: bool) -> list[int]:
        """KV tokens of the next chunk at both levels; at ratio 1 there are no VSTs, and every token stays."""
        ratios = self.compression.ratios(first=self.num_chunks == 0, last=last)
        counts = self._count(num_visual, last)
        return [num_visual if ratio == 1 else count for ratio, (count, _) in zip(ratios, counts, strict=True)]

    def _count(self, num_visual: int, last: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """VSTs and carry of the next window in the L pass and in the H pass."""
        close = self.compression.carry == "reset"
        low_ratio, high_ratio = self.compression.ratios(first=self.num_chunks == 0, last=last)
        return (
            (0, self.low_carry) if low_ratio == 1 else count_vsts(num_visual, low_ratio, self.low_carry, close=close),
            (0, self.high_carry)
            if high_ratio == 1
            else count_vsts(num_visual, high_ratio, self.high_carry, close=close),
        )
