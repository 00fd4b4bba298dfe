"""A growing cache of rotated keys and of values: the memory of a prefill, or the base of a mixed cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from compression.kv import ChunkKV
from compression.rope import Rope

_ROTATED_TOKENS = 1 << 16
"""Times layers: rotated together."""
_MOST_GROWTH = 1 << 15
"""KV tokens."""


class KVCache:
    """Keys rotated to their positions and values, ``[layers, kv_heads, capacity, head_dim]``.

    Not thread-safe; one prefill or one request owns one cache.
    """

    def __init__(self, like: ChunkKV, rope: Rope, *, capacity: int) -> None:
        """An empty cache with the layers, heads, dtype and device of ``like``."""
        layers, heads, _, head_dim = like.keys.shape
        self.rope = rope
        self.keys = like.keys.new_empty((layers, heads, capacity, head_dim))
        self.values = torch.empty_like(self.keys)
        self.length = 0
        """KV tokens held."""
        self.offset = 0
        """How far the positions are ahead of the tokens held; other than 0 only where some brought their positions."""
        self.num_shared = 0
        """Of the tokens held, those before the ones in ``keys`` and ``values``, in somebody else's memory."""

    @property
    def num_own(self) -> int:
        """KV tokens held in ``keys`` and ``values``."""
        return self.length - self.num_shared

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[2])

    @property
    def head_dim(self) -> int:
        return int(self.keys.shape[3])

    @property
    def next_position(self) -> int:
        """Where the next token stands, unless it brings its own position."""
        return self.length + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, free room included."""
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, num_tokens: int) -> None:
        """Makes room for ``num_tokens`` more. Buffers that are too small grow to twice their size, but large ones only
        by so much: an hour's KVs would otherwise take the room of two."""
        needed = self.num_own + num_tokens
        if needed > self.capacity:
            grow = (0, 0, 0, max(needed - self.capacity, min(self.capacity, _MOST_GROWTH)))
            self.keys = torch.nn.functional.pad(self.keys, grow)
            self.values = torch.nn.functional.pad(self.values, grow)

    def append(self, *parts: ChunkKV) -> None:
        """Adds chunks' KV tokens behind the others, their keys rotated to where they stand, or now stand."""
        start = self.length
        self.reserve(sum(part.num_tokens for part in parts))
        positions = self._place(parts)
        # All at once: hundreds of chunks, copied and rotated one by one, take longer to tell a GPU than to do.
        keys, values = (room[:, :, start : self.length] for room in (self.keys, self.values))
        torch.cat([part.keys for part in parts], dim=2, out=keys)
        torch.cat([part.values for part in parts], dim=2, out=values)
        self._rotate(keys, positions)

    def _place(self, parts: Sequence[ChunkKV]) -> Tensor:
        """Counts ``parts`` as held; where their tokens stand: int64 [tokens], or [axes, layers or 1, kv_heads or 1,
        tokens] where a part brings such."""
        shapes = [part.positions.shape[:-1] for part in parts if part.positions is not None]
        common = [max(sizes) for sizes in zip(*shapes, strict=True)]
        behind = torch.arange(sum(part.num_tokens for part in parts), device=self.keys.device)
        if not shapes:
            self.length += len(behind)
            return behind + (self.next_position - len(behind))
        places = []
        for part in parts:
            own = behind[: part.num_tokens] + self.next_position if part.positions is None else part.positions
            places.append(own.expand(*common, -1))
            self.length += part.num_tokens
            if part.next_position is not None:
                self.offset = part.next_position - self.length
        return torch.cat(places, dim=-1)

    def _rotate(self, keys: Tensor, positions: Tensor) -> None:
        """Rotates ``keys``, a range of tokens of all layers, in place: a few layers at a time, for what it takes."""
        layers, _, tokens, _ = keys.shape
        cos, sin = (
            table.expand(layers, *table.shape[1:-2] or (1,), *table.shape[-2:])
            for table in self.rope.tables(positions, keys.dtype)
        )
        size = max(1, _ROTATED_TOKENS // max(1, tokens))
        for part, *tables in zip(*(torch.split(whole, size) for whole in (keys, cos, sin)), strict=True):
            part.copy_(self.rope.rotate(part, *tables))

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts one layer's ``[kv_heads, n, head_dim]`` (keys rotated) behind the cache, in room reserved before.

        Returns that layer's keys and values up to and including them, as views (without shared ones). What was written
        counts only after :meth:`advance`; without it the next write goes over it.
        """
        start = self.num_own
        stop = start + keys.shape[1]
        self.keys[layer, :, start:stop] = keys
        self.values[layer, :, start:stop] = values
        return self.keys[layer, :, :stop], self.values[layer, :, :stop]

    def advance(self, num_tokens: int, next_position: int | None = None) -> None:
        """Keeps the last ``num_tokens`` written to every layer; what follows goes on at ``next_position``, or behind
        them."""
        self.length += num_tokens
        if next_position is not None:
            self.offset = next_position - self.length

    def rewind(self, length: int, next_position: int) -> None:
        """Goes back to where ``length`` KV tokens were held and the next one stood at ``next_position``."""
        self.length, self.offset = length, next_position - length

    def copy(self) -> Self:
        """An independent cache with the same content."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.keys, twin.values = self.keys.clone(), self.values.clone()
        return twin
