"""A growing cache of rotated keys and of values: the memory of a prefill, or the base of a mixed cache."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from compression.kv import ChunkKV
from compression.rope import Rope


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
        """How far the positions are ahead of the tokens held; other than 0 only where chunks bring their positions."""
        self.num_shared = 0
        """Of the tokens held, those that stand before the ones in ``keys`` and ``values``, in somebody else's memory."""

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[2])

    @property
    def next_position(self) -> int:
        """Where the next token stands, unless it brings its own position."""
        return self.length + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, free room included."""
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, num_tokens: int) -> None:
        """Makes room for ``num_tokens`` more, doubling the buffers where they are too small."""
        needed = self.length - self.num_shared + num_tokens
        if needed > self.capacity:
            grow = (0, 0, 0, max(needed, 2 * self.capacity) - self.capacity)
            self.keys = torch.nn.functional.pad(self.keys, grow)
            self.values = torch.nn.functional.pad(self.values, grow)

    def append(self, kv: ChunkKV) -> None:
        """Adds a chunk's KV tokens behind the others, its keys rotated to where they stand, or now stand."""
        self.reserve(kv.num_tokens)
        stop, positions = self.length + kv.num_tokens, kv.positions
        if positions is None:
            positions = torch.arange(self.next_position, stop + self.offset, device=kv.keys.device)
        self.keys[:, :, self.length : stop] = self.rope.rotate(kv.keys, *self.rope.tables(positions, kv.keys.dtype))
        self.values[:, :, self.length : stop] = kv.values
        self.length = stop
        if kv.next_position is not None:
            self.offset = kv.next_position - stop

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts one layer's ``[kv_heads, n, head_dim]`` (keys rotated) behind the cache, in room reserved before.

        Returns that layer's keys and values up to and including them, as views (without shared ones). What was written
        counts only after :meth:`advance`; without it the next write goes over it.
        """
        start = self.length - self.num_shared
        stop = start + keys.shape[1]
        self.keys[layer, :, start:stop] = keys
        self.values[layer, :, start:stop] = values
        return self.keys[layer, :, :stop], self.values[layer, :, :stop]

    def advance(self, num_tokens: int) -> None:
        """Keeps the last ``num_tokens`` written to every layer."""
        self.length += num_tokens

    def copy(self) -> Self:
        """An independent cache with the same content."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.keys, twin.values = self.keys.clone(), self.values.clone()
        return twin
