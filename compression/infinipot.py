"""Temporal redundancy and value norm together (InfiniPot-V, arXiv 2506.15745)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compression.compressor import Pruner, RawChunk, best
from compression.value_norm import ValueNorm


@dataclass(frozen=True, slots=True)
class InfiniPot(Pruner):
    """TaR chooses a ``share`` of the tokens, VaN (:class:`ValueNorm`) the rest from what TaR left.

    TaR keeps the last ``recent`` part of the frames, then tokens whose keys are least like the keys at the same place
    of these frames (mean cosine, before RoPE): what has not changed since is redundant.
    """

    share: float = 0.5
    recent: float = 0.125

    def choose(self, raw: RawChunk, num_tokens: int) -> Tensor:
        num_changed = round(self.share * num_tokens)
        changed = best(self.change(raw), num_changed)
        norms = ValueNorm().score(raw).scatter(-1, changed, -torch.inf)
        return torch.cat([changed, best(norms, num_tokens - num_changed)], -1)

    def change(self, raw: RawChunk) -> Tensor:
        """float32 [layers, kv_heads, tokens]: how much a token differs from its place in the last frames."""
        layers, heads, _, head_dim = raw.kv.keys.shape
        keys = functional.normalize(raw.kv.keys.float(), dim=-1)
        keys = keys.reshape(layers, heads, -1, raw.tokens_per_frame, head_dim)
        num_recent = max(1, round(self.recent * keys.shape[2]))
        change = -(keys * keys[:, :, -num_recent:].mean(2, keepdim=True)).sum(-1)
        change[:, :, -num_recent:] = torch.inf
        return change.flatten(2)
