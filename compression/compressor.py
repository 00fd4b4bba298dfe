"""Training-free compression of a chunk: fewer KV tokens made of the KVs that its visual tokens have themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from compression.kv import ChunkKV
from compression.rope import Rope


@dataclass(frozen=True, slots=True)
class RawChunk:
    """What one forward pass over a chunk's visual tokens leaves behind; ``num_tokens`` is a multiple of
    ``tokens_per_frame``.

    ``kv`` holds all of them at ratio 1, keys before RoPE; ``positions`` [..., tokens] int64 is where they stood in that
    pass, and ``kv.positions`` is set where they are to stay there. ``queries`` [layers, heads, window, head_dim],
    before RoPE at ``query_positions`` [..., window], are those of the chunk's last tokens, or of whatever else shall
    judge the chunk. ``others`` are the tokens that stood among the visual ones, such as timestamps: no method sees
    them, and :meth:`with_others` brings them back.
    """

    kv: ChunkKV
    positions: Tensor
    queries: Tensor
    query_positions: Tensor
    rope: Rope
    tokens_per_frame: int
    others: ChunkKV | None = None

    @property
    def num_tokens(self) -> int:
        return self.kv.num_tokens

    @property
    def num_others(self) -> int:
        return 0 if self.others is None else self.others.num_tokens

    def with_others(self, kept: ChunkKV) -> ChunkKV:
        """What was kept of the visual tokens, and all others."""
        return kept if self.others is None else replace(kept.followed_by(self.others), num_others=self.num_others)

    def seen_by(self, queries: Tensor, positions: Tensor) -> RawChunk:
        """The same chunk judged by other queries, those of a question for example (shapes as in the class)."""
        return replace(self, queries=queries, query_positions=positions)

    def keep(self, keys: Tensor, values: Tensor, tokens: Tensor) -> Kept:
        """``keys`` and ``values`` [layers, kv_heads, n, head_dim] for the tokens they are, or stand for (see
        :class:`Kept`), whose positions they take over."""
        positions = self.kv.positions
        if positions is not None:
            one_for_all = tokens
            for dim in (0, 1):  # what was expanded is one choice: its positions are kept once
                one_for_all = one_for_all.narrow(dim, 0, 1) if not tokens.stride(dim) else one_for_all
            positions = positions[:, 0, 0][:, one_for_all]
        return Kept(replace(self.kv, keys=keys, values=values, positions=positions), tokens)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a compressor makes of a chunk, in time order.

    ``tokens`` [layers, kv_heads, num_tokens] int64 tells which of the chunk's visual tokens each KV token is, or stands
    for.
    """

    kv: ChunkKV
    tokens: Tensor


def join(raw: Sequence[RawChunk]) -> RawChunk:
    """The chunks of a whole video as one; it is judged by the queries of the last."""
    keys, values = (torch.cat([getattr(chunk.kv, name) for chunk in raw], dim=2) for name in ("keys", "values"))
    positions = torch.cat([chunk.positions for chunk in raw], dim=-1)
    stay = [chunk.kv.positions for chunk in raw if chunk.kv.positions is not None]
    kv = replace(raw[-1].kv, keys=keys, values=values, positions=torch.cat(stay, dim=-1) if stay else None)
    others = [chunk.others for chunk in raw if chunk.others is not None]
    return replace(raw[-1], kv=kv, positions=positions, others=reduce(ChunkKV.followed_by, others) if others else None)


class Compressor(Protocol):
    """One method. Stateless: what it makes of a chunk depends on that chunk alone."""

    def compress(self, raw: RawChunk, num_tokens: int) -> Kept:
        """Exactly ``num_tokens`` KV tokens, 0 to ``raw.num_tokens``; the latter gives the chunk as it is.

        ``kv.level`` and ``kv.ratio`` are those of ``raw``: the caller knows what the result is for.
        """


class Pruner(ABC):
    """A compressor that keeps some tokens as they are and drops the others, for every layer and KV head by itself."""

    def compress(self, raw: RawChunk, num_tokens: int) -> Kept:
        """See :meth:`Compressor.compress`."""
        layers, heads, total, head_dim = raw.kv.keys.shape
        if num_tokens >= total:
            tokens = torch.arange(total, device=raw.kv.keys.device)
            return Kept(raw.kv, tokens.expand(layers, heads, total))
        tokens = self.choose(raw, num_tokens).sort(-1).values.expand(layers, heads, num_tokens)
        index = tokens[..., None].expand(-1, -1, -1, head_dim)
        return raw.keep(raw.kv.keys.gather(2, index), raw.kv.values.gather(2, index), tokens)

    @abstractmethod
    def choose(self, raw: RawChunk, num_tokens: int) -> Tensor:
        """``num_tokens`` (less than all) different tokens, int64 broadcastable to [layers, kv_heads, num_tokens]."""


class ScoredPruner(Pruner):
    """Keeps the tokens with the highest scores. So a smaller result is part of every larger one."""

    def choose(self, raw: RawChunk, num_tokens: int) -> Tensor:
        return best(self.score(raw), num_tokens)

    @abstractmethod
    def score(self, raw: RawChunk) -> Tensor:
        """float32 [layers, kv_heads, tokens]; higher stays."""


def best(scores: Tensor, number: int) -> Tensor:
    """Indices of the ``number`` highest scores of the last dimension; among equals the earlier ones."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :number]


def num_kept(num_visual: int, ratio: int) -> int:
    """KV tokens of ``num_visual`` visual tokens at ``ratio``: rounded up, so that no chunk is left without one."""
    return -(-num_visual // ratio)


def both_levels(compressor: Compressor, raw: RawChunk, low_ratio: int, high_ratio: int) -> tuple[Kept, Kept]:
    """The chunk's L-KV and H-KV, both made of the same raw KVs."""
    low = compressor.compress(raw, num_kept(raw.num_tokens, low_ratio))
    high = compressor.compress(raw, num_kept(raw.num_tokens, high_ratio))
    return (
        replace(low, kv=replace(low.kv, level="low", ratio=low_ratio)),
        replace(high, kv=replace(high.kv, level="high", ratio=high_ratio)),
    )
