"""Tokens that an observation window attends to (SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from compression.compressor import RawChunk, ScoredPruner


@dataclass(frozen=True, slots=True)
class Snap(ScoredPruner):
    """Attention from ``raw.queries``, averaged over them and over the heads of a group, smoothed over neighbours.

    The queries are the chunk's own last tokens, so nothing is known of the question; or, through
    :meth:`RawChunk.seen_by`, those of the question. Unlike SnapKV the window itself has no right to stay: at a high
    ratio it would be all that stays.
    """

    kernel: int = 5

    def score(self, raw: RawChunk) -> Tensor:
        layers, kv_heads, _, head_dim = raw.kv.keys.shape
        rope, dtype = raw.rope, raw.kv.keys.dtype
        keys = rope.rotate(raw.kv.keys, *rope.tables(raw.positions, dtype))
        queries = rope.rotate(raw.queries, *rope.tables(raw.query_positions, dtype))
        groups = queries.reshape(layers, kv_heads, -1, head_dim)  # the queries of all heads of a group
        attention = ((groups @ keys.transpose(-1, -2)).float() / head_dim**0.5).softmax(-1)
        return functional.avg_pool1d(attention.mean(2), self.kernel, 1, self.kernel // 2, count_include_pad=False)
