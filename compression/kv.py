"""Keys and values of one piece of a video, before RoPE, and the pair of levels that prefill makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Level = Literal["prefix", "low", "high"]


@dataclass(frozen=True, slots=True)
class ChunkKV:
    """The KV tokens of one chunk (or of the prefix) over all layers.

    ``keys`` and ``values`` are ``[layers, kv_heads, tokens, head_dim]`` in the model's dtype. Keys are kept BEFORE
    RoPE, because a token's position depends on what stands before it in a mixed cache (Video-X2L, section 2).
    ``ratio`` is visual tokens per KV token: 2 means that half of them stay; 1 for the prefix.

    Without ``positions`` the tokens stand one behind the other, behind whatever stands before them. Models whose
    positions tell time and place keep those that the tokens had before compression: int32
    [axes, layers or 1, kv_heads or 1, tokens]; what follows the chunk then goes on at ``next_position``.

    The last ``num_others`` tokens are not visual: text around frames, of which one chunk may have more than another.
    """

    keys: Tensor
    values: Tensor
    level: Level
    ratio: int
    positions: Tensor | None = None
    next_position: int | None = None
    num_others: int = 0

    @property
    def num_tokens(self) -> int:
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and positions."""
        return self.keys.nbytes + self.values.nbytes + (0 if self.positions is None else self.positions.nbytes)

    def to(self, device: torch.device | str) -> ChunkKV:
        """The same on ``device``; shared where it is there already."""
        return self.brought(lambda tensor: tensor.to(device))

    def brought(self, bring: Callable[[Tensor], Tensor]) -> ChunkKV:
        """The same where ``bring`` takes tensors."""
        positions = None if self.positions is None else bring(self.positions)
        return replace(self, keys=bring(self.keys), values=bring(self.values), positions=positions)

    def moved(self, by: int) -> ChunkKV:
        """The same ``by`` positions further on (all axes), as behind another video; it must bring its positions."""
        if self.positions is None or self.next_position is None:
            raise ValueError("tokens without positions of their own stand where they are put")
        return replace(self, positions=self.positions + by, next_position=self.next_position + by)

    def followed_by(self, other: ChunkKV) -> ChunkKV:
        """The tokens of both, and ``next_position`` of ``other``; both bring positions, or neither does."""
        pairs = ((self.keys, other.keys), (self.values, other.values))
        keys, values = (torch.cat(pair, dim=2) for pair in pairs)
        positions = None
        if self.positions is not None and other.positions is not None:
            sizes = [max(pair) for pair in zip(self.positions.shape[1:3], other.positions.shape[1:3], strict=True)]
            both = [part.expand(-1, *sizes, -1) for part in (self.positions, other.positions)]
            positions = torch.cat(both, dim=-1)
        return replace(self, keys=keys, values=values, positions=positions, next_position=other.next_position)

    def take(self, tokens: slice | Tensor) -> ChunkKV:
        """Some of the tokens: a range, or where a mask [tokens] is True."""
        positions = None if self.positions is None else self.positions[..., tokens]
        return replace(self, keys=self.keys[:, :, tokens], values=self.values[:, :, tokens], positions=positions)


@dataclass(frozen=True, slots=True)
class BiLevelKV:
    """What prefill makes of a video: the prefix, and for every chunk its L-KV and its H-KV, in time order."""

    prefix: ChunkKV
    low: Sequence[ChunkKV]
    high: Sequence[ChunkKV]
