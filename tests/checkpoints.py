"""Writes checkpoints in Video-XL's public layout, with tiny random weights. Names stand here as the layout has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import Tensor

Files = Literal["safetensors", "sharded", "bin", "sharded-bin"]

TINY: dict[str, Any] = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava_qwen",
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "beacon_window": 16,
    "beacon_stride": 16,
    "beacon_attn": "full-coverage",
    "beacon_ratio": [2, 4, 8],
    "beacon_param": ["q", "k", "v"],
    "beacon_embed_init": "eos",
    "beacon_sink_size": 0,
    "beacon_pos": "interleave",
    "mm_vision_tower": "/a/private/path",
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_stride": 2,
    "mm_vision_select_layer": -2,
    "eos_token_id": 151,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}
"""4 visual tokens a frame, 4 frames a chunk."""

VISION = "model.vision_tower.vision_tower.vision_model."


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of the layout, float32."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in layout(config).items():
        weight = torch.randn(shape, generator=generator) * 0.2
        weights[name] = weight + 1 if "norm" in name and name.endswith("weight") else weight
    return weights


def layout(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape."""
    return dict(_shapes(config))


def stray_buffers() -> dict[str, Tensor]:
    """What checkpoints of other versions of the libraries hold besides."""
    return {
        f"{VISION}embeddings.position_ids": torch.arange(17)[None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }


def write_checkpoint(
    folder: Path,
    weights: dict[str, Tensor],
    config: dict[str, Any] = TINY,
    *,
    files: Files = "safetensors",
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Writes ``config.json``, the tokenizer (of single characters unless given) and the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    # Sampling, as generation configurations often ask for: it is not to be followed.
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": [151, 150]}))
    (tokenizer or character_tokenizer()).save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    stem, end = ("pytorch_model", "bin") if "bin" in files else ("model", "safetensors")
    save: Any = torch.save if end == "bin" else save_file
    if not files.startswith("sharded"):
        save(weights, folder / f"{stem}.{end}")
        return folder
    names = sorted(weights)
    shards = {f"{stem}-{i + 1:05d}-of-00003.{end}": names[i::3] for i in range(3)}
    for shard, inside in shards.items():
        save({name: weights[name] for name in inside}, folder / shard)
    places = {name: shard for shard, inside in shards.items() for name in inside}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": places}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    return folder


def character_tokenizer() -> Tokenizer:
    """Printable ASCII and the line feed, a token each, then three special tokens: 150 to 152."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocab = {character: index for index, character in enumerate(characters)}
    vocab |= {f"<unused{index}>": index for index in range(len(vocab), 150)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    return tokenizer


SPECIALS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")


def word_tokenizer() -> Tokenizer:
    """Four tokens, so that it fits into any vocabulary; it knows no word."""
    vocab = {"<unknown>": 0} | {token: index + 1 for index, token in enumerate(SPECIALS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unknown>"))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    return tokenizer


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, middle, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = hidden // config["num_attention_heads"]
    keys = config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.beacon_embed_tokens.weight", (1, hidden)
    for layer in (f"model.layers.{number}." for number in range(config["num_hidden_layers"])):
        for kind in ("", "beacon_"):
            for part, size in (("q", hidden), ("k", keys), ("v", keys)):
                yield f"{layer}self_attn.{kind}{part}_proj.weight", (size, hidden)
                yield f"{layer}self_attn.{kind}{part}_proj.bias", (size,)
        yield f"{layer}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}mlp.gate_proj.weight", (middle, hidden)
        yield f"{layer}mlp.up_proj.weight", (middle, hidden)
        yield f"{layer}mlp.down_proj.weight", (hidden, middle)
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
    yield from _vision_shapes(config["vision_config"])
    yield "model.mm_projector.0.weight", (hidden, config["vision_config"]["hidden_size"])
    yield "model.mm_projector.0.bias", (hidden,)
    yield "model.mm_projector.2.weight", (hidden, hidden)
    yield "model.mm_projector.2.bias", (hidden,)


def _vision_shapes(vision: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, middle, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    yield f"{VISION}embeddings.class_embedding", (width,)
    yield f"{VISION}embeddings.patch_embedding.weight", (width, 3, patch, patch)
    yield f"{VISION}embeddings.position_embedding.weight", ((vision["image_size"] // patch) ** 2 + 1, width)
    norms = [f"{VISION}pre_layrnorm", f"{VISION}post_layernorm"]
    for layer in (f"{VISION}encoder.layers.{number}." for number in range(vision["num_hidden_layers"])):
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        linear = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
        linear |= {"mlp.fc1": (middle, width), "mlp.fc2": (width, middle)}
        for name, shape in linear.items():
            yield f"{layer}{name}.weight", shape
            yield f"{layer}{name}.bias", shape[:1]
    for norm in norms:
        yield f"{norm}.weight", (width,)
        yield f"{norm}.bias", (width,)
