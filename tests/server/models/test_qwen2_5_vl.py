"""A tiny random Qwen2.5-VL of transformers' own class, through this server's pass, caches and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tiny_transformers import PATCH, VISUAL_TOKENS, noise, save_qwen2_5_vl
from transformers import PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from compression.kv import ChunkKV
from compression.methods import COMPRESSORS
from compression.mixed import MixedCache
from kvstore import codec
from server.models.base import PositionLimitError, Row, Turn
from server.models.checkpoint import CheckpointError
from server.models.decoder import Window
from server.models.one_pass import OnePassConfig, OnePassModel
from server.models.qwen2_5_vl import load
from server.models.registry import UnknownModelError, load_model
from server.video.frames import Frames

CPU = torch.device("cpu")
VIDEOS = {"20 s": noise(20, 100, 60), "4.5 s, tall, an odd number of frames": noise(9, 40, 90, interval_s=0.5)}
PROMPTS = ["What is it?", "Which colour comes first, and why does it matter to anyone at all?", "!"]
NUM_NEW = 64


def load_here(folder: Path, text_behind: Literal["video", "frame"] = "video", **compression: Any) -> OnePassModel:
    config = OnePassConfig(**compression)
    return load(folder, "tiny-qwen", device=CPU, dtype=torch.float32, compression=config, text_behind=text_behind)


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


def prefill(model: OnePassModel, frames: Frames, sizes: Sequence[int]) -> list[tuple[ChunkKV, ChunkKV]]:
    """Both levels of a video cut into chunks of so many frames."""
    run, start, pairs = model.prefill(), 0, []
    for size in sizes:
        part = Frames(frames.pixels[start : start + size], frames.times_s[start : start + size])
        start += size
        pairs.append(run.append(model.encode(model.preprocess(part), part.times_s), last=start == len(frames)))
    assert start == len(frames)
    return pairs


def low_cache(model: OnePassModel, pairs: list[tuple[ChunkKV, ChunkKV]], room: int = 400) -> MixedCache:
    return MixedCache(model.prefix(), [low for low, _ in pairs], model.rope, room=room)


def ask(model: OnePassModel, cache: MixedCache, prompt: str) -> tuple[torch.Tensor, list[int]]:
    """The logits of all of the prompt's tokens, and the greedy answer."""
    ids = torch.tensor(model.tokenize([Turn("user", prompt)]))
    with torch.inference_mode():
        hidden, _ = model.decoder([Window(model.decoder.embed_tokens(ids), cache)])
        logits = model.decoder.logits(hidden)
    answer: list[int] = []
    while len(answer) < NUM_NEW:
        last = model.forward([Row(ids, cache)])
        ids = last[0].argmax(-1, keepdim=True)
        answer.append(int(ids))
    return logits, answer


def inputs(model: OnePassModel, frames: Frames, prompt: str) -> dict[str, torch.Tensor]:
    """The whole prompt as transformers' own processor hands it to the model."""
    patches = model.vision.settings.patches
    pixels, grid = patches.flatten(model.preprocess(frames))
    behind = model.tokenize([Turn("user", prompt)])
    num_visual = grid[0] * grid[1] * grid[2] // 4
    video = model.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    ids = torch.tensor([[*model.prompt.prefix_ids, *[video] * num_visual, *behind]])
    interval_s = float(frames.times_s[1] - frames.times_s[0])
    return {
        "input_ids": ids,
        "mm_token_type_ids": torch.where(ids == video, 2, 0),
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([grid]),
        "second_per_grid_ts": torch.tensor([2 * interval_s]),
        "attention_mask": torch.ones_like(ids),
    }


def published_positions(reference: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own positions, but text behind the largest of the video's: [3, 1, tokens]."""
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
    positions, _ = reference.model.get_rope_index(**{name: given[name] for name in names})
    (visual,) = given["mm_token_type_ids"][0].nonzero(as_tuple=True)
    stop = int(visual[-1]) + 1
    behind = torch.arange(positions.shape[-1] - stop) + positions[..., :stop].max() + 1
    positions[..., stop:] = behind
    return positions


@pytest.mark.parametrize("text_behind", ["video", "frame"])
@pytest.mark.parametrize("video", VIDEOS)
def test_at_ratio_1_it_says_what_the_model_itself_says(reference: Reference, video: str, text_behind: Any) -> None:
    model, frames = reference.load(text_behind), VIDEOS[video]
    pairs = prefill(model, frames, [len(frames)] if len(frames) % 2 else [8, 8, 4])
    for prompt in PROMPTS:
        given = inputs(model, frames, prompt)
        if text_behind == "video":
            given["position_ids"] = published_positions(reference.model, given)
        with torch.inference_mode():
            expected = reference.model(**given).logits[0]
            whole = reference.model.generate(**given, max_new_tokens=NUM_NEW, do_sample=False)
        logits, answer = ask(model, low_cache(model, pairs), prompt)
        torch.testing.assert_close(logits, expected[-len(logits) :], atol=1e-4, rtol=0)
        assert answer == whole[0, given["input_ids"].shape[1] :].tolist()
        assert len(set(answer)) > 5, "an answer that tells something"


@pytest.mark.parametrize("sizes", [[20], [8, 6, 6], [2] * 10])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_number_of_chunks_changes_nothing(reference: Reference, sizes: list[int], prompt: str) -> None:
    model, frames = reference.load(), VIDEOS["20 s"]
    once, answer = ask(model, low_cache(model, prefill(model, frames, [20])), prompt)
    logits, same = ask(model, low_cache(model, prefill(model, frames, sizes)), prompt)
    torch.testing.assert_close(logits, once, atol=1e-4, rtol=0)
    assert same == answer


def same(a: ChunkKV, b: ChunkKV) -> bool:
    assert (a.level, a.ratio, a.next_position) == (b.level, b.ratio, b.next_position)
    pairs = ((a.keys, b.keys), (a.values, b.values), (a.positions, b.positions))
    return all(x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_every_compressor_keeps_the_positions_of_what_it_keeps(reference: Reference, compressor: str) -> None:
    whole, model = reference.load(), reference.load(low_ratio=2, high_ratio=7, compressor=compressor)
    frames = VIDEOS["20 s"]
    (raw, _), *_ = prefill(whole, frames, [8, 12])
    (low, high), (next_low, _) = prefill(model, frames, [8, 12])
    total = raw.num_tokens
    assert (low.num_tokens, high.num_tokens, low.level, high.level) == (-(-total // 2), -(-total // 7), "low", "high")
    assert low.next_position == high.next_position == raw.next_position
    assert next_low.positions is not None
    steps, rows, columns = next_low.positions[:, 0, 0]
    start = len(model.prompt.prefix_ids)
    assert (steps.min(), rows.min(), columns.min()) == (start + 16, start, start), "two positions a second from 8 s on"
    for kv in (low, high):
        assert kv.positions is not None and kv.positions.dtype == torch.int32
        if compressor == "pool":
            continue  # its tokens are means
        places = kv.positions.expand(3, *kv.keys.shape[:3])
        for layer, head in ((0, 0), (2, 1)):
            for token in range(kv.num_tokens):
                at = (raw.positions[:, 0, 0] == places[:, layer, head, token, None]).all(0).nonzero().item()
                assert torch.equal(kv.keys[layer, head, token], raw.keys[layer, head, at])
                assert torch.equal(kv.values[layer, head, token], raw.values[layer, head, at])


@pytest.mark.parametrize("compressor", ["stride", "keydiff"])
@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_the_store_gives_back_what_it_was_given(reference: Reference, compressor: str, precision: Any) -> None:
    model = reference.load(low_ratio=2, high_ratio=7, compressor=compressor)
    for kv in [kv for pair in prefill(model, VIDEOS["20 s"], [8, 12]) for kv in pair]:
        data = codec.encode(kv, precision)
        decoded = codec.decode(data)
        assert 0 < len(data) - codec.stored_nbytes(kv, precision) < 1000
        if precision == "exact":
            assert same(decoded, kv)
        else:
            assert torch.equal(decoded.positions, kv.positions) and decoded.next_position == kv.next_position


def test_all_selected_is_the_low_cache_and_none_is_the_high_cache(reference: Reference) -> None:
    model = reference.load(low_ratio=2, high_ratio=7, compressor="keydiff")
    pairs = prefill(model, VIDEOS["20 s"], [8, 6, 6])
    end = pairs[-1][0].next_position
    for level in (0, 1):
        cache = MixedCache(model.prefix(), [pair[level] for pair in pairs], model.rope, room=8)
        assert cache.next_position == end and cache.length == cache.num_mixed
        assert cache.num_mixed == len(model.prompt.prefix_ids) + sum(pair[level].num_tokens for pair in pairs)
        for (start, stop), pair in zip(cache.spans, pairs, strict=True):
            kv = pair[level]
            rotated = model.rope.rotate(kv.keys, *model.rope.tables(kv.positions, torch.float32))
            assert torch.equal(cache.keys[:, :, start:stop], rotated)
            assert torch.equal(cache.values[:, :, start:stop], kv.values)


@pytest.mark.parametrize(("mode", "num_low"), [("exact", 9), ("recent-1", 1), ("high-memory", 0)])
def test_the_prefill_mode_is_what_a_pass_sees_and_restoring_goes_on_alike(
    reference: Reference, mode: str, num_low: int
) -> None:
    model, frames = reference.load(low_ratio=2, high_ratio=6, prefill_mode=mode), VIDEOS["20 s"]
    pairs = prefill(model, frames, [6, 6, 8])
    part = Frames(frames.pixels[12:], frames.times_s[12:])
    tokens = model.encode(model.preprocess(part), part.times_s)
    by_hand, resumed = reference.load(low_ratio=2, high_ratio=6).prefill(), model.prefill()
    for index, (low, high) in enumerate(pairs[:2]):
        seen = low if index >= 2 - num_low else high
        by_hand.restore(0, seen, seen)
        resumed.restore(0, low, high)
    for run in (by_hand, resumed):
        for kv, expected in zip(run.append(tokens, last=True), pairs[2], strict=True):
            torch.testing.assert_close(kv.keys, expected.keys, atol=1e-5, rtol=0)
            assert torch.equal(kv.positions, expected.positions)


@pytest.mark.parametrize(("width", "height"), [(100, 60), (40, 90), (64, 64), (333, 77)])
def test_preprocessing_is_the_image_processors(reference: Reference, width: int, height: int) -> None:
    """It doubles a still image; so two equal frames must come out as it makes one."""
    model, frames = reference.load(), noise(1, width, height)
    processor = Qwen2VLImageProcessorPil(patch_size=PATCH, size=dict(VISUAL_TOKENS))
    expected = processor(images=[frames.pixels[0]], return_tensors="pt")
    twice = Frames(frames.pixels.repeat(2, axis=0), np.array([0.0, 1.0]))
    patches, grid = model.vision.settings.patches.flatten(model.preprocess(twice))
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    torch.testing.assert_close(patches, expected["pixel_values"], atol=1e-6, rtol=0)
    assert model.num_visual_tokens(2, width, height) == len(patches) // 4
    alone, _ = model.vision.settings.patches.flatten(model.preprocess(frames))
    assert torch.equal(alone, patches), "the last frame stands in for the one that is missing"


def test_two_frames_make_a_patch_in_time(reference: Reference) -> None:
    model, frames = reference.load(), noise(4, 64, 64)
    patches, grid = model.vision.settings.patches.flatten(model.preprocess(frames))
    first, second = patches.reshape(grid[0], -1, 3, 2, PATCH**2).unbind(3)
    for index, part in enumerate((first, second)):
        still = Frames(frames.pixels[[index, index, index + 2, index + 2]], frames.times_s)
        alone, _ = model.vision.settings.patches.flatten(model.preprocess(still))
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
        with pytest.raises(ValueError, match=next(iter(bad))):
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
    assert model.compression == OnePassConfig(2, 8, "keydiff", "recent-2")
    assert (model.spec.name, model.prefill_mode) == ("tiny-qwen", "recent-2")
    with pytest.raises(ValueError, match="compressor"):
        load_model("tiny", compressor="pool")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for name in (str(tmp_path), "no/such/folder"):
        with pytest.raises(UnknownModelError, match=r"tiny.*qwen2_5_vl"):
            load_model(name)
