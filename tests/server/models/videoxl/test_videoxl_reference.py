"""Prefill and mixed cache against the method spelt out token by token, in float64 (Video-XL, section 3; Video-X2L)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from server.models.base import Row
from server.models.registry import load_model
from server.models.videoxl.model import VideoXL

QUESTION = [5, 9, 40, 7]
Pairs = list[tuple[Tensor, Tensor]]
"""A layer's keys (before RoPE) and values, [kv_heads, tokens, head_dim] each."""


class Reference:
    """One sequence of one pass. Every forward computes everything anew, over whole cached keys."""

    def __init__(self, model: VideoXL) -> None:
        self.decoder: Any = model.decoder
        self.config = model.decoder.config
        empty = torch.zeros(self.config.num_key_value_heads, 0, self.config.head_dim, dtype=torch.float64)
        self.memory: Pairs = [(empty, empty) for _ in self.decoder.layers]

    def norm(self, x: Tensor, module: Any) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * module.weight.double()

    def rotate(self, x: Tensor) -> Tensor:
        """[heads, tokens, head_dim] at positions 0, 1, 2, ..."""
        half = self.config.rotary_dim // 2
        steps = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.polar(
            torch.ones(x.shape[1], half, dtype=torch.float64), torch.arange(x.shape[1])[:, None] * steps
        )
        pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * turned
        return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :]], -1)

    def project(self, h: Tensor, is_vst: list[bool], attention: Any, name: str) -> Tensor:
        rows = []
        for token, vst in zip(h, is_vst, strict=True):
            module = getattr(attention, f"{'beacon_' if vst else ''}{name}_proj")
            bias = 0 if module.bias is None else module.bias.double()
            rows.append(module.weight.double() @ token + bias)
        heads = torch.stack(rows).view(len(rows), -1, self.config.head_dim).transpose(0, 1)
        return heads if name == "v" or not self.config.qk_norm else self.norm(heads, getattr(attention, f"{name}_norm"))

    def forward(self, x: Tensor, is_vst: list[bool]) -> tuple[Tensor, Pairs]:
        """Embeddings [tokens, hidden] -> logits of the last token, and the window's own keys and values."""
        own: Pairs = []
        for layer, (old_keys, old_values) in zip(self.decoder.layers, self.memory, strict=True):
            h = self.norm(x, layer.input_layernorm)
            q, k, v = (self.project(h, is_vst, layer.self_attn, name) for name in "qkv")
            own.append((k, v))
            keys, values = torch.cat([old_keys, k], 1), torch.cat([old_values, v], 1)
            before = old_keys.shape[1]
            padded = torch.cat([q.new_zeros(q.shape[0], before, q.shape[2]), q], 1)
            queries, keys = self.rotate(padded)[:, before:], self.rotate(keys)
            outs = []
            for head in range(q.shape[0]):
                shared = head * keys.shape[0] // q.shape[0]
                rows = []
                for token in range(q.shape[1]):
                    seen = before + token + 1
                    weights = (keys[shared, :seen] @ queries[head, token] / self.config.head_dim**0.5).softmax(0)
                    rows.append(weights @ values[shared, :seen])
                outs.append(torch.stack(rows))
            x = x + torch.stack(outs).transpose(0, 1).flatten(1) @ layer.self_attn.o_proj.weight.double().T
            h = self.norm(x, layer.post_attention_layernorm)
            gate, up = h @ layer.mlp.gate_proj.weight.double().T, h @ layer.mlp.up_proj.weight.double().T
            x = x + (gate / (1 + (-gate).exp()) * up) @ layer.mlp.down_proj.weight.double().T
        head = self.decoder.embed_tokens if self.config.tie_word_embeddings else self.decoder.lm_head
        return self.norm(x[-1], self.decoder.norm) @ head.weight.double().T, own

    def remember(self, pairs: Pairs) -> None:
        self.memory = [
            (torch.cat([keys, k], 1), torch.cat([values, v], 1))
            for (keys, values), (k, v) in zip(self.memory, pairs, strict=True)
        ]

    def text(self, ids: list[int]) -> Tensor:
        logits, own = self.forward(self.decoder.embed_tokens.weight[ids].double(), [False] * len(ids))
        self.remember(own)
        return logits


def one_pass(model: VideoXL, chunks: list[Tensor], ratios: list[int]) -> list[Pairs]:
    """Every chunk's kept keys and values."""
    state = Reference(model)
    state.text(list(model.prompt.prefix_ids))
    vst = state.decoder.beacon_embed_tokens.weight[0].double()
    counter, kept = 0, []
    for features, ratio in zip(chunks, ratios, strict=True):
        window, is_vst = [], []
        for token in features.double():
            window.append(token)
            is_vst.append(False)
            counter += 1
            if counter >= ratio:
                window.append(vst)
                is_vst.append(True)
                counter = 0
        _, own = state.forward(torch.stack(window), is_vst)
        kept.append([(k[:, is_vst], v[:, is_vst]) for k, v in own])
        state.remember(kept[-1])
    return kept


def assert_same(kv: ChunkKV, expected: Pairs) -> None:
    for name, index in (("keys", 0), ("values", 1)):
        wanted = torch.stack([pair[index] for pair in expected]).float()
        torch.testing.assert_close(getattr(kv, name), wanted, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "low_ratio", "high_ratio", "edge_ratio"),
    [
        ([9, 7, 5], 2, 32, 2),  # windows too short for one VST at 32: the carry goes over two borders
        ([7, 11, 6, 3], 4, 16, 2),  # a carry of 3 meets the edge rule's smaller ratio
        ([5, 13, 8], 4, 4, None),  # plain Video-XL at one ratio
    ],
)
@torch.inference_mode()
def test_odd_chunks_and_carries(sizes: list[int], low_ratio: int, high_ratio: int, edge_ratio: int | None) -> None:
    model = load_model("tiny", device="cpu", dtype="float32")
    assert isinstance(model, VideoXL)
    model.compression = replace(
        model.compression, low_ratio=low_ratio, high_ratio=high_ratio, edge_ratio=edge_ratio, carry="across"
    )
    generator = torch.Generator().manual_seed(sum(sizes))
    chunks = [torch.randn(size, model.decoder.config.hidden_size, generator=generator) for size in sizes]
    levels = []
    for ratio in (low_ratio, high_ratio):
        ratios = [ratio] * len(sizes)
        if edge_ratio is not None:
            ratios[0] = ratios[-1] = edge_ratio
        levels.append(one_pass(model, chunks, ratios))
    run = model.prefill()
    made = [run.append(features, last=index == len(sizes) - 1) for index, features in enumerate(chunks)]
    for pair, low, high in zip(made, *levels, strict=True):
        assert_same(pair[0], low)
        assert_same(pair[1], high)
    # A mixed cache: the second chunk in detail, the others not.
    chosen = [pair[0 if index == 1 else 1] for index, pair in enumerate(made)]
    cache = MixedCache(model.prefix(), chosen, model.rope, room=len(QUESTION))
    logits = model.forward([Row(torch.tensor(QUESTION), cache)])[0]
    state = Reference(model)
    state.text(list(model.prompt.prefix_ids))
    for index in range(len(sizes)):
        state.remember(levels[0 if index == 1 else 1][index])
    torch.testing.assert_close(logits, state.text(QUESTION).float(), atol=3e-4, rtol=1e-3)
