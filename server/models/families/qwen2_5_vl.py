"""Qwen2.5-VL (arXiv 2502.13923): time, row and column of every visual token in its position."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from server.models import chatml
from server.models.families.decoder import read_rope
from server.models.families.folder import TransformersFolder
from server.models.families.hints import PatchHints
from server.models.families.one_pass import Layout, OnePassConfig, OnePassModel, VisualTokens
from server.models.families.patches import AFTER, BEFORE, FRAME_TOKENS, Grid, Patches, PatchTower, Words

_PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_TEMPLATE = chatml.template()


class Qwen25Hints(PatchHints):
    """``text_behind``: see :class:`Qwen25Settings`."""

    text_behind: Literal["video", "frame"] = "video"


HINTS = Qwen25Hints


@dataclass(frozen=True, slots=True)
class Qwen25Settings:
    """``tokens_per_second`` is how many positions a second takes.

    ``text_behind`` tells where text goes on: behind the whole ``video`` (its largest position + 1), as the model was
    trained and published; or behind one ``frame``, where transformers 5 has it, amid the positions of a video that is
    longer than a frame is high and wide.
    """

    patches: Patches
    tokens_per_second: float
    text_behind: Literal["video", "frame"]


class Qwen25Tower(PatchTower):
    """Two frames at a time, and the places of what it sees."""

    def __init__(self, visual: Any, settings: Qwen25Settings, image_patches: Patches, words: Words) -> None:
        super().__init__(visual, settings.patches, image_patches, words)
        self._settings = settings

    @property
    def settings(self) -> Qwen25Settings:
        return self._settings

    def num_positions(self, num_frames: int, width: int, height: int, fps: float) -> int:
        """See :meth:`VisionTower.num_positions`."""
        depth = self.patches.temporal_patch_size
        last_s = (num_frames - 1) // depth * depth / fps
        size = max(*self.patches.size(width, height), int(last_s * self.settings.tokens_per_second + 1e-4) + 1)
        return size + len(self.words.ids(BEFORE + AFTER))

    def lay_out(self, tokens: VisualTokens, start: int, next_position: int, *, last: bool) -> Layout:
        """See :meth:`VisionTower.lay_out`."""
        settings = self.settings
        # The model's own rule multiplies the index of a step by a step's length; a hair keeps whole numbers whole.
        steps = torch.from_numpy(np.floor(tokens.times_s[:, 0] * settings.tokens_per_second + 1e-4)).long()
        grid = Grid.of(tokens, steps)
        if settings.text_behind == "video":
            grid = replace(grid, size=max(grid.size, int(steps[-1]) + 1))
        first = next_position == start
        begin = start if first else start + len(self.words.ids(BEFORE))  # all chunks count from there
        return self.compose([BEFORE] * first + [grid] + [AFTER] * last, begin)


def load(
    folder: Path,
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    compression: OnePassConfig,
    hints: Qwen25Hints,
    frame_tokens: tuple[int, int] = FRAME_TOKENS,
) -> OnePassModel:
    """The model in ``folder``, in transformers' layout. Raises CheckpointError."""
    content = TransformersFolder.load(folder, device, dtype, hints)
    vision = content.model.config.vision_config
    mean, std = tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)
    patches = Patches.read(folder, vision, mean, std, frame_tokens, hints.frame_size)
    settings, inner = Qwen25Settings(patches, vision.tokens_per_second, hints.text_behind), content.model.model
    words = Words(content.tokenizer, inner.language_model.embed_tokens)
    tower = Qwen25Tower(inner.visual, settings, patches.for_images(folder), words)
    rope = read_rope(content.model.config.get_text_config(), (16, 24, 24), "sectioned")
    return content.assemble(name, tower, rope, compression, prefix=_PREFIX, template=_TEMPLATE)
