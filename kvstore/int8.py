"""Eight bits a number: one scale for each layer, head and channel, over a chunk's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX = 127
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
RELATIVE_ERROR = 0.501
"""No number changes by more than this times its channel's scale, before it is rounded to the dtype it had. Half a scale
is from rounding to an integer, the rest from float32 arithmetic."""


def quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """``tensor`` [layers, heads, tokens, head_dim] as int8 of that shape, and its scales.

    Scales are float32 [layers, heads, head_dim], each its channel's largest magnitude / 127. Raises ValueError for
    numbers that are not finite.
    """
    numbers = tensor.detach().to("cpu", torch.float32)
    if not numbers.numel():
        return numbers.to(torch.int8), numbers.new_zeros(numbers.shape[0], numbers.shape[1], numbers.shape[3])
    largest = numbers.abs().amax(dim=2)
    if not largest.isfinite().all():
        raise ValueError("int8 cannot hold what is not finite")
    scales = (largest / _MAX).clamp(min=_SMALLEST_SCALE)
    return (numbers / scales.unsqueeze(2)).round_().clamp_(-_MAX, _MAX).to(torch.int8), scales


def dequantize(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers again, within RELATIVE_ERROR, in ``dtype``."""
    return (integers * scales.unsqueeze(2)).to(dtype)
