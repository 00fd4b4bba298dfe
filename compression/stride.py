"""Every n-th token: the plainest way to keep fewer, and the one to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.compressor import Pruner, RawChunk


@dataclass(frozen=True, slots=True)
class Stride(Pruner):
    """Cuts the chunk into equal runs of tokens and keeps the middle token of each."""

    def choose(self, raw: RawChunk, num_tokens: int) -> Tensor:
        steps = torch.arange(num_tokens, device=raw.kv.keys.device)
        return (2 * steps + 1) * raw.num_tokens // (2 * num_tokens)
