"""Attention over a cache in pieces: each gives its share of the answer, and the shares are put together exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compression.rope import Rope
from compression.segments import SharedCache

Tables = tuple[Tensor, Tensor]
_LARGEST_FLASH_HEAD_DIM = 256


def segment_tables(cache: SharedCache, positions: Tensor, rope: Rope, dtype: torch.dtype) -> list[Tables]:
    """How queries at ``positions`` ([n], or [axes, n]) are rotated for each of the cache's segments."""
    return [rope.tables(positions - segment.offset, dtype) for segment in cache.segments]


def attend_segments(
    layer: int, queries: Tensor, own: Tensor, keys: Tensor, values: Tensor, cache: SharedCache, tables: Sequence[Tables]
) -> Tensor:
    """New tokens over the shared segments, which they see whole, and over the cache's own tokens, causally.

    ``queries`` [heads, n, head_dim] are before RoPE, ``own`` the same where they stand; ``keys`` and ``values`` are
    [kv_heads, own tokens, head_dim] with the new ones at the end. Returns [heads, n, head_dim].
    """
    shares = [_share(own, keys, values, causal=True)]
    for segment, (cos, sin) in zip(cache.segments, tables, strict=True):
        rotated = cache.rope.rotate(queries, cos, sin)
        shares.append(_share(rotated, segment.keys[layer], segment.values[layer], causal=False))
    return merge([out for out, _ in shares], [weight for _, weight in shares]).to(queries.dtype)


def merge(outs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Results [heads, n, head_dim] of softmaxes over parts, and the logarithms [heads, n] of their sums -> the result
    over all of them (flash-decoding), float32."""
    shares = torch.stack(list(weights)).softmax(0)
    stacked = torch.stack([out.float() for out in outs])
    return (stacked * shares[..., None]).sum(0)


def _share(queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """[heads, n, head_dim] and float32 [heads, n]: the attention's result and the logarithm of its softmax's sum.

    ``causal``: the last query stands at the last key.
    """
    heads, tokens, head_dim = queries.shape
    if _has_flash(queries):
        flash = torch.ops.aten._scaled_dot_product_flash_attention(
            queries[None], keys[None], values[None], 0.0, causal, False
        )
        return flash[0][0], flash[1][0]
    grouped = queries.reshape(keys.shape[0], -1, head_dim)
    logits = (grouped @ keys.transpose(-1, -2)).float() * head_dim**-0.5
    if causal and tokens > 1:
        seen = torch.ones(tokens, keys.shape[1], dtype=torch.bool, device=keys.device).tril(keys.shape[1] - tokens)
        logits = logits.unflatten(1, (-1, tokens)).masked_fill(~seen, -torch.inf).flatten(1, 2)
    out = logits.softmax(-1).to(values.dtype) @ values
    return out.reshape(queries.shape), logits.logsumexp(-1).reshape(heads, tokens)


def _has_flash(queries: Tensor) -> bool:
    head_dim = queries.shape[-1]
    half = queries.dtype in (torch.float16, torch.bfloat16)
    return queries.is_cuda and half and head_dim % 8 == 0 and head_dim <= _LARGEST_FLASH_HEAD_DIM
