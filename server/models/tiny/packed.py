"""Training's forward pass: whole videos and their questions in ONE sequence, exactly what prefill and decoding compute.

Serving runs chunk after chunk; training puts all chunks, their VSTs and all question rows side by side. A kept KV
token stands twice among the keys: where its window has it, rotated to its place there, and in the memory, rotated to
its rank. A mask over per-token tables says who sees what. Shorter videos share a sequence, so any mix of lengths and
ratios has ONE static shape, which torch.compile needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compression.interleave import interleave
from compression.rope import Rope
from server.models.lm.decoder import Decoder, Layer

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_NOBODY = -9


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a packed sequence: [visual tokens | VSTs | question rows | prefix | padding], then memory keys."""

    num_chunks: int
    chunk_tokens: int
    num_rows: int
    row_tokens: int
    prefix_tokens: int
    min_ratio: int = 2
    """The least ratio that all chunks may have at once."""

    @property
    def num_visual(self) -> int:
        return self.num_chunks * self.chunk_tokens

    @property
    def memory(self) -> int:
        """Most KV tokens that all chunks together keep."""
        return self.num_visual // self.min_ratio

    @property
    def num_vsts(self) -> int:
        """Places for VSTs: all chunks at ratio 2."""
        return self.num_visual // 2

    @property
    def rows_start(self) -> int:
        return self.num_visual + self.num_vsts

    @property
    def prefix_start(self) -> int:
        return self.rows_start + self.num_rows * self.row_tokens

    @property
    def num_queries(self) -> int:
        return (self.prefix_start + self.prefix_tokens + 127) // 128 * 128

    @property
    def num_keys(self) -> int:
        return self.num_queries + self.memory


class Layout:
    """Who sees what, and from which position, for one choice of video length and ratios. Reused in place."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape

        def table(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        queries, keys, memory = shape.num_queries, shape.num_keys, shape.memory
        # A query sees keys of its own group up to its own offset, memory keys of chunks in [low, high), the prefix.
        self.query_group, self.query_offset = table(queries), table(queries)
        self.query_low, self.query_high = table(queries), table(queries)
        self.key_group, self.key_offset, self.key_chunk = table(keys), table(keys), table(keys)
        self.positions, self.memory_positions = table(queries, torch.int64), table(memory, torch.int64)
        self.memory_index = table(memory, torch.int64)
        # The visual tokens [start, stop) that a memory key stands for; empty where there is none.
        self.memory_start, self.memory_stop = table(memory, torch.int64), table(memory, torch.int64)

    def mask(self) -> MaskFunction:
        """flex_attention's mask function over the tables as they stand when it is called."""
        group, offset, low, high = self.query_group, self.query_offset, self.query_low, self.query_high
        key_group, key_offset, key_chunk = self.key_group, self.key_offset, self.key_chunk

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (group[query] == key_group[key]) & (key_offset[key] <= offset[query])
            memory = (key_chunk[key] >= low[query]) & (key_chunk[key] < high[query])
            prefix = (key_chunk[key] == -1) & (high[query] >= 0)
            return own | memory | prefix

        return sees

    def dense(self) -> Tensor:
        """The mask as a bool tensor [queries, keys], for small tests."""
        device = self.positions.device
        query = torch.arange(self.shape.num_queries, device=device)[:, None]
        key = torch.arange(self.shape.num_keys, device=device)[None]
        return self.mask()(query, query, query, key)

    def arrange(
        self, video_chunks: int, ratios: Sequence[int], *, num_blind: int = 0, gaps: Sequence[int] | None = None
    ) -> None:
        """Lays out ``num_chunks // video_chunks`` videos; ``ratios`` is one a chunk slot (1 keeps the raw tokens).

        The last ``num_blind`` rows of the sequence see the prefix only. ``gaps`` moves every chunk that many positions
        further from what stands before it, to meet the positions of longer videos.
        """
        shape, tokens = self.shape, self.shape.chunk_tokens
        num_videos = shape.num_chunks // video_chunks
        rows = shape.num_rows // num_videos
        queries = shape.num_queries
        group = -1000 - np.arange(queries)  # padding: everyone alone
        offset, low = np.zeros(queries, np.int64), np.zeros(queries, np.int64)
        high, position = np.full(queries, -1), np.zeros(queries, np.int64)
        index, rank = np.zeros(shape.memory, np.int64), np.zeros(shape.memory, np.int64)
        owner = np.full(shape.memory, _NOBODY)
        covers = np.zeros((2, shape.memory), np.int64)
        next_vst, kept = shape.num_visual, 0

        def place(at: NDArray[np.int64], g: int, o: NDArray[np.int64], seen: tuple[int, int], start: int) -> None:
            group[at], offset[at], low[at], high[at], position[at] = g, o, *seen, start + o

        for video in range(num_videos):
            first, start = video * video_chunks, shape.prefix_tokens
            for chunk in range(first, first + video_chunks):
                start += gaps[chunk] if gaps is not None else 0
                raw = chunk * tokens + np.arange(tokens)
                if ratios[chunk] == 1:
                    place(raw, chunk, np.arange(tokens), (first, chunk), start)
                    stays = raw
                else:
                    is_vst = interleave(tokens, ratios[chunk], 0)[0].numpy()
                    place(raw, chunk, np.flatnonzero(~is_vst), (first, chunk), start)
                    stays = next_vst + np.arange(is_vst.sum())
                    place(stays, chunk, np.flatnonzero(is_vst), (first, chunk), start)
                    next_vst += len(stays)
                at = slice(kept, kept + len(stays))
                index[at], rank[at], owner[at] = stays, start + np.arange(len(stays)), chunk
                covers[0, at] = chunk * tokens + ratios[chunk] * np.arange(len(stays))
                covers[1, at] = covers[0, at] + ratios[chunk]
                kept, start = at.stop, start + len(stays)
            for row in range(video * rows, (video + 1) * rows):
                blind = row >= shape.num_rows - num_blind
                at_row = shape.rows_start + row * shape.row_tokens + np.arange(shape.row_tokens)
                seen = (0, 0) if blind else (first, first + video_chunks)
                place(at_row, 1000 + row, np.arange(shape.row_tokens), seen, shape.prefix_tokens if blind else start)
        if next_vst > shape.rows_start or kept > shape.memory:
            raise ValueError(f"ratios {list(ratios)} keep more than {shape.memory} KV tokens")
        prefix = shape.prefix_start + np.arange(shape.prefix_tokens)
        place(prefix, -1, np.arange(shape.prefix_tokens), (0, -1), 0)
        chunk_of = np.concatenate([np.full(queries, _NOBODY), owner])
        chunk_of[prefix] = -1
        nowhere = np.full(shape.memory, _NOBODY)
        for table, values in (
            (self.query_group, group),
            (self.query_offset, offset),
            (self.query_low, low),
            (self.query_high, high),
            (self.positions, position),
            (self.key_group, np.concatenate([group, nowhere])),
            (self.key_offset, np.concatenate([offset, nowhere])),
            (self.key_chunk, chunk_of),
            (self.memory_index, index),
            (self.memory_positions, rank),
            (self.memory_start, covers[0]),
            (self.memory_stop, covers[1]),
        ):
            table.copy_(torch.from_numpy(values), non_blocking=True)


@dataclass(frozen=True, slots=True)
class Tables:
    """RoPE tables of one layout: of all tokens at their places, of the memory at its ranks."""

    cos: Tensor
    sin: Tensor
    memory_cos: Tensor
    memory_sin: Tensor

    @classmethod
    def of(cls, layout: Layout, rope: Rope, dtype: torch.dtype) -> Tables:
        return cls(*rope.tables(layout.positions, dtype), *rope.tables(layout.memory_positions, dtype))


def embed(decoder: Decoder, shape: Shape, visual: Tensor, rows: Tensor, prefix: Tensor) -> Tensor:
    """``visual`` [B, num_visual, hidden], ``rows`` [B, num_rows * row_tokens] and ``prefix`` [prefix_tokens] token ids
    -> [B, num_queries, hidden] in the dtype of ``visual``."""
    batch, dtype = len(visual), visual.dtype
    vst = decoder.beacon_embed_tokens.weight[0].to(dtype).expand(batch, shape.num_vsts, -1)
    text = decoder.embed_tokens(rows).to(dtype)
    sink = decoder.embed_tokens(prefix).to(dtype).expand(batch, -1, -1)
    padding = visual.new_zeros(
        batch, shape.num_queries - shape.prefix_start - shape.prefix_tokens, decoder.config.hidden_size
    )
    return torch.cat([visual, vst, text, sink, padding], 1)


def packed_layer(
    layer: Layer, x: Tensor, tables: Tables, memory_index: Tensor, vsts: tuple[int, int], rope: Rope, attend: Attend
) -> Tensor:
    """One layer over ``x`` [B, num_queries, hidden], in which ``vsts`` is the range of the VSTs."""
    attention = layer.self_attn
    start, stop = vsts
    h = layer.input_layernorm(x)
    parts = (attention.plain(h[:, :start]), attention.summary(h[:, start:stop]), attention.plain(h[:, stop:]))
    q, k, v = (torch.cat(pieces, -2) for pieces in zip(*parts, strict=True))
    q, k = q.to(v.dtype), k.to(v.dtype)
    memory_keys = rope.rotate(k[:, :, memory_index], tables.memory_cos, tables.memory_sin)
    keys = torch.cat([rope.rotate(k, tables.cos, tables.sin), memory_keys], 2)
    values = torch.cat([v, v[:, :, memory_index]], 2)
    return layer.output(x, attend(rope.rotate(q, tables.cos, tables.sin), keys, values))
