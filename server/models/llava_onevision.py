"""LLaVA-OneVision (arXiv 2408.03326): a fixed number of visual tokens a frame, one behind the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from server.models import chatml
from server.models.one_pass import Layout, OnePassConfig, OnePassModel, VisualTokens
from server.models.patches import read_preprocessing, resize
from server.models.transformers_decoder import read_rope
from server.models.transformers_folder import TransformersFolder
from server.video.frames import Frames

_PREFIX = "<|im_start|>user "
_TEMPLATE = chatml.template("\n", break_after_role=" ", break_after_turn="")


@dataclass(frozen=True, slots=True)
class OneVisionSettings:
    """Frames are resized to ``size`` pixels square; ``side`` squared visual tokens are left of one."""

    size: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class OneVisionTower(nn.Module):
    """transformers' own tower, projector and pooling. A learned token stands at the end of a video."""

    def __init__(self, inner: Any, settings: OneVisionSettings) -> None:
        super().__init__()
        self.tower = inner.vision_tower
        self.projector = inner.multi_modal_projector
        self.newline = inner.image_newline
        self.settings = settings
        self._see = inner.get_video_features

    def preprocess(self, frames: Frames) -> Tensor:
        """See :meth:`VisionTower.preprocess`: uint8, stretched to a square with PIL's bicubic filter."""
        return resize(frames, (self.settings.size, self.settings.size))

    def num_tokens(self, num_frames: int, width: int, height: int) -> int:
        """See :meth:`VisionTower.num_tokens`."""
        return num_frames * self.settings.side**2

    def num_positions(self, num_frames: int, width: int, height: int, fps: float) -> None:
        """See :meth:`VisionTower.num_positions`: contiguous."""

    def forward(self, pixels: Tensor, times_s: NDArray[np.float64]) -> VisualTokens:
        """See :meth:`VisionTower.__call__`."""
        side, settings = self.settings.side, self.settings
        mean, std = (torch.tensor(each, device=pixels.device)[:, None, None] for each in (settings.mean, settings.std))
        normal = ((pixels.float() / 255 - mean) / std).to(self.newline.dtype)
        features = self._see(normal[None]).pooler_output[0, :-1]  # the newline has its own place
        return VisualTokens(features, side, side, np.stack([times_s, times_s], axis=1))

    def lay_out(self, tokens: VisualTokens, start: int, next_position: int, *, last: bool) -> Layout:
        """See :meth:`VisionTower.lay_out`."""
        if not last:
            return Layout()
        is_visual = torch.ones(len(tokens.features) + 1, dtype=torch.bool, device=tokens.features.device)
        is_visual[-1] = False
        return Layout(is_visual=is_visual, others=self.newline[None])


def load(
    folder: Path, name: str, *, device: torch.device, dtype: torch.dtype, compression: OnePassConfig
) -> OnePassModel:
    """The model in ``folder``, in transformers' layout. Raises CheckpointError."""
    content = TransformersFolder.load(folder, device, dtype)
    config = content.model.config
    size = config.vision_config.image_size
    side = -(-(size // config.vision_config.patch_size) // 2)
    found = read_preprocessing(folder)
    mean, std = (tuple(found.get(f"image_{kind}") or (0.5, 0.5, 0.5)) for kind in ("mean", "std"))
    tower = OneVisionTower(content.model.model, OneVisionSettings(size, side, mean, std))
    rope = read_rope(config.get_text_config())
    return content.assemble(name, tower, rope, compression, prefix=_PREFIX, template=_TEMPLATE)
