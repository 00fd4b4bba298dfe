"""Tokens with unusual keys (KeyDiff, arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from compression.compressor import RawChunk, ScoredPruner


@dataclass(frozen=True, slots=True)
class KeyDiff(ScoredPruner):
    """Keeps the keys least like the chunk's mean direction (cosine, before RoPE): what is left is diverse."""

    def score(self, raw: RawChunk) -> Tensor:
        directions = functional.normalize(raw.kv.keys.float(), dim=-1)
        return -functional.cosine_similarity(directions, directions.mean(2, keepdim=True), dim=-1)
