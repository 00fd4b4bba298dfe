"""How sure a share is."""

from __future__ import annotations

import math
from typing import Any

_Z = 1.959963984540054  # 95 %


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of the share ``right / asked`` (Wilson 1927); (0, 1) where nothing was asked."""
    if asked == 0:
        return 0.0, 1.0
    share, square = right / asked, _Z * _Z / asked
    centre = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / asked + square / (4 * asked)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def share(right: int, asked: int) -> dict[str, Any]:
    """A share with its 95 % interval, as results hold it; ``share`` is None where nothing was asked."""
    low, high = wilson(right, asked)
    value = round(right / asked, 4) if asked else None
    return {"right": right, "asked": asked, "share": value, "low": round(low, 4), "high": round(high, 4)}
