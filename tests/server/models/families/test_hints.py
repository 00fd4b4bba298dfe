"""What a transformers folder may say of how it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import edit_json, noise, save_qwen2_5_vl

from compression.score import AttentionScorer
from server.models.families.one_pass import OnePassModel
from server.models.registry import load_model
from server.models.tensors import CheckpointError


def write(folder: Path, **hints: Any) -> str:
    save_qwen2_5_vl(folder)
    edit_json(folder / "config.json", x2l=hints)
    return str(folder)


def test_they_count_where_the_command_line_says_nothing(tmp_path: Path) -> None:
    hints = {"frames_per_chunk": 32, "low_ratio": 3, "high_ratio": 9, "compressor": "keydiff", "scorer_heads": [[1, 0]]}
    name = write(tmp_path, **hints, frame_size=[24, 16])
    model: Any = load_model(name, device="cpu", high_ratio=12)
    assert isinstance(model, OnePassModel)
    assert (model.spec.frames_per_chunk, model.spec.low_ratio, model.spec.high_ratio) == (32, 3, 12)
    assert model.compression.compressor == "keydiff"
    assert model.scorer == AttentionScorer(((1, 0),))
    for width, height in ((320, 240), (640, 360), (90, 200)):
        assert model.num_visual_tokens(4, width, height) == 2 * 6
        assert model.preprocess(noise(4, width, height)).shape == (4, 3, 16, 24)


def test_an_image_is_not_squeezed_into_the_size_of_a_frame(tmp_path: Path) -> None:
    resized, usual = (
        load_model(write(tmp_path / name, **hints), device="cpu").preprocess_image(noise(1, 90, 200), alone=True)
        for name, hints in (("resized", {"frame_size": [24, 16]}), ("usual", {}))
    )
    assert torch.equal(resized, usual) and usual.shape[2] > 2 * usual.shape[3]


def test_a_frame_of_parts_of_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"frame_size must be multiples of 8 pixels, not \[24, 20\]"):
        load_model(write(tmp_path, frame_size=[24, 20]), device="cpu")
