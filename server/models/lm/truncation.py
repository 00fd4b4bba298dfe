"""Which tokens may be drawn at all: top-k, and the nucleus."""

from __future__ import annotations

import torch
from torch import Tensor


def dropped(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """bool [rows, vocab]: what every row of ``logits`` [rows, vocab] leaves out.

    The ``top_k`` [rows] likeliest stay (0: all); and of them, beginning with the likeliest, those before which the
    others do not reach ``top_p`` [rows] of the softmax over them (arXiv 1904.09751); the first always does. Of equals
    the lower id comes first.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(logits.shape[-1], device=logits.device)
    least, most = top_k[:, None], top_p[:, None]
    out = (least > 0) & (place >= least)
    weights = ordered.masked_fill(out, -torch.inf).softmax(-1)
    before = weights.cumsum(-1) - weights
    out |= (most < 1) & (before >= most) & (place > 0)
    return torch.empty_like(out).scatter_(-1, ids, out)
