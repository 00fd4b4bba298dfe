from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_transformers import FRAME_TOKENS, noise, save_qwen3_vl
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from server.models.families.one_pass import OnePassConfig, OnePassModel
from server.models.families.qwen3_vl import HINTS, load
from server.video.frames import Frames


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OnePassModel:
    folder = tmp_path_factory.mktemp("qwen3")
    save_qwen3_vl(folder)
    place = {"device": torch.device("cpu"), "dtype": torch.float32, "frame_tokens": FRAME_TOKENS, "hints": HINTS()}
    return load(folder, "tiny-qwen3", **place, compression=OnePassConfig())


@pytest.mark.parametrize(("num_frames", "fps"), [(8, 1.0), (7, 2.0), (1, 0.5)])
def test_the_time_of_every_pair_of_frames_is_the_processors(model: OnePassModel, num_frames: int, fps: float) -> None:
    expected = Qwen3VLProcessor._calculate_timestamps(None, list(range(num_frames)), fps, 2)
    frames = noise(num_frames, 64, 64, interval_s=1 / fps)
    tokens = model.encode(model.preprocess(frames), frames.times_s)
    np.testing.assert_allclose(tokens.times_s.mean(1), expected)
    layout = model.vision.lay_out(tokens, 0, 100, last=False)
    text = "".join(f"<{time_s:.1f} seconds><|vision_start|><|vision_end|>" for time_s in expected)
    ids = torch.tensor(model.tokenizer.encode(text, add_special_tokens=False))
    assert torch.equal(layout.others, model.decoder.embed_tokens(ids))
    assert int(layout.is_visual.sum()) == len(tokens.features)
    assert layout.positions.shape == (3, len(layout.is_visual))
    assert layout.next_position == layout.positions.max() + 1
    assert (layout.positions.diff(dim=1)[0] >= 0).all(), "time does not run backwards"


def test_deep_features_reach_the_first_layers(model: OnePassModel) -> None:
    frames = noise(4, 64, 64)
    tokens = model.encode(model.preprocess(frames), frames.times_s)
    assert tokens.deep.shape == (2, *tokens.features.shape)
    low, _ = model.prefill().append(tokens, last=True)
    first_only = replace(tokens, deep=tokens.deep[:1])
    without, _ = model.prefill().append(first_only, last=True)
    same = [torch.equal(a, b) for a, b in zip(low.values, without.values, strict=True)]
    assert same == [True, True, False], "the second is added behind the second layer"


def test_a_pair_that_is_cut_off_counts_as_one(model: OnePassModel) -> None:
    frames = noise(5, 64, 64)
    last = Frames(frames.pixels[4:], frames.times_s[4:])
    tokens = model.encode(model.preprocess(last), last.times_s)
    assert tokens.times_s.tolist() == [[4.0, 4.0]]
