"""The unit of compression and re-load: a run of frames."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of consecutive sampled frames of one video.

    ``start_s`` and ``end_s`` are seconds from the first presented frame; the span is half open.
    """

    index: int
    start_s: float
    end_s: float
    num_frames: int

    def overlaps(self, start_s: float, end_s: float) -> bool:
        """Whether the chunk shares a moment with ``[start_s, end_s)``."""
        return self.start_s < end_s and start_s < self.end_s
