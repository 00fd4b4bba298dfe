"""Tiny random models of transformers' own classes, saved as users find them: weights, configuration, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from server.models.base import Row, Turn
from server.models.families.one_pass import OnePassModel
from server.models.lm.decoder import Window
from server.video.frames import Frames

SPECIALS = ["<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PATCH = 4
FRAME_TOKENS = 12, 20
"""For two frames, where a model's own would make the tests slow."""
TILE = 40
RESOLUTIONS = [[40, 40], [40, 80], [80, 40], [80, 80], [40, 120], [160, 120]]
"""Pixels of LLaVA-OneVision's tower, and what tiles it puts together; height and width."""
PICTURES = [(100, 60), (61, 45), (40, 90), (150, 210), (333, 77)]
"""Width and height of images: odd sizes, some to be made smaller and some larger."""
CLIPS = [(100, 60, 4), (61, 45, 4), (333, 77, 2), (20, 50, 4), (64, 64, 3)]
"""The same of videos, and their frames."""
PREPROCESSING = Path(__file__).parent / "data" / "preprocessing.npz"
"""What the original processors make of all these; preprocessing_arrays.py made it."""
QUESTIONS = ["What is it?", "Which colour comes first, and why does it matter to anyone at all?", "!"]
NUM_NEW = 64
"""Tokens of an answer."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and Qwen's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIALS[0])
    fast.add_special_tokens({"additional_special_tokens": SPECIALS})
    return fast


_IDS = {token: byte_tokenizer().convert_tokens_to_ids(token) for token in SPECIALS}
_QWEN_IDS = {
    "image_token_id": _IDS["<|image_pad|>"],
    "video_token_id": _IDS["<|video_pad|>"],
    "vision_start_token_id": _IDS["<|vision_start|>"],
    "vision_end_token_id": _IDS["<|vision_end|>"],
}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "out_hidden_size": 64,
}


def save_qwen2_5_vl(folder: Path, **text: Any) -> PreTrainedModel:
    """A Qwen2.5-VL of three layers in ``folder``; ``text`` overrides its text configuration."""
    config = Qwen2_5_VLConfig(
        text_config={**_text(mrope_section=[2, 4, 2]), **text},
        vision_config={**_VISION, "window_size": 4 * PATCH, "fullatt_block_indexes": [1], "tokens_per_second": 2},
        **_QWEN_IDS,
    )
    return _save(Qwen2_5_VLForConditionalGeneration, config, folder)


def save_qwen3_vl(folder: Path) -> PreTrainedModel:
    """A Qwen3-VL of three layers, of which two get deep features."""
    config = Qwen3VLConfig(
        text_config={**_text(mrope_section=[3, 3, 2]), "head_dim": 16},
        vision_config={**_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        tie_word_embeddings=False,
        **_QWEN_IDS,
    )
    return _save(Qwen3VLForConditionalGeneration, config, folder)


def save_llava_onevision(folder: Path) -> PreTrainedModel:
    """A LLaVA-OneVision of three layers, 9 visual tokens a frame."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        text_config={**_text(), "model_type": "qwen2"},
        vision_config={**vision, "model_type": "siglip_vision_model", "image_size": TILE, "patch_size": 8},
        image_grid_pinpoints=RESOLUTIONS,
        image_token_index=_IDS["<|image_pad|>"],
        video_token_index=_IDS["<|video_pad|>"],
    )
    return _save(LlavaOnevisionForConditionalGeneration, config, folder)


SAVE = {"qwen2_5_vl": save_qwen2_5_vl, "qwen3_vl": save_qwen3_vl, "llava_onevision": save_llava_onevision}
"""Every family, by the type in its ``config.json``."""


def edit_json(path: Path, **values: Any) -> None:
    """Sets some of an object's values in a file, which may be new."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


def noise(num_frames: int, width: int, height: int, *, interval_s: float = 1.0) -> Frames:
    """Frames of coloured noise that differ from each other, the same at every call."""
    shape = num_frames, height // 8 + 1, width // 8 + 1, 3
    coarse = np.random.default_rng(num_frames * width).integers(0, 255, shape, dtype=np.uint8)
    pixels = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return Frames(np.ascontiguousarray(pixels), np.arange(num_frames) * interval_s)


VIDEOS = noise(20, 100, 60), noise(9, 40, 90, interval_s=0.5)


def image(seed: int, width: int, height: int) -> Frames:
    """A picture of coloured noise, the same at every call."""
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    pixels = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return Frames(np.ascontiguousarray(pixels)[None], np.zeros(1))


def prompt(
    model: OnePassModel, frames: Frames | None, question: str, images: Sequence[Any] = ()
) -> dict[str, torch.Tensor]:
    """What transformers' own processor makes of a video, images and a question, for the model's ``generate``.

    ``images`` are preprocessed.
    """
    family = type(model.vision).__name__
    around = _IDS["<|vision_start|>"], _IDS["<|vision_end|>"]
    ids, extra = list(model.prompt.prefix_ids), {}
    if frames is not None:
        ids += _video(model, frames, extra)
    if family == "OneVisionTower" and images:
        most = max(len(each.pixels) for each in images)
        normal = [(each.pixels.float() / 255 - 0.5) / 0.5 for each in images]
        stacked = [torch.cat([each, each.new_zeros(most - len(each), *each.shape[1:])]) for each in normal]
        sizes = torch.tensor([[each.height, each.width] for each in images])
        extra |= {"pixel_values": torch.stack(stacked), "image_sizes": sizes}
        extra["batch_num_images"] = torch.tensor([len(images)])
        ids += [_IDS["<|image_pad|>"]] * sum(model.num_image_tokens(each) for each in images)
    elif images:
        patches, grids = zip(*(model.vision.image_patches.flatten(each) for each in images), strict=True)
        extra |= {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
        for each in images:
            ids += [around[0], *[_IDS["<|image_pad|>"]] * (model.num_image_tokens(each) - 2), around[1]]
    behind = model.tokenize([Turn("user", question)], behind_media=bool(frames or images))
    whole = torch.tensor([[*ids, *behind]])
    if family != "OneVisionTower":
        kinds = torch.where(whole == _IDS["<|video_pad|>"], 2, 0) + torch.where(whole == _IDS["<|image_pad|>"], 1, 0)
        extra["mm_token_type_ids"] = kinds
    return {"input_ids": whole, "attention_mask": torch.ones_like(whole), **extra}


def _video(model: OnePassModel, frames: Frames, extra: dict[str, torch.Tensor]) -> list[int]:
    """The tokens of a video; ``extra`` gets what the model takes besides."""
    family = type(model.vision).__name__
    pixels = model.preprocess(frames)
    num_visual = model.num_visual_tokens(len(frames), frames.pixels.shape[2], frames.pixels.shape[1])
    video = [_IDS["<|video_pad|>"]] * num_visual
    if family == "OneVisionTower":
        extra["pixel_values_videos"] = ((pixels.float() / 255 - 0.5) / 0.5)[None]
        return [*video, video[0]]
    patches, grid = model.vision.patches.flatten(pixels)
    extra |= {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid])}
    if family == "Qwen25Tower":
        interval_s = float(frames.times_s[1] - frames.times_s[0])
        extra["second_per_grid_ts"] = torch.tensor([2 * interval_s])
        return [_IDS["<|vision_start|>"], *video, _IDS["<|vision_end|>"]]
    size, parts = num_visual // grid[0], []
    for step in range(grid[0]):
        pair = frames.times_s[2 * step : 2 * step + 2]
        text = f"<{pair.mean():.1f} seconds><|vision_start|>", "<|vision_end|>"
        before, after = (model.tokenizer.encode(part, add_special_tokens=False) for part in text)
        parts += [*before, *video[:size], *after]
    return parts


def _text(**rope: Any) -> dict[str, Any]:
    return {
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": _IDS["<|im_end|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **rope},
    }


def _save(kind: Any, config: Any, folder: Path) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = kind(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:  # large enough for positions, and every token, to matter
                    parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
                elif "norm" not in name and "ln_q" not in name:
                    parameter.normal_(0, 0.5)
    model.generation_config.eos_token_id = None  # so that it says all it is asked for
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def prefill(model: OnePassModel, frames: Frames, sizes: Sequence[int]) -> list[tuple[ChunkKV, ChunkKV]]:
    """Both levels of a video cut into chunks of so many frames."""
    run, start, pairs = model.prefill(), 0, []
    for size in sizes:
        part = Frames(frames.pixels[start : start + size], frames.times_s[start : start + size])
        start += size
        pairs.append(run.append(model.encode(model.preprocess(part), part.times_s), last=start == len(frames)))
    assert start == len(frames)
    return pairs


def ask(
    model: OnePassModel,
    pairs: Sequence[tuple[ChunkKV, ChunkKV]],
    question: str,
    num_new: int,
    images: Sequence[Any] = (),
) -> tuple[torch.Tensor, list[int]]:
    """With every chunk selected, and preprocessed images: the logits of all of the text's tokens, and the greedy
    answer."""
    ids = torch.tensor(model.tokenize([Turn("user", question)], behind_media=bool(pairs or images)))
    cache = MixedCache(model.prefix(), [low for low, _ in pairs], model.rope, room=len(ids) + num_new)
    for each in images:
        model.forward([Row(torch.empty(0, dtype=torch.int64), cache, model.encode_image(each))])
    with torch.inference_mode():
        hidden, _ = model.decoder([Window(model.decoder.embed_tokens(ids), cache)])
        logits = model.decoder.logits(hidden)
    answer: list[int] = []
    while len(answer) < num_new:
        ids = model.forward([Row(ids, cache)])[0].argmax(-1, keepdim=True)
        answer.append(int(ids))
    return logits, answer
