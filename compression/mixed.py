"""The mixed cache: prefix, then per chunk its L-KV if selected else its H-KV, in time order, then the conversation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from compression.kv import ChunkKV
from compression.rope import Rope


class MixedCache:
    """The KV cache of one request (Video-X2L, section 3).

    Chunks stand in temporal order at contiguous positions, so keys are rotated once, here, at assembly; the
    conversation's keys are appended already rotated. Buffers are ``[layers, kv_heads, capacity, head_dim]``.
    Not thread-safe; one request owns one cache.
    """

    def __init__(self, prefix: ChunkKV, chunks: Sequence[ChunkKV], rope: Rope, *, room: int) -> None:
        """Copies ``prefix`` and ``chunks`` and leaves ``room`` free tokens for the question and its answer."""
        parts = [prefix, *chunks]
        stops = torch.tensor([part.num_tokens for part in parts]).cumsum(0).tolist()
        self.spans: tuple[tuple[int, int], ...] = tuple(pairwise(stops))
        """Token range of every chunk: ``(start, stop)``."""
        self.num_mixed: int = stops[-1]
        """KV tokens of prefix and video, without the conversation."""
        self.length = self.num_mixed
        layers, heads, _, head_dim = prefix.keys.shape
        shape = (layers, heads, self.num_mixed + room, head_dim)
        self.keys = prefix.keys.new_empty(shape)
        self.values = prefix.values.new_empty(shape)
        positions = torch.arange(self.num_mixed, device=prefix.keys.device)
        raw = torch.cat([part.keys for part in parts], dim=2)
        self.keys[:, :, : self.length] = rope.rotate(raw, *rope.tables(positions, raw.dtype))
        torch.cat([part.values for part in parts], dim=2, out=self.values[:, :, : self.length])

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts ``[kv_heads, n, head_dim]`` rotated keys and values of one layer behind the cache.

        Returns that layer's keys and values up to and including them. The new tokens count only after
        :meth:`advance`, which a forward pass calls once all layers are written.
        """
        stop = self.length + keys.shape[1]
        self.keys[layer, :, self.length : stop] = keys
        self.values[layer, :, self.length : stop] = values
        return self.keys[layer, :, :stop], self.values[layer, :, :stop]

    def advance(self, num_tokens: int) -> None:
        self.length += num_tokens
