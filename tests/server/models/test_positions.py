from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from checkpoints import TINY, random_weights, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from server.models.base import ModelSpec, PositionLimitError
from server.models.memory import CHEAPER, Past, room_to_ask
from server.models.positions import longest_video
from server.models.registry import load_model
from server.models.videoxl.compression_config import CompressionConfig, read_compression
from server.models.videoxl.model import VideoXL

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
    modes = ["exact", "recent-2", "high-memory", "bounded-8"]
    longest = [longest_video(SPEC_7B, CompressionConfig(prefill_mode=mode), 14) for mode in modes]
    assert longest == sorted(set(longest)), "each is cheaper than the one before"
    # However little a prefill sees, a question sees the H-KVs of all chunks; the edge rule's two are larger.
    assert longest[-1] / 10 == pytest.approx(2 + (32768 * 31 / 32 - 14 - 2 * 720) / 45, abs=2)


@pytest.mark.parametrize(
    ("mode", "seen"),
    [
        ("exact", [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]),
        ("recent-2", [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]),
        ("high-memory", [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]),
        ("bounded-2", [(0, 0), (0, 1), (0, 2), (0, 2), (0, 2)]),
    ],
)
def test_what_a_mode_sees(mode: str, seen: list[tuple[int, int]]) -> None:
    past = Past.of(mode)
    assert [past.seen(number) for number in range(5)] == seen
    assert [past.in_high_pass.seen(number) for number in range(5)] == [(0, sum(both)) for both in seen]


@pytest.mark.parametrize("mode", ["bounded", "bounded-0", "recent-0", "recent", "EXACT", "exact-1", ""])
def test_other_names_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="prefill_mode must be exact, recent-N, high-memory or bounded-N"):
        CompressionConfig(prefill_mode=mode)


@pytest.mark.parametrize("ratio", [{"low_ratio": 64}, {"high_ratio": 1}])
def test_one_ratio_is_held_against_the_models_other(ratio: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must not exceed .*--low-ratio and --high-ratio"):
        read_compression({}, **ratio)


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
    mode=st.sampled_from(["exact", *CHEAPER, "bounded-1"]),
    most=st.integers(160, 280),
)
def test_a_prefill_ends_where_the_numbers_say(
    model: VideoXL, low: int, high: int, edge_ratio: int | None, carry: Literal["across", "reset"], mode: str, most: int
) -> None:
    compression = CompressionConfig(low, high, edge_ratio, carry, mode)
    spec = replace(model.spec, max_positions=most)
    longest = min(longest_video(spec, compression, len(model.prompt.prefix_ids)), 100)
    old = model.spec, model.compression
    model.spec, model.compression = spec, compression
    try:
        for num_frames in {max(longest, 1), longest + 1, max(longest - 1, 1)}:
            fits = num_frames <= longest
            try:
                num_high = prefill_all(model, num_frames)
            except PositionLimitError:
                assert not fits
            else:
                leaves_room = len(model.prompt.prefix_ids) + num_high + room_to_ask(most) <= most
                assert leaves_room or not fits
                # A frame more may happen to fit: it moves the edge rule to another chunk.
                edge = edge_ratio is not None and longest % spec.frames_per_chunk == 0
                assert fits or not leaves_room or longest == 100 or edge
    finally:
        model.spec, model.compression = old


def prefill_all(model: VideoXL, num_frames: int) -> int:
    """H-KV tokens."""
    features = torch.zeros(num_frames * 4, TINY["hidden_size"])
    chunks = features.split(16)
    prefill = model.prefill()
    pairs = [prefill.append(chunk, last=index == len(chunks) - 1) for index, chunk in enumerate(chunks)]
    return sum(high.num_tokens for _, high in pairs)


def test_a_model_has_the_modes_in_which_more_fits(model: VideoXL) -> None:
    (first, exact), (second, cheaper), *others = model.prefill_modes(320, 240, 1.0)
    assert (first, second) == ("exact", "recent-2") and exact < cheaper <= min(most for _, most in others)
    # Its windows are so small that a question then needs more positions than the prefill: no other mode saves any.
