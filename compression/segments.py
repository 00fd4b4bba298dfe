"""KVs that many requests see at once: rotated where they were put first, and seen from wherever they stand now.

RoPE is relative: a key rotated to position ``p`` that now stands at ``p + offset`` is to a query at position ``t`` what
it was to one at ``t - offset``. So a mixed cache need not own the KVs of its videos. It is a list of segments, runs of
shared tokens that have moved by the same offset, and of its own it has only what comes behind the videos. With ``k``
chunks re-loaded there are at most ``2k + 1`` segments a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from compression.cache import KVCache
from compression.kv import ChunkKV
from compression.mixed import MixedCache, Segment
from compression.rope import Rope


@dataclass(frozen=True, slots=True, eq=False)
class RotatedKV:
    """Parts of a video, one behind the other in one buffer, keys rotated: prefix and H-KVs, or the L-KV of one chunk.

    ``keys`` and ``values`` are ``[layers, kv_heads, tokens, head_dim]``; nobody writes to them. ``spans`` is the token
    range of every part, ``num_others`` how many at its end are not visual. Where the parts bring positions of their own
    (see :class:`ChunkKV`) ``next_positions`` has for each what follows it; None stands for parts without: there token
    ``i`` of the buffer is rotated to position ``i``.
    """

    keys: Tensor
    values: Tensor
    spans: tuple[tuple[int, int], ...]
    num_others: tuple[int, ...]
    next_positions: tuple[int | None, ...]

    @classmethod
    @torch.inference_mode()
    def of(cls, parts: Sequence[ChunkKV], rope: Rope) -> RotatedKV:
        """Copies ``parts``, which are at least one, into one buffer."""
        cache = KVCache(parts[0], rope, capacity=sum(part.num_tokens for part in parts))
        cache.append(*parts)
        spans = pairwise(accumulate((part.num_tokens for part in parts), initial=0))
        others, next_positions = zip(*((part.num_others, part.next_position) for part in parts), strict=True)
        return cls(cache.keys, cache.values, tuple(spans), others, next_positions)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Part ``index`` of ``source``, as it goes into a mixed cache; ``shift`` is by how much its own positions move, if
    it brings any."""

    source: RotatedKV
    index: int
    shift: int = 0


class SharedCache(MixedCache):
    """A mixed cache that copies nothing of its videos; ``keys`` and ``values`` hold what was appended behind them."""

    def __init__(self, parts: Sequence[Part], rope: Rope, *, room: int) -> None:
        """Puts ``parts`` one behind the other, prefix first, and leaves ``room`` free tokens for the conversation."""
        source = parts[0].source
        like = ChunkKV(source.keys, source.values, "prefix", 1)
        KVCache.__init__(self, like, rope, capacity=room)  # MixedCache would copy
        runs: list[tuple[RotatedKV, int, int, int]] = []
        spans = []
        for part in parts:
            start, stop = part.source.spans[part.index]
            next_position = part.source.next_positions[part.index]
            offset = part.shift if next_position is not None else self.next_position - start
            num_others = part.source.num_others[part.index]
            spans.append((self.length, self.length + stop - start - num_others))
            self.length += stop - start
            if next_position is not None:
                self.offset = next_position + part.shift - self.length
            if runs and runs[-1][0] is part.source and runs[-1][2:] == (start, offset):
                runs[-1] = (part.source, runs[-1][1], stop, offset)
            elif stop > start:
                runs.append((part.source, start, stop, offset))
        self._end_videos(spans[1:])
        self.num_shared = self.length
        self._segments = tuple(
            Segment(source.keys[:, :, start:stop], source.values[:, :, start:stop], offset)
            for source, start, stop, offset in runs
        )

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Prefix and videos, in order."""
        return self._segments
