"""Qwen2.5-VL (arXiv 2502.13923): time, row and column of every visual token in its position."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from compression.score import AttentionScorer
from server.models.decoder_model import PromptConfig
from server.models.one_pass import Layout, OnePassConfig, OnePassModel, VisualTokens
from server.models.patches import Patches
from server.models.transformers_decoder import TransformersDecoder, read_rope
from server.models.transformers_folder import describe, end_ids, load_pretrained, load_tokenizer
from server.video.frames import Frames

_PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_TEMPLATE = (
    "{{- '<|vision_end|>' -}}"
    "{%- for message in messages -%}"
    "{%- if loop.first and message['role'] != 'user' -%}{{- '<|im_end|>\n' -}}{%- endif -%}"
    "{%- if not loop.first or message['role'] != 'user' -%}{{- '<|im_start|>' + message['role'] + '\n' -}}{%- endif -%}"
    "{{- message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
_FRAMES_PER_CHUNK = 16


@dataclass(frozen=True, slots=True)
class Qwen25Vision:
    """What changes a visual token or its place, besides the weights.

    ``text_behind`` tells where text goes on: behind the whole ``video`` (its largest position + 1), as the model was
    trained and published; or behind one ``frame``, where transformers 5 has it, amid the positions of a video that is
    longer than a frame is high and wide.
    """

    patches: Patches
    tokens_per_second: float
    text_behind: Literal["video", "frame"] = "video"


class Qwen25VisionTower(nn.Module):
    """transformers' own vision tower, which sees two frames at a time, and the places of what it sees."""

    def __init__(self, visual: Any, settings: Qwen25Vision) -> None:
        super().__init__()
        self.visual = visual
        self.settings = settings

    def preprocess(self, frames: Frames) -> Tensor:
        """See :meth:`VisionTower.preprocess`: uint8."""
        return self.settings.patches.resize(frames)

    def num_tokens(self, num_frames: int, width: int, height: int) -> int:
        """See :meth:`VisionTower.num_tokens`."""
        return self.settings.patches.num_tokens(num_frames, width, height)

    def forward(self, pixels: Tensor, times_s: NDArray[np.float64]) -> VisualTokens:
        patches, grid = self.settings.patches.flatten(pixels)
        output = self.visual(patches.to(self.visual.dtype), grid_thw=torch.tensor([grid], device=pixels.device))
        merge, depth = self.settings.patches.merge_size, self.settings.patches.temporal_patch_size
        return VisualTokens(output.pooler_output, grid[1] // merge, grid[2] // merge, times_s[::depth])

    def lay_out(self, tokens: VisualTokens, start: int) -> Layout:
        """See :meth:`VisionTower.lay_out`."""
        settings, device = self.settings, tokens.features.device
        # The model's own rule multiplies the index of a step by a step's length; a hair keeps whole numbers whole.
        steps = torch.from_numpy(np.floor(tokens.times_s * settings.tokens_per_second + 1e-4)).long()
        rows, columns = torch.arange(tokens.rows), torch.arange(tokens.columns)
        positions = torch.stack(torch.meshgrid(steps, rows, columns, indexing="ij")).flatten(1)
        size = max(tokens.rows, tokens.columns)
        if settings.text_behind == "video":
            size = max(size, int(steps[-1]) + 1)
        return Layout((positions + start).to(device), start + size)


def load(
    folder: Path,
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    compression: OnePassConfig,
    text_behind: Literal["video", "frame"] = "video",
) -> OnePassModel:
    """The model in ``folder``, in transformers' layout. Raises CheckpointError."""
    model, tokenizer = load_pretrained(folder, device, dtype), load_tokenizer(folder)
    config = model.config
    patches = Patches.read(folder, config.vision_config, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))
    seconds = config.vision_config.tokens_per_second
    tower = Qwen25VisionTower(model.model.visual, Qwen25Vision(patches, seconds, text_behind))
    rope = read_rope(config.get_text_config(), (16, 24, 24), "sectioned")
    decoder = TransformersDecoder(model.model.language_model, model.lm_head, rope)
    spec = describe(
        name,
        model,
        tokens_per_frame=tower.num_tokens(patches.temporal_patch_size, 1280, 720) // patches.temporal_patch_size,
        frames_per_chunk=_FRAMES_PER_CHUNK,
        low_ratio=compression.low_ratio,
        high_ratio=compression.high_ratio,
    )
    prefix_ids = tuple(tokenizer.encode(_PREFIX, add_special_tokens=False))
    prompt = PromptConfig(prefix_ids, _TEMPLATE, end_ids(model, tokenizer))
    return OnePassModel(spec, decoder, tower, compression, prompt, tokenizer, AttentionScorer())
