"""Rotary position embedding (rotate-half), applied to cached keys when a mixed cache is assembled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotates the first ``rotary_dim`` of ``head_dim`` channels by position (RoFormer, arXiv 2104.09864).

    The cos and sin tables are computed in float32 and rounded to the rotated tensor's dtype, as Qwen2 does.
    """

    rotary_dim: int
    theta: float

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``positions`` [tokens] -> cos and sin, each [tokens, rotary_dim // 2]."""
        steps = torch.arange(0, self.rotary_dim, 2, device=positions.device, dtype=torch.float32)
        angles = positions.float()[:, None] * self.theta ** (-steps / self.rotary_dim)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` [..., tokens, head_dim] with tables from :meth:`tables` -> the same shape."""
        half = self.rotary_dim // 2
        a, b, rest = x[..., :half], x[..., half : self.rotary_dim], x[..., self.rotary_dim :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
