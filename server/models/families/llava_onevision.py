"""LLaVA-OneVision (arXiv 2408.03326): a fixed number of visual tokens a frame, one behind the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension

from server.models import chatml
from server.models.device import kept
from server.models.families.decoder import read_rope
from server.models.families.folder import TransformersFolder
from server.models.families.hints import Hints
from server.models.families.one_pass import Layout, OnePassConfig, OnePassModel, VisualTokens
from server.models.families.patches import resize
from server.models.families.preprocessing import read_preprocessing
from server.models.slices import Slices, through
from server.video.frames import Frames

HINTS = Hints

_PREFIX = "<|im_start|>user "
_TEMPLATE = chatml.template("\n", behind_role=" \n", behind_turn="")
_LARGEST_SQUARE = 4096
"""Pixels; a sliver that is longer is made smaller before its square takes gigabytes."""


@dataclass(frozen=True, slots=True)
class OneVisionSettings:
    """Frames are resized to ``size`` pixels square; ``side`` squared visual tokens are left of one."""

    size: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Tiles:
    """An image, seen whole and then in parts: uint8 [1 + parts, 3, size, size]; without any, seen as one of several.

    ``height`` and ``width`` are those that it had.
    """

    pixels: Tensor
    height: int
    width: int


class OneVisionTower(nn.Module):
    """transformers' own tower, projector and pooling. A learned token stands at the end of a video, and of every row of
    an image."""

    def __init__(self, inner: Any, settings: OneVisionSettings) -> None:
        super().__init__()
        self.tower = inner.vision_tower
        self.projector = inner.multi_modal_projector
        self.newline = inner.image_newline
        self.settings = settings
        self._see = inner.get_video_features
        self._see_image = inner.get_image_features
        self._pack = inner.pack_image_features
        self._resolutions: list[list[int]] = inner.config.image_grid_pinpoints
        self._aspect_ratio: str = inner.config.vision_aspect_ratio

    def preprocess(self, frames: Frames) -> Tensor:
        """See :meth:`VisionTower.preprocess`: uint8, stretched to a square with a bicubic filter."""
        return resize(frames, (self.settings.size, self.settings.size))

    def num_tokens(self, num_frames: int, width: int, height: int) -> int:
        """See :meth:`VisionTower.num_tokens`."""
        return num_frames * self.settings.side**2

    def num_positions(self, num_frames: int, width: int, height: int, fps: float) -> None:
        """See :meth:`VisionTower.num_positions`: contiguous."""

    def see(self, pixels: Tensor, times_s: NDArray[np.float64]) -> Slices[VisualTokens]:
        """See :meth:`VisionTower.see`."""
        side, normal = self.settings.side, self._normal(pixels)[None]
        tower: Any = getattr(self.tower, "vision_model", self.tower)
        seen = yield from through(lambda: self._see(normal), tower.encoder.layers)
        features = seen.pooler_output[0, :-1]  # the newline has its own place
        return VisualTokens(features, side, side, np.stack([times_s, times_s], axis=1))

    def lay_out(self, tokens: VisualTokens, start: int, next_position: int, *, last: bool) -> Layout:
        """See :meth:`VisionTower.lay_out`."""
        if not last:
            return Layout()
        is_visual = torch.ones(len(tokens.features) + 1, dtype=torch.bool)
        is_visual[-1] = False
        return Layout(is_visual=is_visual, others=self.newline[None])

    def preprocess_image(self, frame: Frames, *, alone: bool) -> Tiles:
        """See :meth:`VisionTower.preprocess_image`: a single one at the resolution that suits it best."""
        size = self.settings.size
        _, height, width, _ = frame.pixels.shape
        if not alone:
            return Tiles(resize(_square(frame, self.settings.mean), (size, size)), height, width)
        best = select_best_resolution((height, width), self._resolutions)
        inner_height, inner_width = get_patch_output_size(frame.pixels[0], best, ChannelDimension.LAST)
        top, left = (best[0] - inner_height) // 2, (best[1] - inner_width) // 2
        canvas = torch.zeros(3, *best, dtype=torch.uint8)
        canvas[:, top : top + inner_height, left : left + inner_width] = resize(frame, (inner_width, inner_height))[0]
        parts = canvas.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size)
        return Tiles(torch.cat([resize(frame, (size, size)), parts]), height, width)

    def num_image_tokens(self, image: Tiles) -> int:
        """See :meth:`VisionTower.num_image_tokens`."""
        config = self.tower.config
        nothing = torch.empty(len(image.pixels), (config.image_size // config.patch_size) ** 2, 1, device="meta")
        size = [image.height, image.width]
        packed, _ = self._pack([nothing], [size], image_newline=nothing[0, 0], vision_aspect_ratio=self._aspect_ratio)
        return len(packed[0])

    def see_image(self, image: Tiles) -> VisualTokens:
        """See :meth:`VisionTower.see_image`."""
        seen = self._see_image(
            self._normal(image.pixels.to(self.newline.device))[None],
            image_sizes=torch.tensor([[image.height, image.width]]),
            batch_num_images=torch.tensor([1 if len(image.pixels) > 1 else 2]),
        )
        features = seen.pooler_output[0]
        return VisualTokens(features, 1, len(features), np.zeros((1, 2)))

    def lay_out_image(self, tokens: VisualTokens, next_position: int) -> Layout:
        """See :meth:`VisionTower.lay_out_image`: contiguous."""
        return Layout()

    def _normal(self, pixels: Tensor) -> Tensor:
        settings = self.settings
        mean, std = (kept(each, pixels.device)[:, None, None] for each in (settings.mean, settings.std))
        return ((pixels.float() / 255 - mean) / std).to(self.newline.dtype)


def _square(frame: Frames, mean: tuple[float, ...]) -> Frames:
    """A frame in the middle of a square of the mean colour."""
    _, height, width, _ = frame.pixels.shape
    longest = max(height, width)
    if longest > _LARGEST_SQUARE:
        scale = _LARGEST_SQUARE / longest
        smaller = resize(frame, (max(1, round(width * scale)), max(1, round(height * scale))))
        return _square(Frames(smaller.permute(0, 2, 3, 1).numpy(), frame.times_s), mean)
    top, left = (longest - height) // 2, (longest - width) // 2
    square = np.empty((1, longest, longest, 3), np.uint8)
    square[:] = [int(part * 255) for part in mean]
    square[:, top : top + height, left : left + width] = frame.pixels
    return Frames(square, frame.times_s)


def load(
    folder: Path,
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    compression: OnePassConfig,
    hints: Hints,
) -> OnePassModel:
    """The model in ``folder``, in transformers' layout. Raises CheckpointError."""
    content = TransformersFolder.load(folder, device, dtype, hints)
    config = content.model.config
    size = config.vision_config.image_size
    side = -(-(size // config.vision_config.patch_size) // 2)
    found = read_preprocessing(folder)
    mean, std = (tuple(found.get(f"image_{kind}") or (0.5, 0.5, 0.5)) for kind in ("mean", "std"))
    tower = OneVisionTower(content.model.model, OneVisionSettings(size, side, mean, std))
    rope = read_rope(config.get_text_config())
    return content.assemble(name, tower, rope, compression, prefix=_PREFIX, template=_TEMPLATE)
