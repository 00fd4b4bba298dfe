"""Fewer frames, each whole: what most video models do with a long video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compression.compressor import RawChunk
from compression.kv import ChunkKV


@dataclass(frozen=True, slots=True)
class FrameSubsampling:
    """Keeps all tokens of as many frames as fit, at equal distances over the video.

    The KVs are those of the full prefill, so a kept frame has seen the dropped ones; sampling fewer frames before
    prefill cannot know more.
    """

    def keep(self, raw: Sequence[RawChunk], num_tokens: int, scores: Sequence[float]) -> list[ChunkKV]:
        """See :meth:`compression.eviction.Eviction.keep`; leaves less than a frame of the budget."""
        sizes = [chunk.num_tokens // chunk.tokens_per_frame for chunk in raw]
        total = sum(sizes)
        num_frames = min(total, num_tokens // raw[0].tokens_per_frame)
        chosen = {(2 * step + 1) * total // (2 * num_frames) for step in range(num_frames)}
        kept, first = [], 0
        for chunk, size in zip(raw, sizes, strict=True):
            frame = torch.arange(chunk.num_tokens, device=chunk.kv.keys.device) // chunk.tokens_per_frame + first
            stays = torch.isin(frame, torch.tensor(sorted(chosen), dtype=frame.dtype, device=frame.device))
            kept.append(chunk.kv.take(stays))
            first += size
        return kept
