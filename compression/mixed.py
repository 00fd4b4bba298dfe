"""The mixed cache: prefix, then per chunk its L-KV if selected else its H-KV, in time order, then the conversation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor

from compression.cache import KVCache
from compression.kv import ChunkKV
from compression.rope import Rope


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run of KV tokens ``[layers, kv_heads, tokens, head_dim]`` that stand ``offset`` positions further on than where
    their keys were rotated to."""

    keys: Tensor
    values: Tensor
    offset: int = 0

    @property
    def num_tokens(self) -> int:
        return int(self.keys.shape[2])


class MixedCache(KVCache):
    """The KV cache of one request (Video-X2L, section 3).

    The chunks stand in temporal order, at contiguous positions unless they bring their own; their keys are rotated
    once, here, at assembly.
    """

    def __init__(self, prefix: ChunkKV, chunks: Sequence[ChunkKV], rope: Rope, *, room: int) -> None:
        """Copies ``prefix`` and ``chunks`` and leaves ``room`` free tokens for the conversation."""
        parts = [prefix, *chunks]
        super().__init__(prefix, rope, capacity=sum(part.num_tokens for part in parts) + room)
        self.append(*parts)
        ends = accumulate(part.num_tokens for part in parts)
        spans = zip(pairwise(ends), chunks, strict=True)
        self._end_videos((start, stop - chunk.num_others) for (start, stop), chunk in spans)

    def _end_videos(self, spans: Iterable[tuple[int, int]]) -> None:
        """The conversation begins here."""
        self.spans: tuple[tuple[int, int], ...] = tuple(spans)
        """Token range of every chunk's visual tokens: ``(start, stop)``. Text is left out, lest what stands before or
        behind a video speak for its first chunk and its last."""
        self.num_mixed = self.length
        """KV tokens of prefix and video, without the conversation."""
        self._behind_video = self.next_position

    def forget_conversation(self) -> None:
        """Goes back to where nothing had been read behind the video."""
        self.rewind(self.num_mixed, self._behind_video)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Prefix and video, in order."""
        return (Segment(self.keys[:, :, : self.num_mixed], self.values[:, :, : self.num_mixed]),)
