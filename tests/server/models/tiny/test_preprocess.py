from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.models.tiny.preprocess import resize


def test_whole_factors_are_plain_means() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 128, 288, 3), dtype=np.uint8)
    means = frames.reshape(2, 64, 2, 96, 3, 3).mean((2, 4))
    assert np.abs(resize(frames).permute(0, 2, 3, 1).numpy() - means).max() <= 0.5 + 1e-3


@given(st.integers(1, 700), st.integers(1, 500), st.integers(0, 255))
@settings(max_examples=30, deadline=None)
def test_a_plain_picture_stays_plain_at_any_size(width: int, height: int, value: int) -> None:
    out = resize(np.full((1, height, width, 3), value, dtype=np.uint8))
    assert out.shape == (1, 3, 64, 96) and out.dtype == torch.uint8
    assert (out == value).all()


@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (3840, 2160), (1080, 1920), (853, 480)])
def test_large_frames_keep_their_picture(width: int, height: int) -> None:
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    frame = np.stack([*np.meshgrid(x, y), np.full((height, width), 9.0)], 2).astype(np.uint8)
    out = resize(frame[None])[0].float()
    expected = (torch.arange(96) + 0.5) * 255 / 96
    assert (out[0] - expected).abs().max() < 2
    assert (out[1] - ((torch.arange(64) + 0.5) * 255 / 64)[:, None]).abs().max() < 2
    assert (out[2] == 9).all()


@pytest.mark.parametrize(
    "frames", [np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4, 3)), np.zeros((1, 0, 4, 3), np.uint8)]
)
def test_other_arrays_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 frames"):
        resize(frames)


def test_no_frames_are_no_rows() -> None:
    assert resize(np.zeros((0, 240, 320, 3), np.uint8)).shape == (0, 3, 64, 96)
