"""Attention over a cache in pieces: each gives its share of the answer, and the shares are put together exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from compression.cache import KVCache
from compression.segments import SharedCache
from server.models.lm.attention import attend, causal_mask, has_flash

See = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""A layer's index, queries before and behind RoPE [heads, n, head_dim], keys behind it and values [kv_heads, n,
head_dim] of new tokens, which are written to the cache -> what they attend to, the shape of the queries."""


def attention_over(cache: KVCache, positions: Tensor, dtype: torch.dtype) -> See:
    """The attention of new tokens at ``positions`` ([n], or [axes, n]) over ``cache`` and causally over themselves."""
    rope, size = cache.rope, positions.shape[-1]
    mask = causal_mask(size, cache.num_own, cache.keys, cache.head_dim)
    shared = cache.segments if isinstance(cache, SharedCache) else ()
    if not shared:
        return partial(_see_own, cache, mask)
    tables = [rope.tables(positions - segment.offset, dtype) for segment in shared]
    cos, sin = (torch.stack(part) for part in zip(*tables, strict=True))  # [segments, n, rotary_dim // 2]

    def see(layer: int, plain: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = cache.write(layer, keys, values)
        shares = [_share(queries, keys, values, mask, causal=True)]
        for_each = plain[:, None].expand(-1, len(shared), -1, -1)
        for moved, segment in zip(rope.rotate(for_each, cos, sin).unbind(1), shared, strict=True):
            shares.append(_share(moved, segment.keys[layer], segment.values[layer], None, causal=False))
        return merge([out for out, _ in shares], [weight for _, weight in shares]).to(queries.dtype)

    return see


def _see_own(
    cache: KVCache, mask: Tensor | None, layer: int, plain: Tensor, queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    return attend(queries, *cache.write(layer, keys, values), mask)


def merge(outs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Results [heads, n, head_dim] of softmaxes over parts, and the logarithms [heads, n] of their sums -> the result
    over all of them (flash-decoding), float32."""
    shares = torch.stack(list(weights)).softmax(0)
    return (torch.stack([out.float() for out in outs]) * shares[..., None]).sum(0)


def _share(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """[heads, n, head_dim] and float32 [heads, n]: what the attention gives, and the logarithm of its softmax's sum.

    ``causal``: the last query stands at the last key; ``mask`` is then what :func:`causal_mask` gave.
    """
    heads, tokens, head_dim = queries.shape
    if has_flash(queries.device, queries.dtype, head_dim):
        flash = torch.ops.aten._scaled_dot_product_flash_attention(
            queries[None], keys[None], values[None], 0.0, causal, False
        )
        return flash[0][0], flash[1][0]
    logits = (queries.reshape(keys.shape[0], -1, head_dim) @ keys.transpose(-1, -2)).float() * head_dim**-0.5
    if mask is not None:
        logits = logits.unflatten(1, (-1, tokens)).masked_fill(~mask, -torch.inf).flatten(1, 2)
    out = logits.softmax(-1).to(values.dtype) @ values
    return out.reshape(queries.shape), logits.logsumexp(-1).reshape(heads, tokens)
