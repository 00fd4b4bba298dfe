"""The tables are transformers' own, bit for bit, at every position and in every layout."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLTextConfig, Qwen2Config, Qwen3VLTextConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from compression.rope import Rope

PARAMETERS = {"rope_type": "default", "rope_theta": 1e6}
SHAPE = {"hidden_size": 256, "num_attention_heads": 2}
POSITIONS = torch.stack([torch.arange(7) * 5000, torch.arange(7) + 3, torch.arange(7).flip(0) * 9])
LAYOUTS = {
    "plain": (Rope(128, 1e6), Qwen2RotaryEmbedding(Qwen2Config(**SHAPE, rope_parameters=dict(PARAMETERS)))),
    "sectioned": (
        Rope(128, 1e6, (16, 24, 24)),
        Qwen2_5_VLRotaryEmbedding(
            Qwen2_5_VLTextConfig(**SHAPE, rope_parameters={**PARAMETERS, "mrope_section": [16, 24, 24]})
        ),
    ),
    "interleaved": (
        Rope(128, 1e6, (24, 20, 20), "interleaved"),
        Qwen3VLTextRotaryEmbedding(
            Qwen3VLTextConfig(**SHAPE, head_dim=128, rope_parameters={**PARAMETERS, "mrope_section": [24, 20, 20]})
        ),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tables_are_transformers(layout: str, dtype: torch.dtype) -> None:
    rope, theirs = LAYOUTS[layout]
    positions = POSITIONS[0] if layout == "plain" else POSITIONS
    x = torch.randn(2, 7, 128, dtype=dtype)
    cos, sin = theirs(x, positions[None] if layout == "plain" else positions[:, None])
    assert torch.equal(torch.cat([rope.tables(positions, dtype)[0]] * 2, -1), cos[0])
    assert torch.equal(torch.cat([rope.tables(positions, dtype)[1]] * 2, -1), sin[0])
    rotated, _ = apply_rotary_pos_emb(x[None], x[None], cos, sin)
    torch.testing.assert_close(rope.rotate(x, *rope.tables(positions, dtype)), rotated[0])


@pytest.mark.parametrize("layout", ["sectioned", "interleaved"])
def test_text_stands_at_one_position_on_every_axis(layout: str) -> None:
    rope, _ = LAYOUTS[layout]
    text = torch.arange(5)
    for alike in (text.expand(3, -1), text.expand(3, 1, 1, -1)):
        for table, expected in zip(rope.tables(alike, torch.float32), rope.tables(text, torch.float32), strict=True):
            assert torch.equal(table.reshape(5, 64), expected)


def test_every_layer_and_head_may_keep_other_tokens() -> None:
    rope, _ = LAYOUTS["sectioned"]
    positions = torch.randint(0, 9999, (3, 2, 4, 6), dtype=torch.int32)
    keys = torch.randn(2, 4, 6, 128)
    rotated = rope.rotate(keys, *rope.tables(positions, torch.float32))
    for layer in range(2):
        for head in range(4):
            alone = rope.rotate(keys[layer, head], *rope.tables(positions[:, layer, head], torch.float32))
            assert torch.equal(rotated[layer, head], alone)
