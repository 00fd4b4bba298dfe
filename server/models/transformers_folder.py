"""Models in local folders, in the layout that transformers saves and loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast

from server.models.base import ModelSpec
from server.models.checkpoint import CheckpointError


def load_pretrained(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The model of transformers' own class, ready to run. Raises CheckpointError, which names the tensors that are
    missing, left over or of the wrong shape."""
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
    missing, left = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or left:
        raise CheckpointError(f"missing tensors: {missing}; unexpected tensors: {left}")
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Raises CheckpointError."""
    try:
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no tokenizer: {error}") from error
    return tokenizer


def end_ids(model: Any, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The tokens that end an answer."""
    ids: int | Sequence[int] | None = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def describe(
    name: str, model: Any, *, tokens_per_frame: int, frames_per_chunk: int, low_ratio: int, high_ratio: int
) -> ModelSpec:
    """What the server must know, from the model's configuration."""
    text, generation = model.config.get_text_config(), model.generation_config
    heads = text.num_attention_heads
    return ModelSpec(
        name=name,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        tokens_per_frame=tokens_per_frame,
        frames_per_chunk=frames_per_chunk,
        low_ratio=low_ratio,
        high_ratio=high_ratio,
        max_positions=text.max_position_embeddings,
        max_duration_s=None,
        fps=1.0,
        default_reload=3,
        temperature=(generation.temperature or 0.0) if generation.do_sample else 0.0,
    )
