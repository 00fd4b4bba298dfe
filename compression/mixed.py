"""The mixed cache: prefix, then per chunk its L-KV if selected else its H-KV, in time order, then the conversation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from compression.cache import KVCache
from compression.kv import ChunkKV
from compression.rope import Rope


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
        ends = list(accumulate(part.num_tokens for part in parts))
        self.spans: tuple[tuple[int, int], ...] = tuple(pairwise(ends))
        """Token range of every chunk: ``(start, stop)``."""
        self.num_mixed = self.length
        """KV tokens of prefix and video, without the conversation."""
        self._behind_video = self.next_position

    def forget_conversation(self) -> None:
        """Goes back to where nothing had been read behind the video."""
        self.rewind(self.num_mixed, self._behind_video)
