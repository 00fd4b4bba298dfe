"""Averages of neighbouring tokens: the sparse KVs of Video-XL-2 (arXiv 2506.19225)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.compressor import Kept, RawChunk


@dataclass(frozen=True, slots=True)
class Pool:
    """Means of keys (before RoPE) and of values over equal runs of tokens.

    Tokens of a frame stand together, so the runs lie inside frames as long as a frame keeps a whole number of tokens,
    and cover whole frames from there on.
    """

    def compress(self, raw: RawChunk, num_tokens: int) -> Kept:
        """See :meth:`compression.compressor.Compressor.compress`."""
        layers, heads, total, _ = raw.kv.keys.shape
        device = raw.kv.keys.device
        borders = torch.arange(num_tokens + 1, device=device) * total // max(num_tokens, 1)
        middles = (borders[:-1] + borders[1:]) // 2
        tokens = middles.expand(layers, heads, num_tokens)
        return raw.keep(_means(raw.kv.keys, borders), _means(raw.kv.values, borders), tokens)


def _means(x: Tensor, borders: Tensor) -> Tensor:
    """``x`` [layers, kv_heads, tokens, head_dim], averaged over runs between ``borders`` [runs + 1], in its dtype."""
    sizes = borders.diff()
    run = torch.repeat_interleave(torch.arange(len(sizes), device=x.device), sizes)
    total = x.new_zeros((*x.shape[:2], len(sizes), x.shape[3]), dtype=torch.float32)
    total.index_add_(2, run, x[:, :, : len(run)].float())
    return (total / sizes[:, None]).to(x.dtype)
