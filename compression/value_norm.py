"""Tokens with long value vectors (VaN of InfiniPot-V, arXiv 2506.15745)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.compressor import RawChunk, ScoredPruner


@dataclass(frozen=True, slots=True)
class ValueNorm(ScoredPruner):
    """Keeps the tokens that can move an attention output most: those with the largest L2 norm of the value."""

    def score(self, raw: RawChunk) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(raw.kv.values.float(), dim=-1)
        return norms
