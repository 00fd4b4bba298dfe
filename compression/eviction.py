"""What stays of a whole video within a budget of KV tokens: the contract that baselines are compared through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from compression.compressor import Compressor, RawChunk
from compression.kv import ChunkKV


class Eviction(Protocol):
    """Keeps at most a number of KV tokens of a video that was prefilled without compression."""

    def keep(self, raw: Sequence[RawChunk], num_tokens: int, scores: Sequence[float]) -> list[ChunkKV]:
        """One ChunkKV a chunk, in time order and possibly of no tokens; together at most ``num_tokens``.

        ``scores`` has one relevance a chunk; methods that do not know the question leave it alone.
        """


@dataclass(frozen=True, slots=True)
class Spread:
    """Every chunk is compressed by itself and gets its share of the budget."""

    compressor: Compressor

    def keep(self, raw: Sequence[RawChunk], num_tokens: int, scores: Sequence[float]) -> list[ChunkKV]:
        """See :meth:`Eviction.keep`; uses the budget up."""
        total = sum(chunk.num_tokens for chunk in raw)
        num_tokens, seen, spent, kept = min(num_tokens, total), 0, 0, []
        for chunk in raw:
            seen += chunk.num_tokens
            share = num_tokens * seen // max(total, 1) - spent
            spent += share
            kept.append(self.compressor.compress(chunk, share).kv)
        return kept
