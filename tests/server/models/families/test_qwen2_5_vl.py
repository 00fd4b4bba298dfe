"""A tiny random Qwen2.5-VL of transformers' own class, through this server's pass, caches and positions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tiny_transformers import (
    FRAME_TOKENS,
    NUM_NEW,
    PATCH,
    QUESTIONS,
    VIDEOS,
    ask,
    noise,
    prefill,
    prompt,
    save_qwen2_5_vl,
)
from transformers import PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from server.models.base import PositionLimitError
from server.models.families.one_pass import OnePassConfig, OnePassModel
from server.models.families.qwen2_5_vl import Qwen25Hints, load
from server.models.registry import UnknownModelError, load_model
from server.models.tensors import CheckpointError
from server.video.frames import Frames

CPU = torch.device("cpu")


def load_here(folder: Path, text_behind: Literal["video", "frame"] = "video", **compression: Any) -> OnePassModel:
    config = OnePassConfig(**compression)
    options = {"hints": Qwen25Hints(text_behind=text_behind), "frame_tokens": FRAME_TOKENS}
    return load(folder, "tiny-qwen", device=CPU, dtype=torch.float32, compression=config, **options)


@dataclass
class Reference:
    folder: Path
    model: PreTrainedModel

    def load(self, text_behind: Literal["video", "frame"] = "video", **compression: Any) -> OnePassModel:
        return load_here(self.folder, text_behind, **{"low_ratio": 1, "high_ratio": 1, **compression})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen"
    return Reference(folder, save_qwen2_5_vl(folder))


def published_positions(reference: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own positions, but text behind the largest of the video's: [3, 1, tokens]."""
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
    positions, _ = reference.model.get_rope_index(**{name: given[name] for name in names})
    (visual,) = given["mm_token_type_ids"][0].nonzero(as_tuple=True)
    stop = int(visual[-1]) + 1
    behind = torch.arange(positions.shape[-1] - stop) + positions[..., :stop].max() + 1
    positions[..., stop:] = behind
    return positions


@pytest.mark.parametrize(("frames", "sizes"), [(VIDEOS[0], [8, 6, 6]), (VIDEOS[1], [9])])
@pytest.mark.parametrize("question", QUESTIONS)
def test_text_stands_behind_the_whole_video(reference: Reference, frames: Frames, sizes: Any, question: str) -> None:
    """As the model was published; transformers' own rule is tested with the other families."""
    model = reference.load()
    given = prompt(model, frames, question)
    given["position_ids"] = published_positions(reference.model, given)
    with torch.inference_mode():
        expected = reference.model(**given).logits[0]
        whole = reference.model.generate(**given, max_new_tokens=NUM_NEW, do_sample=False)
    logits, answer = ask(model, prefill(model, frames, sizes), question, NUM_NEW)
    torch.testing.assert_close(logits, expected[-len(logits) :], atol=1e-4, rtol=0)
    assert answer == whole[0, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(("width", "height"), [(100, 60), (40, 90), (64, 64), (333, 77)])
def test_preprocessing_is_the_image_processors(reference: Reference, width: int, height: int) -> None:
    """It doubles a still image; so two equal frames must come out as it makes one. PIL rounds in between."""
    model, frames = reference.load(), noise(1, width, height)
    least, most = (tokens * (2 * PATCH) ** 2 for tokens in FRAME_TOKENS)
    processor = Qwen2VLImageProcessorPil(patch_size=PATCH, size={"shortest_edge": least, "longest_edge": most})
    expected = processor(images=[frames.pixels[0]], return_tensors="pt")
    twice = Frames(frames.pixels.repeat(2, axis=0), np.array([0.0, 1.0]))
    patches, grid = model.vision.patches.flatten(model.preprocess(twice))
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    one_level = 1 / 255 / max(model.vision.patches.std)
    difference = (patches - expected["pixel_values"]).abs()
    assert difference.max() < 12.5 * one_level and difference.mean() < 0.1 * one_level
    assert model.num_visual_tokens(2, width, height) == len(patches) // 4
    alone, _ = model.vision.patches.flatten(model.preprocess(frames))
    assert torch.equal(alone, patches), "the last frame stands in for the one that is missing"


def test_two_frames_make_a_patch_in_time(reference: Reference) -> None:
    model, frames = reference.load(), noise(4, 64, 64)
    patches, grid = model.vision.patches.flatten(model.preprocess(frames))
    first, second = patches.reshape(grid[0], -1, 3, 2, PATCH**2).unbind(3)
    for index, part in enumerate((first, second)):
        still = Frames(frames.pixels[[index, index, index + 2, index + 2]], frames.times_s)
        alone, _ = model.vision.patches.flatten(model.preprocess(still))
        assert torch.equal(alone.reshape(grid[0], -1, 3, 2, PATCH**2)[:, :, :, 0], part)


def test_past_the_position_limit_is_an_error(tmp_path: Path) -> None:
    save_qwen2_5_vl(tmp_path, max_position_embeddings=60)
    model = load_here(tmp_path)
    with pytest.raises(PositionLimitError, match="60 positions"):
        prefill(model, noise(12, 64, 64), [8, 4])


def test_what_changes_a_kv_changes_the_fingerprint(reference: Reference) -> None:
    same = reference.load()
    assert same.fingerprint == reference.load().fingerprint
    others = [
        reference.load(high_ratio=2),
        reference.load(compressor="pool"),
        reference.load(prefill_mode="high-memory"),
        reference.load("frame"),
    ]
    assert len({model.fingerprint for model in (same, *others)}) == 5
    for bad in ({"compressor": "magic"}, {"prefill_mode": "recent-0"}, {"low_ratio": 17}):
        with pytest.raises(ValueError, match=next(iter(bad)).replace("_", ".")):
            OnePassConfig(**bad)


def test_missing_and_extra_tensors_are_named(reference: Reference, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_qwen2_5_vl(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (lost,) = (name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights["something.else"] = weights.pop(lost)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*something\.else"):
        load_here(tmp_path)


def test_a_folder_is_known_by_its_type(reference: Reference, tmp_path: Path) -> None:
    model = load_model(str(reference.folder), device="cpu", high_ratio=8, compressor="keydiff", prefill_mode="recent-2")
    assert isinstance(model, OnePassModel)
    assert model.compression == OnePassConfig(high_ratio=8, compressor="keydiff", prefill_mode="recent-2")
    assert (model.spec.name, model.prefill_mode) == ("tiny-qwen", "recent-2")
    with pytest.raises(ValueError, match="compressor"):
        load_model("tiny", compressor="pool")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for name, words in ((str(tmp_path), r"tiny.*qwen2_5_vl"), ("no/such/folder", "no folder of this name.*owner/name")):
        with pytest.raises(UnknownModelError, match=words):
            load_model(name, device="cpu")
