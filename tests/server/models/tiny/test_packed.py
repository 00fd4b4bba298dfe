"""Training's packed sequence computes what serving computes chunk after chunk."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compression.cache import KVCache
from compression.mixed import MixedCache
from compression.score import AttentionScorer
from server.models.base import ModelSpec, Row
from server.models.lm.decoder import Decoder, DecoderConfig
from server.models.lm.decoder_model import PromptConfig
from server.models.slices import whole
from server.models.tiny.packed import Layout, Shape, Tables, embed, packed_layer
from server.models.videoxl.model import CompressionConfig, VideoXL

CONFIG = DecoderConfig(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, rope_theta=1e4, tie_word_embeddings=True, head_dim=8,
    rotary_dim=4, qk_norm=True, attention_bias=False,
)  # fmt: skip
PREFIX = (1, 2, 3)


def model(ratio: int) -> VideoXL:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    spec = ModelSpec("tiny", 3, 4, 2, 8, 60, 4, 4, ratio, ratio, 4096, None, 1.0, 1, 0.0)
    compression = CompressionConfig(ratio, ratio, edge_ratio=None, carry="reset")
    return VideoXL(spec, decoder, None, compression, PromptConfig(PREFIX, "", frozenset()), None, AttentionScorer())


def packed(net: VideoXL, shape: Shape, layout: Layout, visual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    mask = layout.dense()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    x = embed(net.decoder, shape, visual[None], rows.flatten()[None], torch.tensor(PREFIX))
    tables = Tables.of(layout, net.rope, torch.float32)
    for layer in net.decoder.layers:
        x = packed_layer(
            layer, x, tables, layout.memory_index, (shape.num_visual, shape.rows_start), net.rope, attend
        )  # fmt: skip
    text = x[0, shape.rows_start : shape.prefix_start].view(shape.num_rows, shape.row_tokens, -1)
    return net.decoder.logits(text[:, -1])


@pytest.mark.parametrize("video_chunks", [4, 2])
@pytest.mark.parametrize("ratio", [1, 2, 4, 16])
@torch.inference_mode()
def test_equals_the_chunkwise_model(video_chunks: int, ratio: int) -> None:
    net = model(ratio)
    shape = Shape(num_chunks=4, chunk_tokens=16, num_rows=4, row_tokens=5, prefix_tokens=3, min_ratio=1)
    layout = Layout(shape, torch.device("cpu"))
    layout.arrange(video_chunks, [ratio] * 4)
    visual = torch.randn(64, 32)
    rows = torch.randint(0, 60, (4, 5))
    together = packed(net, shape, layout, visual, rows)
    for video, features in enumerate(visual.split(16 * video_chunks)):
        prefill = net.prefill()
        low = [prefill.append(chunk, last=False)[0] for chunk in features.split(16)]
        per_video = 4 // (4 // video_chunks)
        for row in range(video * per_video, (video + 1) * per_video):
            cache = MixedCache(net.prefix(), low, net.rope, room=5)
            alone = net.forward([Row(rows[row], cache)])[0]
            torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_mixed_ratios_and_blind_rows() -> None:
    net = model(4)
    shape = Shape(num_chunks=3, chunk_tokens=16, num_rows=3, row_tokens=5, prefix_tokens=3, min_ratio=1)
    layout = Layout(shape, torch.device("cpu"))
    layout.arrange(3, [2, 1, 8], num_blind=1)
    visual, rows = torch.randn(48, 32), torch.randint(0, 60, (3, 5))
    together = packed(net, shape, layout, visual, rows)
    prefill = net.prefill()
    kept = []
    for chunk, ratio in zip(visual.split(16), (2, 1, 8), strict=True):
        kept.append(whole(prefill._compress(prefill._low, chunk, ratio, "low")))
        prefill._low.memory.cache.append(kept[-1])
    for row in range(2):
        alone = net.forward([Row(rows[row], MixedCache(net.prefix(), kept, net.rope, room=5))])[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-4)
    blind = KVCache(net.prefix(), net.rope, capacity=16)
    blind.append(net.prefix())
    torch.testing.assert_close(together[2], net.forward([Row(rows[2], blind)])[0], atol=1e-5, rtol=1e-4)  # type: ignore[arg-type]
