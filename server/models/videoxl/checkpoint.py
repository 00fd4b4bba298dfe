"""Video-XL's public layout: which tensor belongs to which module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from server.models.lm.decoder import Decoder, DecoderConfig
from server.models.tensors import load_into, without_values
from server.models.videoxl.clip import ClipEncoder

_PLACES = (
    ("model.vision_tower.vision_tower.vision_model.", "encoder.tower."),
    ("model.mm_projector.", "encoder.projector."),
    ("lm_head.", "decoder.lm_head."),
    ("model.", "decoder."),
)
"""Where a name begins in the checkpoint and in VideoXLModules; the first that fits."""


class VideoXLModules(nn.Module):
    """The language model and the vision tower with its projector."""

    def __init__(self, config: dict[str, Any]) -> None:
        """``config`` is the checkpoint's ``config.json``."""
        super().__init__()
        self.decoder = Decoder(DecoderConfig.of(config))
        self.encoder = ClipEncoder(self.decoder.config.hidden_size, config)


def load_modules(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> VideoXLModules:
    """Builds the model from a checkpoint's tensors, whose storage it takes over, on their device.

    VST weights that a checkpoint does not have are those of plain tokens, and the VST embedding is the row of
    ``eos_token_id``. Raises CheckpointError for tensors that are missing, left over or of the wrong shape.
    """
    state = {_inside(name): tensor for name, tensor in tensors.items() if "vision_model.post_layernorm." not in name}
    state = _untrained_vsts(state, config) | state
    with without_values():
        modules = VideoXLModules(config)
    if modules.decoder.config.tie_word_embeddings:
        state.pop("decoder.lm_head.weight", None)  # the same as the embeddings
    return load_into(modules, state, shown=_outside)


def missing_vsts(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the VST weights that a checkpoint does not have."""
    state = {_inside(name): tensor for name, tensor in tensors.items()}
    return sorted(map(_outside, _untrained_vsts(state, config).keys() - state.keys()))


def _untrained_vsts(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the published code begins its training with."""
    made = {}
    for name, tensor in state.items():
        owner, attention, leaf = name.rpartition(".self_attn.")
        if name.startswith("decoder.") and leaf.startswith(("q_proj", "k_proj", "v_proj")):
            made[f"{owner}{attention}beacon_{leaf}"] = tensor
    embeddings, eos_id = state.get("decoder.embed_tokens.weight"), end_ids(config)[:1]
    if embeddings is not None and eos_id and eos_id[0] < len(embeddings):
        made["decoder.beacon_embed_tokens.weight"] = embeddings[eos_id[0] : eos_id[0] + 1]
    return made


def end_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """``eos_token_id`` of a ``config.json`` or ``generation_config.json``, which may be one, several or none."""
    ids = config.get("eos_token_id")
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _inside(name: str) -> str:
    """A tensor's name in the checkpoint -> in VideoXLModules."""
    for outside, inside in _PLACES:
        if name.startswith(outside):
            return inside + name.removeprefix(outside)
    return name


def _outside(name: str) -> str:
    """The way back."""
    for outside, inside in _PLACES:
        if name.startswith(inside):
            return outside + name.removeprefix(inside)
    return name
