"""Video-XL's vision tower: CLIP ViT, two-layer projector, 2x2 average pooling behind it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from server.models.device import kept
from server.models.slices import Slices, through, whole
from server.video.frames import Frames

CLIP_L_14_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""Kept in code, because a checkpoint's ``mm_vision_tower`` may be a private path."""
_RESIZING_THREADS = 2


class ClipEncoder(nn.Module):
    """Frames -> visual tokens in the language model's space; 144 a frame for CLIP ViT-L/14-336.

    The feature is the hidden state of ``select_layer`` without CLS, never through ``post_layernorm``. Pooling comes
    AFTER the projector, row-major, and frames follow each other without separators.
    """

    def __init__(self, hidden_size: int, config: dict[str, Any]) -> None:
        """``config`` is the checkpoint's ``config.json``; ``hidden_size`` the language model's."""
        super().__init__()
        vision = CLIPVisionConfig(**config.get("vision_config", CLIP_L_14_336))
        model = CLIPVisionModel(vision)
        # transformers moved the tower from `.vision_model` into the class itself during 5.x.
        self.tower = getattr(model, "vision_model", model)
        self.tower.post_layernorm = nn.Identity()
        # A buffer that no checkpoint needs to hold: made here for good, also where all else is on the meta device.
        positions = torch.arange(self.tower.embeddings.num_positions, device="cpu")[None]
        self.tower.embeddings.register_buffer("position_ids", positions, persistent=False)
        self.projector = nn.Sequential(
            nn.Linear(vision.hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.grid: int = vision.image_size // vision.patch_size
        self.stride = int(config.get("mm_spatial_pool_stride", 2))
        self.select_layer = int(config.get("mm_vision_select_layer", -2))
        self.image_size: int = vision.image_size

    def extra_repr(self) -> str:
        """What the features depend on besides the weights."""
        vision = self.tower.config
        sizes = {name: getattr(vision, name) for name in CLIP_L_14_336}
        return f"select_layer={self.select_layer}, stride={self.stride}, {sizes}"

    @property
    def tokens_per_frame(self) -> int:
        return (self.grid // self.stride) ** 2

    def preprocess(self, frames: Frames) -> Tensor:
        """uint8 [T, H, W, 3] -> uint8 [T, 3, size, size]: bicubic to the shortest edge, centre crop."""
        _, height, width, _ = frames.pixels.shape
        side, short = self.image_size, min(height, width)
        columns, rows = int(side * width / short), int(side * height / short)
        top, left = (rows - side) // 2, (columns - side) // 2
        return _resize(frames, (columns, rows))[:, :, top : top + side, left : left + side].contiguous()

    def forward(self, pixels: Tensor, times_s: NDArray[np.float64]) -> Tensor:
        """[T, 3, size, size], uint8 or normalized by :func:`normalize` -> [T * tokens_per_frame, hidden]; Video-XL
        does not embed time."""
        return whole(self.see(pixels, times_s))

    def see(self, pixels: Tensor, times_s: NDArray[np.float64]) -> Slices[Tensor]:
        """The same in slices."""
        weight = self.projector[0].weight
        assert isinstance(weight, Tensor)
        pixels = pixels.to(weight.device)
        pixels = (normalize(pixels) if pixels.dtype == torch.uint8 else pixels).to(weight.dtype)
        seen = yield from through(lambda: self.tower(pixels, output_hidden_states=True), self.tower.encoder.layers)
        states = seen.hidden_states
        x = self.projector(states[self.select_layer][:, 1:])
        x = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return torch.flatten(functional.avg_pool2d(x, self.stride).flatten(2).transpose(1, 2), 0, 1)


def _resize(frames: Frames, size: tuple[int, int]) -> Tensor:
    """uint8 [T, H, W, 3] -> uint8 [T, 3, h, w], to a width and height, with PIL's bicubic filter, as CLIPImageProcessor
    does it."""

    def resized(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))

    # PIL lets go of the interpreter for most of the time; more threads would be in the way of the one that answers.
    with ThreadPoolExecutor(_RESIZING_THREADS) as threads:
        return torch.from_numpy(np.stack(list(threads.map(resized, frames.pixels)))).permute(0, 3, 1, 2).contiguous()


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [T, 3, h, w] -> float32, by CLIP's mean and deviation, rounded where CLIPImageProcessor rounds."""
    mean, std = (kept(tuple(each), pixels.device)[:, None, None] for each in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((pixels.double() * (1 / 255)).float() - mean) / std
