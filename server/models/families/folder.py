"""Models in local folders, in the layout that transformers saves and loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, PreTrainedTokenizerFast
from transformers.utils import is_accelerate_available, logging

from compression.rope import Rope
from compression.score import AttentionScorer
from server.models.base import TYPICAL_PIXELS, ModelSpec
from server.models.families.decoder import TransformersDecoder
from server.models.families.hints import Hints
from server.models.families.one_pass import OnePassConfig, OnePassModel, VisionTower
from server.models.families.preprocessing import read_fps
from server.models.lm.decoder_model import PromptConfig
from server.models.tensors import CheckpointError, TensorFolder, Uninitialised, first_line, refuse_misfits
from server.models.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class TransformersFolder:
    """What a folder holds: a generating model of transformers' own class, ready to run, and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    hints: Hints
    fps: float

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype, hints: Hints) -> Self:
        """Reads no code from the folder, nor anything from elsewhere.

        Raises CheckpointError for hints that do not fit and files that are damaged or do not fit together; it names
        the tensors that are missing, left over or of another shape. No weights were read by then.
        """
        with _silence(), _one_line(folder):
            fps = read_fps(folder)
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            hints.check(config)
            tokenizer = load_tokenizer(folder)
            options = {"config": config, "dtype": dtype, "attn_implementation": "sdpa"}
            kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
            # First a model whose every tensor is one number, shown in all places of its shape: that takes no memory,
            # and transformers itself says under which of its many names it finds what.
            outline = TensorFolder(folder).outline()
            numbers = {name: torch.zeros((), dtype=dtype).expand(like.shape) for name, like in outline.items()}
            with Uninitialised():
                _fitting(kind, None, state_dict=numbers, **options)
            # Tensor by tensor to the device, where accelerate is installed; else by way of the host's memory.
            straight = device.type != "cpu" and is_accelerate_available()
            model = _fitting(kind, folder, device_map=device if straight else None, **options)
            return cls(model.to(device).eval().requires_grad_(False), tokenizer, hints, fps)

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
            tokens_per_frame=vision.num_tokens(chunk, *TYPICAL_PIXELS) // chunk,
            frames_per_chunk=chunk,
            low_ratio=compression.low_ratio,
            high_ratio=compression.high_ratio,
            max_positions=text.max_position_embeddings,
            max_duration_s=None,
            fps=self.fps,
            default_reload=3,
            temperature=(generation.temperature or 0.0) if generation.do_sample else 0.0,
        )


def _fitting(kind: Any, source: Path | None, **options: Any) -> Any:
    """What ``kind.from_pretrained`` makes. Raises CheckpointError where tensors do not fit."""
    model, info = kind.from_pretrained(
        source, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    refuse_misfits(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Whatever a folder's files make transformers raise becomes a CheckpointError."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):  # the latter are not the folder's fault
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """transformers draws no bars and reports no tensors: they are checked, and named, here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
