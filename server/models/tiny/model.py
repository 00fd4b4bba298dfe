"""The bundled model: its parts from this folder, put together as a Video-XL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from compression.score import AttentionScorer
from server.models.base import ModelSpec
from server.models.lm.decoder import Decoder, DecoderConfig
from server.models.lm.decoder_model import PromptConfig
from server.models.tensors import load_into, without_values
from server.models.tiny.encoder import TimeEmbedding, TinyEncoder
from server.models.tiny.tokenizer import PREFIX
from server.models.videoxl.compression_config import read_compression
from server.models.videoxl.model import VideoXL

FOLDER = Path(__file__).parent


class TinyModules(nn.Module):
    """What is trained and stored: the language model and the vision tower."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config)
        self.encoder = TinyEncoder(config.hidden_size)


def read_config(folder: Path = FOLDER) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def load_tiny(
    folder: Path = FOLDER,
    *,
    device: torch.device,
    dtype: torch.dtype,
    low_ratio: int | None = None,
    high_ratio: int | None = None,
    prefill_mode: str | None = None,
) -> VideoXL:
    """The bundled model from ``folder``. Ratios (equal: one uniform compression) and mode override the configured ones.

    Raises CheckpointError where the weights do not fit the configuration.
    """
    config = read_config(folder)
    decoder_config = DecoderConfig.of(config)
    with without_values():
        modules = TinyModules(decoder_config)
    load_into(modules, load_file(folder / "model.safetensors"))
    return assemble(
        modules.to(device, dtype), config, folder, low_ratio=low_ratio, high_ratio=high_ratio, prefill_mode=prefill_mode
    )


def assemble(
    modules: TinyModules,
    config: dict[str, Any],
    folder: Path = FOLDER,
    *,
    low_ratio: int | None = None,
    high_ratio: int | None = None,
    prefill_mode: str | None = None,
) -> VideoXL:
    """A servable model around trained (or, in tests, random) modules; the tokenizer comes from ``folder``."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    compression = read_compression(config, low_ratio=low_ratio, high_ratio=high_ratio, prefill_mode=prefill_mode)
    decoder_config = modules.decoder.config
    spec = ModelSpec(
        name="x2l-tiny",
        num_layers=decoder_config.num_hidden_layers,
        num_heads=decoder_config.num_attention_heads,
        num_kv_heads=decoder_config.num_key_value_heads,
        head_dim=decoder_config.head_dim,
        vocab_size=decoder_config.vocab_size,
        tokens_per_frame=TinyEncoder.TOKENS_PER_FRAME,
        frames_per_chunk=config["frames_per_chunk"],
        low_ratio=compression.low_ratio,
        high_ratio=compression.high_ratio,
        max_positions=decoder_config.max_position_embeddings,
        max_duration_s=float(TimeEmbedding.MAX_S),
        fps=config["fps"],
        default_reload=config["default_reload"],
        temperature=0.0,
    )
    prompt = PromptConfig(
        prefix_ids=tuple(tokenizer.encode(PREFIX, add_special_tokens=False)),
        chat_template=tokenizer.chat_template,
        end_ids=frozenset({tokenizer.eos_token_id}),
    )
    heads = config["scorer_heads"]
    scorer = AttentionScorer(None if heads is None else tuple((layer, head) for layer, head in heads))
    encoder = modules.encoder.eval().requires_grad_(False)
    return VideoXL(spec, modules.decoder, encoder, compression, prompt, tokenizer, scorer)
