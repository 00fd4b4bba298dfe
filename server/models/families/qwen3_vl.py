"""Qwen3-VL (arXiv 2511.21631): every pair of frames behind its time as text, and deep features for the first layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from server.models import chatml
from server.models.families.decoder import read_rope
from server.models.families.folder import TransformersFolder
from server.models.families.hints import PatchHints
from server.models.families.one_pass import Layout, OnePassConfig, OnePassModel, VisualTokens
from server.models.families.patches import FRAME_TOKENS, Grid, Patches, PatchTower, Words

HINTS = PatchHints

_PREFIX = "<|im_start|>user\n"
_TEMPLATE = chatml.template()


@dataclass(frozen=True, slots=True)
class Qwen3Settings:
    """The text around every pair of frames."""

    patches: Patches
    before: str = "<{:.1f} seconds><|vision_start|>"
    after: str = "<|vision_end|>"


class Qwen3Tower(PatchTower):
    """Two frames at a time, the text around them, and the places of all that."""

    def __init__(self, visual: Any, settings: Qwen3Settings, image_patches: Patches, words: Words) -> None:
        super().__init__(visual, settings.patches, image_patches, words)
        self._settings = settings

    @property
    def settings(self) -> Qwen3Settings:
        return self._settings

    def num_positions(self, num_frames: int, width: int, height: int, fps: float) -> int:
        """See :meth:`VisionTower.num_positions`; every time is counted as long as the last."""
        text = self.settings.before.format(num_frames / fps) + self.settings.after
        num_steps = -(-num_frames // self.patches.temporal_patch_size)
        return num_steps * (len(self.words.ids(text)) + max(self.patches.size(width, height)))

    def lay_out(self, tokens: VisualTokens, start: int, next_position: int, *, last: bool) -> Layout:
        """See :meth:`VisionTower.lay_out`: a frame begins where the text before it ends, in time as well."""
        settings, frame = self.settings, Grid.of(tokens, torch.zeros(1).long())
        steps = ((settings.before.format(time_s), frame, settings.after) for time_s in tokens.times_s.mean(1))
        return self.compose([part for step in steps for part in step], next_position)


def load(
    folder: Path,
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    compression: OnePassConfig,
    hints: PatchHints,
    frame_tokens: tuple[int, int] = FRAME_TOKENS,
) -> OnePassModel:
    """The model in ``folder``, in transformers' layout. Raises CheckpointError."""
    content = TransformersFolder.load(folder, device, dtype, hints)
    inner, config = content.model.model, content.model.config
    mean, std = tuple(IMAGENET_STANDARD_MEAN), tuple(IMAGENET_STANDARD_STD)
    patches = Patches.read(folder, config.vision_config, mean, std, frame_tokens, hints.frame_size)
    words = Words(content.tokenizer, inner.language_model.embed_tokens)
    tower = Qwen3Tower(inner.visual, Qwen3Settings(patches), patches.for_images(folder), words)
    rope = read_rope(config.get_text_config(), (24, 20, 20), "interleaved")
    return content.assemble(name, tower, rope, compression, prefix=_PREFIX, template=_TEMPLATE)
