from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from checkpoints import TINY, random_weights, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from server.models.base import ModelSpec, PositionLimitError
from server.models.compression_config import CompressionConfig
from server.models.positions import longest_video
from server.models.registry import load_model
from server.models.videoxl import VideoXL

SPEC_7B = ModelSpec(
    name="7b", num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, vocab_size=152064, tokens_per_frame=144,
    frames_per_chunk=10, low_ratio=2, high_ratio=32, max_positions=32768, max_duration_s=None, fps=1.0,
    default_reload=3, temperature=0.0,
)  # fmt: skip


def test_the_published_sizes() -> None:
    # 43 chunks of 720 L-KV tokens, and 8 frames with their VSTs behind the prefix.
    assert longest_video(SPEC_7B, CompressionConfig(), 14) == 438
    assert 14 + 43 * 720 + 8 * 216 <= 32768 < 14 + 43 * 720 + 9 * 216
    # About 1.9 hours at 1 fps: one chunk of 720, then 45 each.
    assert longest_video(SPEC_7B, CompressionConfig(prefill_mode="high-memory"), 14) / 3600 == pytest.approx(
        1.85, abs=0.02
    )
    recent = [longest_video(SPEC_7B, CompressionConfig(prefill_mode=f"recent-{n}"), 14) for n in (1, 8, 30)]
    assert 438 < recent[2] < recent[1] < recent[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VideoXL:
    loaded = load_model(str(write_checkpoint(tmp_path_factory.mktemp("model"), random_weights(TINY))), device="cpu")
    assert isinstance(loaded, VideoXL)
    return loaded


@settings(max_examples=12, deadline=None)
@given(
    low=st.sampled_from([1, 2, 3, 5]),
    high=st.sampled_from([5, 8, 32]),
    edge_ratio=st.sampled_from([None, 2]),
    carry=st.sampled_from(["across", "reset"]),
    mode=st.sampled_from(["exact", "high-memory", "recent-2"]),
    most=st.integers(160, 280),
)
def test_a_prefill_ends_where_the_numbers_say(
    model: VideoXL, low: int, high: int, edge_ratio: int | None, carry: Literal["across", "reset"], mode: str, most: int
) -> None:
    compression = CompressionConfig(low, high, edge_ratio, carry, mode)
    spec = replace(model.spec, max_positions=most)
    longest = min(longest_video(spec, compression, len(model.prompt.prefix_ids)), 150)
    old = model.spec, model.compression
    model.spec, model.compression = spec, compression
    try:
        for num_frames in {max(longest, 1), longest + 1, max(longest - 1, 1)}:
            fits = num_frames <= longest
            try:
                prefill_all(model, num_frames)
            except PositionLimitError:
                assert not fits
            else:
                # A frame more may happen to fit: it moves the edge rule to another chunk.
                assert fits or longest == 150 or (edge_ratio is not None and longest % spec.frames_per_chunk == 0)
    finally:
        model.spec, model.compression = old


def prefill_all(model: VideoXL, num_frames: int) -> None:
    features = torch.zeros(num_frames * 4, TINY["hidden_size"])
    chunks = features.split(16)
    prefill = model.prefill()
    for index, chunk in enumerate(chunks):
        prefill.append(chunk, last=index == len(chunks) - 1)


def test_a_model_has_the_modes_in_which_more_fits(model: VideoXL) -> None:
    (first, exact), (second, cheaper) = model.prefill_modes(320, 240, 1.0)
    assert (first, second) == ("exact", "high-memory") and exact < cheaper
