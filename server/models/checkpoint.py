"""Reads checkpoints in Video-XL's public layout: which tensor belongs to which module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from server.models.decoder import Decoder, DecoderConfig

M = TypeVar("M", bound=nn.Module)
_VISION = ("model.vision_tower.", "model.mm_projector.")
_STRAY = ("embeddings.position_ids", "rotary_emb.inv_freq")


class CheckpointError(ValueError):
    """Tensors are missing, left over or of the wrong shape; the message names them."""


def load_decoder(config: DecoderConfig, tensors: Mapping[str, Tensor], eos_id: int | None = None) -> Decoder:
    """Builds the language model from a checkpoint's tensors, whose storage it takes over.

    Where a checkpoint has no VST weights (a plain Qwen2), the projections are copied from the plain ones and the VST
    embedding from the row of ``eos_id``. Raises CheckpointError.
    """
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if not name.startswith(_VISION)}
    for name in list(state):
        if name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias")
        ):
            owner, _, leaf = name.rpartition(".self_attn.")
            if not leaf.startswith("beacon_"):
                state.setdefault(f"{owner}.self_attn.beacon_{leaf}", state[name])
    if eos_id is not None and "embed_tokens.weight" in state:
        state.setdefault("beacon_embed_tokens.weight", state["embed_tokens.weight"][eos_id : eos_id + 1])
    with torch.device("meta"):
        decoder = Decoder(config)
    return load_into(decoder, state)


def load_into(module: M, state: Mapping[str, Tensor]) -> M:
    """Gives ``module`` (which may be on the meta device) the tensors of ``state``, without a copy."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith(_STRAY)}
    try:
        problems = module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(str(error)) from error
    missing = [name for name in problems.missing_keys if "post_layernorm" not in name]
    if missing or problems.unexpected_keys:
        raise CheckpointError(f"missing tensors: {missing}; unexpected tensors: {problems.unexpected_keys}")
    return module
