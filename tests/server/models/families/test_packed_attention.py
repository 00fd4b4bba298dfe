"""One call for all windows gives what a call for each gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

from server.models.families.packed_attention import PackedAttention

KINDS = [
    (qwen2_5_vl.Qwen2_5_VLVisionAttention, qwen2_5_vl.Qwen2_5_VLVisionConfig),
    (qwen3_vl.Qwen3VLVisionAttention, qwen3_vl.Qwen3VLVisionConfig),
]


@pytest.mark.parametrize(("attention", "config"), KINDS)
@pytest.mark.parametrize("ends", [[24], [5, 12, 13, 24], [8, 16, 24]])
@torch.inference_mode()
def test_windows_do_not_see_each_other(attention: Any, config: Any, ends: list[int]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = config(hidden_size=32, num_heads=2)
        sizes._attn_implementation = "sdpa"
        original = attention(sizes)
        hidden, angles = torch.randn(24, 32), torch.randn(24, 16)
    bounds = torch.tensor([0, *ends], dtype=torch.int32)
    tables = angles.cos(), angles.sin()
    ours = PackedAttention(original)
    expected = original(hidden, cu_seqlens=bounds, position_embeddings=tables)
    torch.testing.assert_close(ours.packed(hidden, bounds, tables), expected)
    assert torch.equal(ours(hidden, cu_seqlens=bounds, position_embeddings=tables, max_seqlen=None), expected)
