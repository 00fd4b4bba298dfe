"""Rotary position embedding (rotate-half), applied to cached keys when a mixed cache is assembled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotates the first ``rotary_dim`` of ``head_dim`` channels by position (RoFormer, arXiv 2104.09864).

    The cos and sin tables are computed in float32 and rounded to the rotated tensor's dtype, as Qwen2 does.

    With ``sections`` a position has several axes (time, row, column) and every channel belongs to one of them:
    ``sectioned`` gives each axis a run of so many channels (Qwen2-VL, arXiv 2409.12191), ``interleaved`` takes turns
    until the axes behind the first have their number (Qwen3-VL).
    """

    rotary_dim: int
    theta: float
    sections: tuple[int, ...] = ()
    layout: Literal["sectioned", "interleaved"] = "sectioned"

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``positions`` [tokens], or [axes, ..., tokens] with sections -> cos and sin, each
        [..., tokens, rotary_dim // 2]. A text token stands at the same position on every axis: [tokens] will do."""
        steps = torch.arange(0, self.rotary_dim, 2, device=positions.device, dtype=torch.float32)
        by_channel = positions.float()[..., None]
        if self.sections and positions.ndim > 1:
            by_channel = positions.float()[_axis_of_channel(self, positions.device)].movedim(0, -1)
        # Written as in transformers: theta ** -x differs in the last bit, which counts at positions in the thousands.
        angles = by_channel * (1.0 / self.theta ** (steps / self.rotary_dim))
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` [..., tokens, head_dim] with tables from :meth:`tables` -> the same shape."""
        half = self.rotary_dim // 2
        a, b, rest = x[..., :half], x[..., half : self.rotary_dim], x[..., self.rotary_dim :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


@lru_cache
def _axis_of_channel(rope: Rope, device: torch.device) -> Tensor:
    """int64 [rotary_dim // 2]; kept, because a GPU is waited for whenever a list is brought to it."""
    axes = range(len(rope.sections))
    if rope.layout == "sectioned":
        order = [axis for axis in axes for _ in range(rope.sections[axis])]
    else:
        count = len(rope.sections)
        order = [0] * (rope.rotary_dim // 2)
        for axis in axes[1:]:
            for channel in range(axis, count * rope.sections[axis], count):
                order[channel] = axis
    return torch.tensor(order, device=device)
