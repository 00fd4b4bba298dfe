"""How long a video may be before its prefill passes a model's position limit."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from compression.interleave import count_vsts
from server.models.base import ModelSpec
from server.models.compression_config import CompressionConfig

_MOST_CHUNKS = 100_000
"""Where the KVs kept of a chunk are so few that the limit is never met, this is long enough."""


def longest_video(spec: ModelSpec, compression: CompressionConfig, num_prefix_tokens: int) -> int:
    """The most frames that a video may have for all of its windows to fit behind their memory, in both passes; so does
    any video with fewer."""
    size = spec.frames_per_chunk
    passes = _Passes(compression, num_prefix_tokens)
    num_chunks = 0
    while num_chunks < _MOST_CHUNKS and passes.peak(size * spec.tokens_per_frame, last=True) <= spec.max_positions:
        num_chunks += 1
        if passes.peak(size * spec.tokens_per_frame, last=False) > spec.max_positions:
            return num_chunks * size
        passes.append(size * spec.tokens_per_frame)
    rest = [n for n in range(size) if passes.peak(n * spec.tokens_per_frame, last=True) <= spec.max_positions]
    return num_chunks * size + max(rest, default=0)


@dataclass(slots=True)
class _Passes:
    """The two passes over a video, in numbers: KV tokens that the next window sees, and the carries."""

    compression: CompressionConfig
    low_memory: int
    high_memory: int = field(init=False)
    low_carry: int = 0
    high_carry: int = 0
    num_chunks: int = 0
    recent: deque[tuple[int, int]] = field(default_factory=deque)
    """L-KV and H-KV tokens of the chunks that the L pass's memory holds as L-KVs and will hold as H-KVs."""

    def __post_init__(self) -> None:
        self.high_memory = self.low_memory

    def peak(self, num_visual: int, *, last: bool) -> int:
        """Positions that the larger of the two passes needs for the next window."""
        (low, _), (high, _) = self._count(num_visual, last)
        return num_visual + max(self.low_memory + low, self.high_memory + high)

    def append(self, num_visual: int) -> None:
        """A chunk that is not the last."""
        counts = self._count(num_visual, False)
        ratios = self.compression.ratios(first=self.num_chunks == 0, last=False)
        (low, self.low_carry), (high, self.high_carry) = counts
        # At ratio 1 there are no VSTs: every token stays.
        low, high = (num_visual if ratio == 1 else count for ratio, count in zip(ratios, (low, high), strict=True))
        self.low_memory += low
        self.high_memory += high
        self.num_chunks += 1
        most = self.compression.low_memory
        if most is not None:
            self.recent.append((low, high))
            if len(self.recent) > most:
                was, now = self.recent.popleft()
                self.low_memory += now - was

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
