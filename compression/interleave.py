"""Where visual summary tokens (VSTs) stand among visual tokens (Video-XL, arXiv 2409.14485; Video-X2L, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def interleave(num_visual: int, ratio: int, carry: int, *, close: bool = False) -> tuple[Tensor, int]:
    """Inserts one VST after every ``ratio``-th visual token, counting on from ``carry`` uncounted tokens before.

    With ``close`` the window ends with a VST, so that none of its tokens is lost; the new carry is then 0.

    Returns a bool mask over the window (True where a VST stands), ``[num_visual + num_vst]``, and the new carry. A
    carry at or past a new, smaller ratio puts a VST behind the next visual token and starts the count again.
    """
    first = max(ratio - carry, 1)
    after = torch.arange(min(first, num_visual + 1), num_visual + 1, ratio)
    is_vst = torch.zeros(num_visual + len(after), dtype=torch.bool)
    is_vst[after + torch.arange(len(after))] = True
    left = num_visual - int(after[-1]) if len(after) else carry + num_visual
    if close and left:
        return torch.nn.functional.pad(is_vst, (0, 1), value=True), 0
    return is_vst, left


def count_vsts(num_visual: int, ratio: int, carry: int, *, close: bool = False) -> tuple[int, int]:
    """How many VSTs :func:`interleave` puts into a window, and the new carry."""
    first = max(ratio - carry, 1)
    count = 0 if first > num_visual else 1 + (num_visual - first) // ratio
    left = num_visual - first - (count - 1) * ratio if count else carry + num_visual
    return (count + 1, 0) if close and left else (count, left)
