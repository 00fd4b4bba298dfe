"""Tiny random models of transformers' own classes, saved as users find them: weights, configuration, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from server.video.frames import Frames

SPECIALS = ["<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PATCH = 4
VISUAL_TOKENS = {"shortest_edge": 12 * (2 * PATCH) ** 2, "longest_edge": 20 * (2 * PATCH) ** 2}
"""12 to 20 for two frames, in pixels."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and Qwen's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIALS[0])
    fast.add_special_tokens({"additional_special_tokens": SPECIALS})
    return fast


def save_qwen2_5_vl(folder: Path, **text: Any) -> PreTrainedModel:
    """A Qwen2.5-VL of three layers in ``folder``; ``text`` overrides its text configuration."""
    tokenizer = byte_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    config = Qwen2_5_VLConfig(
        text_config={**_text(mrope_section=[2, 4, 2]), "eos_token_id": ids["<|im_end|>"], **text},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "out_hidden_size": 64,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return _save(Qwen2_5_VLForConditionalGeneration, config, tokenizer, folder)


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
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **rope},
    }


def _save(kind: Any, config: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: PreTrainedModel = kind(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:  # large enough for positions, and every token, to matter
                    parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
                elif "norm" not in name and "ln_q" not in name:
                    parameter.normal_(0, 0.5)
    model.generation_config.eos_token_id = None  # so that it says all it is asked for
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"size": VISUAL_TOKENS}))
    return model


def noise(num_frames: int, width: int, height: int, *, interval_s: float = 1.0) -> Frames:
    """Frames of coloured noise that differ from each other, the same at every call."""
    shape = num_frames, height // 8 + 1, width // 8 + 1, 3
    coarse = np.random.default_rng(num_frames * width).integers(0, 255, shape, dtype=np.uint8)
    pixels = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return Frames(np.ascontiguousarray(pixels), np.arange(num_frames) * interval_s)
