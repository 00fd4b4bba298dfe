"""How sure a share is."""

from __future__ import annotations

import math

_Z = 1.959963984540054  # 95 %


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of the share ``right / asked`` (Wilson 1927); (0, 1) where nothing was asked."""
    if asked == 0:
        return 0.0, 1.0
    share, square = right / asked, _Z * _Z / asked
    centre = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / asked + square / (4 * asked)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)
