"""Frames of any size to the bundled model's input."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

WIDTH, HEIGHT = 96, 64
_LARGE_WIDTH, _LARGE_HEIGHT = 640, 360


def resize(frames: NDArray[np.uint8]) -> Tensor:
    """Squash frames to 96 x 64 by averaging areas: uint8 [T, H, W, 3] -> uint8 [T, 3, 64, 96].

    The aspect ratio is not kept and nothing is cropped. Large frames are first reduced by a whole factor. Raises
    ValueError for another shape or dtype.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or 0 in frames.shape[1:3]:
        raise ValueError(f"expected uint8 frames [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    out = torch.empty((len(frames), 3, HEIGHT, WIDTH), dtype=torch.uint8)
    factor = min(frames.shape[2] // _LARGE_WIDTH, frames.shape[1] // _LARGE_HEIGHT)
    for index, frame in enumerate(frames):
        if factor > 1:
            frame = np.asarray(Image.fromarray(frame).reduce(factor))
        rows, columns = _area_weights(frame.shape[0], HEIGHT), _area_weights(frame.shape[1], WIDTH)
        pixels = torch.from_numpy(frame.astype(np.float32))
        narrow = (rows @ pixels.flatten(1)).view(HEIGHT, -1, 3)
        out[index] = (narrow.permute(2, 0, 1) @ columns.T).round_().clamp_(0, 255).to(torch.uint8)
    return out


@lru_cache(maxsize=32)
def _area_weights(source: int, target: int) -> Tensor:
    """[target, source] float32: the share of every source pixel in a target pixel; rows sum to 1."""
    edges = torch.arange(target + 1, dtype=torch.float64) * source / target
    low, high = edges[:-1, None], edges[1:, None]
    pixel = torch.arange(source, dtype=torch.float64)
    overlap = (torch.minimum(high, pixel + 1) - torch.maximum(low, pixel)).clamp(min=0)
    return (overlap / overlap.sum(1, keepdim=True)).float()
