"""The end of the video only: a sliding window behind the prefix (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compression.compressor import RawChunk
from compression.kv import ChunkKV


@dataclass(frozen=True, slots=True)
class RecencyWindow:
    """Keeps the last tokens."""

    def keep(self, raw: Sequence[RawChunk], num_tokens: int, scores: Sequence[float]) -> list[ChunkKV]:
        """See :meth:`compression.eviction.Eviction.keep`; uses the budget up."""
        kept = []
        for chunk in reversed(raw):
            stays = min(num_tokens, chunk.num_tokens)
            kept.append(chunk.kv.take(slice(chunk.num_tokens - stays, None)))
            num_tokens -= stays
        return kept[::-1]
