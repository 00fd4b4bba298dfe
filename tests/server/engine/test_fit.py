"""Whether a video fits onto the device, and what is done about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import noise

from server.engine.fit import choose_mode, longest_in_memory
from server.models.families.one_pass import OnePassModel
from server.models.memory import CHEAPER
from server.models.registry import load_model
from server.video.errors import VideoTooLarge
from server.video.frames import Frames
from server.video.reader import Sampling, VideoInfo

ASSET = Path(__file__).parents[2] / "assets" / "tiny-qwen2_5-vl"
MODES = ("exact", *CHEAPER)


@pytest.fixture(scope="module", params=["tiny", str(ASSET)], ids=["tiny", "qwen2_5_vl"])
def model(request: pytest.FixtureRequest) -> Any:
    return load_model(request.param, device="cpu", dtype="float32", low_ratio=2, high_ratio=16)


def info(num_frames: int) -> VideoInfo:
    return VideoInfo(float(num_frames), 96, 64, num_frames, 1.0)


def test_the_less_memory_there_is_the_cheaper_is_the_mode(model: Any) -> None:
    video, size = info(40 * model.spec.frames_per_chunk), model.token_nbytes
    num_visual = model.num_visual_tokens(video.num_frames, 96, 64)
    needed = {mode: size * model.num_remembered(mode, num_visual, 40) for mode in MODES}
    assert list(needed.values()) == sorted(needed.values(), reverse=True)
    assert choose_mode(model, video, Sampling(1.0), None) == "exact"
    for mode, nbytes in needed.items():
        assert choose_mode(model, video, Sampling(1.0), nbytes) == mode
        if mode != "bounded-8":  # which remembers no more of a longer one
            assert longest_in_memory(model, mode, nbytes) == video.num_frames
            assert longest_in_memory(model, mode, nbytes - 1) < video.num_frames
    with pytest.raises(VideoTooLarge, match=f"{needed['bounded-8']} bytes"):
        choose_mode(model, video, Sampling(1.0), needed["bounded-8"] - 1)


@pytest.mark.parametrize("mode", MODES)
@torch.inference_mode()
def test_what_is_remembered_is_about_what_was_said(model: Any, mode: str) -> None:
    prefill, size = model.prefill(mode, 12), model.spec.frames_per_chunk
    capacity = None
    for chunk in range(12):
        frames = noise(size, 96, 64)
        part = Frames(frames.pixels, frames.times_s + chunk * size)
        prefill.append(model.encode(model.preprocess(part), part.times_s), last=False)
        if isinstance(model, OnePassModel) and mode == "exact":
            cache = prefill._memory.cache
            capacity = capacity or cache.capacity
            assert cache.capacity == capacity, "there was room for all of them"
    num_prefix = model.prefix().num_tokens
    memories = [prefill._memory] if isinstance(model, OnePassModel) else [prefill._low.memory, prefill._high.memory]
    held = sum(memory.cache.length - num_prefix for memory in memories)
    assert held == pytest.approx(model.num_remembered(mode, 12 * model.num_visual_tokens(size, 96, 64), 12), rel=0.05)
