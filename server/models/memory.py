"""What the prefill of a chunk sees of the chunks before it."""

from __future__ import annotations

import re
from collections import deque

from compression.cache import KVCache
from compression.kv import ChunkKV


def num_low_in_memory(prefill_mode: str) -> int | None:
    """How many of the last chunks are seen as L-KVs, the others as H-KVs; None is all.

    ``exact`` sees every chunk's L-KV; ``high-memory`` H-KVs, as an answer sees them, which keeps the pass cheap however
    long the video is; ``recent-N`` the L-KVs of the last N and the H-KVs of the others. Raises ValueError for another
    name.
    """
    if not re.fullmatch(r"exact|high-memory|recent-[1-9]\d*", prefill_mode):
        raise ValueError(f"prefill_mode must be exact, high-memory or recent-N, not {prefill_mode!r}")
    if prefill_mode == "exact":
        return None
    return int(prefill_mode.removeprefix("recent-")) if prefill_mode != "high-memory" else 0


class Recent:
    """The chunks at the end of a memory that stand there as L-KVs and are to be replaced by their H-KVs later."""

    def __init__(self, num_low: int | None) -> None:
        """``num_low`` as in :func:`num_low_in_memory`."""
        self._num_low = num_low
        self._chunks: deque[tuple[ChunkKV, ChunkKV]] = deque()

    def append_to(self, memory: KVCache, low: ChunkKV, high: ChunkKV) -> None:
        """Adds the next chunk to ``memory`` and turns the one that is no longer recent into its H-KV."""
        memory.append(low)
        if self._num_low is None:
            return
        self._chunks.append((low, high))
        if len(self._chunks) > self._num_low:
            # All that stands behind the chunk that changes its level moves.
            memory.length -= sum(recent.num_tokens for recent, _ in self._chunks)
            memory.append(self._chunks.popleft()[1])
            for recent, _ in self._chunks:
                memory.append(recent)
