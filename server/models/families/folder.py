"""Models in local folders, in the layout that transformers saves and loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import is_accelerate_available

from compression.rope import Rope
from compression.score import AttentionScorer
from server.models.base import ModelSpec
from server.models.families.decoder import TransformersDecoder
from server.models.families.one_pass import OnePassConfig, OnePassModel, VisionTower
from server.models.hub import read_json
from server.models.lm.decoder_model import PromptConfig
from server.models.tensors import CheckpointError

_TYPICAL_PIXELS = 1280, 720


@dataclass(frozen=True, slots=True)
class Hints:
    """What a folder's ``config.json`` may say, under ``x2l``, of how it is served; published ones say nothing.

    ``frame_size``: the width and height in pixels that every frame is resized to. ``scorer_heads``: the (layer, head)
    pairs whose attention scores chunks; None takes all.
    """

    frames_per_chunk: int = 16  # even, because towers see two frames at a time
    frame_size: tuple[int, int] | None = None
    scorer_heads: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, config: dict[str, Any]) -> Self:
        said = config.get("x2l", {})
        size, heads = said.get("frame_size"), said.get("scorer_heads")
        return cls(
            said.get("frames_per_chunk", cls().frames_per_chunk),
            None if size is None else (size[0], size[1]),
            None if heads is None else tuple((layer, head) for layer, head in heads),
        )


@dataclass(frozen=True, slots=True)
class TransformersFolder:
    """What a folder holds: a generating model of transformers' own class, ready to run, and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    hints: Hints

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Self:
        """Reads no code from the folder, nor anything from elsewhere. Raises CheckpointError, which names the tensors
        that are missing, left over or of the wrong shape."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, info = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="sdpa",
                local_files_only=True,
                output_loading_info=True,
                # Tensor by tensor to the device, where accelerate is installed; else by way of the host's memory.
                device_map=device if device.type != "cpu" and is_accelerate_available() else None,
            )
        except torch.OutOfMemoryError:  # not the folder's fault
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
        missing, left = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or left:
            raise CheckpointError(f"missing tensors: {missing}; unexpected tensors: {left}")
        hints = Hints.of(read_json(folder / "config.json"))
        return cls(model.to(device).eval().requires_grad_(False), tokenizer, hints)

    def assemble(
        self, name: str, vision: VisionTower, rope: Rope, compression: OnePassConfig, *, prefix: str, template: str
    ) -> OnePassModel:
        """The model to serve: ``prefix`` is the text before a video, ``template`` what follows it."""
        inner = self.model.model
        prompt = PromptConfig(tuple(self.tokenizer.encode(prefix, add_special_tokens=False)), template, self._end_ids())
        decoder = TransformersDecoder(inner.language_model, self.model.lm_head, rope)
        spec = self._describe(name, vision, compression)
        scorer = AttentionScorer(self.hints.scorer_heads)
        return OnePassModel(spec, decoder, vision, compression, prompt, self.tokenizer, scorer)

    def _end_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ids: int | Sequence[int] | None = self.model.generation_config.eos_token_id
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return frozenset([ids] if isinstance(ids, int) else ids or ())

    def _describe(self, name: str, vision: VisionTower, compression: OnePassConfig) -> ModelSpec:
        text, generation = self.model.config.get_text_config(), self.model.generation_config
        heads, chunk = text.num_attention_heads, self.hints.frames_per_chunk
        return ModelSpec(
            name=name,
            num_layers=text.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocab_size=text.vocab_size,
            tokens_per_frame=vision.num_tokens(chunk, *_TYPICAL_PIXELS) // chunk,
            frames_per_chunk=chunk,
            low_ratio=compression.low_ratio,
            high_ratio=compression.high_ratio,
            max_positions=text.max_position_embeddings,
            max_duration_s=None,
            fps=1.0,
            default_reload=3,
            temperature=(generation.temperature or 0.0) if generation.do_sample else 0.0,
        )
