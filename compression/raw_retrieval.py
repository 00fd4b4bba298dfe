"""Whole chunks of raw KVs, found by the question, and nothing of the others (ReKV, arXiv 2503.00540)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compression.compressor import RawChunk
from compression.frame_subsampling import FrameSubsampling
from compression.kv import ChunkKV


@dataclass(frozen=True, slots=True)
class RawRetrieval:
    """Takes chunks by score, best first; of the one that no longer fits as many frames as do, at equal distances.

    ReKV scores a block by the cosine of the question's mean query and the block's mean key:
    :class:`compression.score.CosineScorer` over chunks pooled to one token each (:class:`compression.pool.Pool`).
    ReKV retrieves for every layer by itself; here all layers share a choice, as in the mixed cache.
    """

    def keep(self, raw: Sequence[RawChunk], num_tokens: int, scores: Sequence[float]) -> list[ChunkKV]:
        """See :meth:`compression.eviction.Eviction.keep`; leaves less than a frame of the budget."""
        kept = [chunk.kv.take(slice(0)) for chunk in raw]
        for index in sorted(range(len(raw)), key=lambda index: (-scores[index], index)):
            (kept[index],) = FrameSubsampling().keep(raw[index : index + 1], num_tokens, ())
            num_tokens -= kept[index].num_tokens
        return kept
