"""The attention of Qwen-VL's vision towers, all windows in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision


class PackedAttention(nn.Module):
    """Stands in for transformers' own, which without a flash attention package calls attention once for every window
    and layer: some 2,000 times for a chunk, and a GPU waits for each to be asked for. On the CPU, where what is
    computed counts and not how often, it is left to do that."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **others: Any
    ) -> Tensor:
        """``hidden_states`` [tokens, hidden], in windows that begin and end at ``cu_seqlens``."""
        if hidden_states.device.type != "cpu":
            return self.packed(hidden_states, cu_seqlens, position_embeddings)
        alone: Tensor = self.attention(
            hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **others
        )
        return alone

    def packed(self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """The same in one call, in which no token sees another window's."""
        attention: Any = self.attention
        queries, keys, values = attention.qkv(hidden_states).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
        queries, keys = apply_rotary_pos_emb_vision(queries, keys, *position_embeddings)
        places = torch.arange(len(hidden_states), device=hidden_states.device)
        window = torch.bucketize(places, cu_seqlens, right=True)
        q, k, v = (part.transpose(0, 1)[None] for part in (queries, keys, values))
        mask = window[:, None] == window
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.scaling)
        out: Tensor = attention.proj(seen[0].transpose(0, 1).flatten(1))
        return out
