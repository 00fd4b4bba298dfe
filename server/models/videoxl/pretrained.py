"""Video-XL from a folder in the public checkpoint's layout (huggingface.co/sy1998/Video_XL; arXiv 2409.14485)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from compression.score import AttentionScorer
from server.models import chatml
from server.models.base import ModelSpec, check_scorer_heads
from server.models.hub import read_json
from server.models.lm.decoder_model import PromptConfig
from server.models.tensors import CheckpointError, TensorFolder
from server.models.tokenizer import load_tokenizer
from server.models.videoxl.checkpoint import end_ids, load_modules, missing_vsts
from server.models.videoxl.compression_config import CompressionConfig, read_compression
from server.models.videoxl.model import VideoXL

_log = logging.getLogger(__name__)

PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
"""What precedes the video. What follows it is tokenised apart."""

CHAT_TEMPLATE = chatml.template(behind_media="\n")
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_SUPPORTED: dict[str, Any] = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "use_sliding_window": False,
    "beacon_attn": "full-coverage",
    "beacon_pos": "interleave",
    "beacon_sink_size": 0,
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_mode": "average",
    "mm_vision_select_feature": "patch",
}
"""Settings of ``config.json`` that are understood in one way only; absent means that way."""
_WINDOW = 1440
"""Visual tokens of a chunk where ``config.json`` does not tell."""


def load_pretrained(
    folder: Path,
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    low_ratio: int | None = None,
    high_ratio: int | None = None,
    prefill_mode: str | None = None,
) -> VideoXL:
    """The model in ``folder``, to be served as ``name``.

    Tensors go to ``device`` one by one, so that the weights are never held twice. Raises CheckpointError where the
    files are damaged, or do not fit together, or ask for what is not supported; no weights were read by then.
    """
    config = read_json(folder / "config.json")
    _check(config)
    compression = read_compression(config, low_ratio=low_ratio, high_ratio=high_ratio, prefill_mode=prefill_mode)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config["vocab_size"]:
        raise CheckpointError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config['vocab_size']}")
    prompt = PromptConfig(
        prefix_ids=tuple(tokenizer.encode(PREFIX, add_special_tokens=False)),
        chat_template=CHAT_TEMPLATE,
        end_ids=_end_ids(folder, config, tokenizer),
    )
    tensors = TensorFolder(folder)
    shapes = tensors.outline()
    outline = load_modules(config, shapes)
    encoder, num_layers = outline.encoder, outline.encoder.tower.config.num_hidden_layers
    if not -num_layers <= encoder.select_layer + 1 <= num_layers + 1:
        raise CheckpointError(
            f"config.json: mm_vision_select_layer is {encoder.select_layer}, but the tower has {num_layers} layers"
        )
    if missing := missing_vsts(config, shapes):
        _log.warning(
            "untrained copies stand in for %d tensors of summary tokens that %s lacks: %s, ...",
            len(missing),
            name,
            missing[0],
        )
    spec = _spec(name, config, encoder.tokens_per_frame, compression)
    heads = config.get("scorer_heads")
    check_scorer_heads(heads or (), spec.num_layers, spec.num_heads)
    modules = load_modules(config, tensors.read(device, dtype))
    encoder = modules.encoder.to(device).eval().requires_grad_(False)  # its buffer; the weights are there
    calibrated = None if heads is None else tuple((layer, head) for layer, head in heads)
    scorer = AttentionScorer(calibrated, per_token=compression.edge_ratio is not None)
    return VideoXL(spec, modules.decoder, encoder, compression, prompt, tokenizer, scorer)


def _check(config: dict[str, Any]) -> None:
    missing = [name for name in _NEEDED if not isinstance(config.get(name), int)]
    if missing:
        raise CheckpointError(f"config.json has no {', '.join(missing)}")
    for name, supported in _SUPPORTED.items():
        if config.get(name, supported) != supported:
            raise CheckpointError(f"config.json: {name} is {config[name]!r}; only {supported!r} is supported")
    window = config.get("beacon_window", _WINDOW)
    if config.get("beacon_stride", window) != window:
        raise CheckpointError(f"config.json: beacon_stride is {config['beacon_stride']}, not beacon_window ({window})")


def _spec(name: str, config: dict[str, Any], tokens_per_frame: int, compression: CompressionConfig) -> ModelSpec:
    window = config.get("beacon_window", _WINDOW)
    if window % tokens_per_frame:
        raise CheckpointError(f"config.json: beacon_window is {window}, but a frame has {tokens_per_frame} tokens")
    return ModelSpec(
        name=name,
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        tokens_per_frame=tokens_per_frame,
        frames_per_chunk=window // tokens_per_frame,
        low_ratio=compression.low_ratio,
        high_ratio=compression.high_ratio,
        max_positions=config["max_position_embeddings"],
        max_duration_s=None,
        fps=config.get("fps", 1.0),
        default_reload=config.get("default_reload", 3),
        temperature=0.0,
    )


def _end_ids(folder: Path, config: dict[str, Any], tokenizer: Any) -> frozenset[int]:
    """Whatever the files call an end. How ``generation_config.json`` samples is left alone: the default is greedy."""
    ids = set(end_ids(config))
    if (folder / "generation_config.json").is_file():
        ids |= set(end_ids(read_json(folder / "generation_config.json")))
    known = tokenizer.get_vocab()
    return frozenset(ids | {known[token] for token in _END_TOKENS if token in known})
