"""What a transformers folder may say of how it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import SAVE, edit_json, noise, save_qwen2_5_vl

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


@pytest.mark.parametrize(
    ("hints", "named"),
    [
        (5, "x2l: must be an object"),
        ({"frames_per_chunk": "a"}, r"x2l\.frames_per_chunk: .*integer"),
        ({"frames_per_chunk": 0}, r"x2l\.frames_per_chunk: .*greater than 0"),
        ({"frames_per_chunk": True}, r"x2l\.frames_per_chunk: .*integer"),
        ({"frame_per_chunk": 16}, r"x2l\.frame_per_chunk: is not among what a model of type \w+ may say"),
        ({"scorer_heads": [[99, 0]]}, r"scorer_heads names \[99, 0\], but there are 3 layers of 4 heads"),
        ({"scorer_heads": [[2, 3], [2, 4]]}, r"scorer_heads names \[2, 4\]"),
        ({"scorer_heads": [[-1, 0]]}, r"x2l\.scorer_heads\.0\.0: .*greater than or equal to 0"),
        ({"scorer_heads": [[1]]}, r"x2l\.scorer_heads\.0"),
        ({"scorer_heads": []}, r"x2l\.scorer_heads: .*at least 1"),
        ({"low_ratio": "2"}, r"x2l\.low_ratio: .*integer"),
        ({"text_behind": "chunk"}, r"x2l\.text_behind: "),
    ],
)
@pytest.mark.parametrize("family", SAVE)
def test_what_cannot_be_is_refused(tmp_path: Path, family: str, hints: Any, named: str) -> None:
    SAVE[family](tmp_path)
    edit_json(tmp_path / "config.json", x2l=hints)
    (tmp_path / "model.safetensors").unlink()  # before weights are looked for
    with pytest.raises(CheckpointError, match=rf"^config\.json: {named}") as raised:
        load_model(str(tmp_path), device="cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("family", "hints"),
    [
        ("qwen3_vl", {"text_behind": "frame"}),
        ("llava_onevision", {"text_behind": "frame"}),
        ("llava_onevision", {"frame_size": [40, 40]}),
    ],
)
def test_a_hint_for_another_family_is_refused(tmp_path: Path, family: str, hints: dict[str, Any]) -> None:
    SAVE[family](tmp_path)
    edit_json(tmp_path / "config.json", x2l=hints)
    (name,) = hints
    with pytest.raises(CheckpointError, match=rf"x2l\.{name}: is not among what a model of type {family} may say"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("family", SAVE)
def test_a_chunk_is_made_of_what_a_model_sees_at_once(tmp_path: Path, family: str) -> None:
    """An odd one would have a frame twice at its end, where two are seen at a time."""
    SAVE[family](tmp_path)
    edit_json(tmp_path / "config.json", x2l={"frames_per_chunk": 3})
    if family == "llava_onevision":
        assert load_model(str(tmp_path), device="cpu").spec.frames_per_chunk == 3
        return
    with pytest.raises(CheckpointError, match=r"frames_per_chunk is 3: the model sees 2 frames at a time"):
        load_model(str(tmp_path), device="cpu")


def test_text_stands_where_the_folder_says(tmp_path: Path) -> None:
    places = {}
    for text_behind in (None, "video", "frame"):
        model = load_model(write(tmp_path / str(text_behind), **({"text_behind": text_behind} if text_behind else {})))
        assert isinstance(model, OnePassModel)
        places[text_behind] = model.vision.settings.text_behind
    assert places == {None: "video", "video": "video", "frame": "frame"}


def test_a_frame_of_parts_of_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"frame_size must be multiples of 8 pixels, not \[24, 20\]"):
        load_model(write(tmp_path, frame_size=[24, 20]), device="cpu")
