"""Causal attention of new tokens over a cache, by a kernel that neither repeats shared keys nor writes a mask out."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

_LARGEST_HEAD_DIM = 256


def causal_mask(num_tokens: int, num_cached: int, like: Tensor, head_dim: int) -> Tensor | None:
    """bool [num_tokens, num_cached + num_tokens]: the whole cache and the tokens up to oneself.

    None where :func:`attend` needs none for queries on the device and in the dtype of ``like``.
    """
    if num_tokens == 1 or has_flash(like.device, like.dtype, head_dim):
        return None
    mask = torch.ones(num_tokens, num_cached + num_tokens, dtype=torch.bool, device=like.device)
    return mask.tril(num_cached)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """``queries`` [heads, n, head_dim] over ``keys`` and ``values`` [kv_heads, cached + n, head_dim] -> the shape of
    ``queries``. ``mask`` is what :func:`causal_mask` gave for them."""
    q, k, v = queries[None], keys[None], values[None]
    if mask is None and has_flash(queries.device, queries.dtype, queries.shape[2]):
        # PyTorch's public function aligns is_causal to the first key, and takes nothing but a whole mask for the last
        # one. With that mask it leaves flash attention, and with shared keys the fused kernels at all: for 7B
        # parameters behind an hour of video it would write gigabytes of weights in every layer. This is what
        # torch.nn.attention.bias.causal_lower_right calls; flash attention aligns to the last key.
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)[0]
        return out[0]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0]


@lru_cache
def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's own flash attention runs there: half precision, from the Ampere generation on."""
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        return False
    fits = head_dim % 8 == 0 and head_dim <= _LARGEST_HEAD_DIM
    built = torch.backends.cuda.is_flash_attention_available()
    return fits and built and torch.cuda.get_device_capability(device) >= (8, 0)
