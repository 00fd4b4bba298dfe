"""Sampled frames of a video."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Frames:
    """Consecutive sampled frames.

    ``pixels`` is uint8 RGB ``[T, H, W, 3]``, upright (rotation applied). ``times_s`` [T] float64 are the instants at
    which each frame was on screen (the sampling grid), in seconds from the first presented frame.
    """

    pixels: NDArray[np.uint8]
    times_s: NDArray[np.float64]

    def __len__(self) -> int:
        return int(self.pixels.shape[0])
