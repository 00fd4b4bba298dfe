"""Training's sequence: whole videos and their questions side by side, each token where serving has it.

[visual tokens | question rows | prefix | padding]. Videos of one length share the visual part; a row sees the prefix,
its own video and itself; the last row sees no video. Positions are the adapter's: time, row and column of a visual
token count from the end of the prefix, and text goes on behind the whole video.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny_qwen.model import HEIGHT, MERGE, PATCH, TOKENS_PER_FRAME, WIDTH
from torch import Tensor

from server.models.tiny.world import CHUNK_TICKS

CHUNK_TOKENS = CHUNK_TICKS * TOKENS_PER_FRAME
_PREFIX, _NOTHING, _FIRST_ROW, _FIRST_PADDING = -1, -2, 1000, -1000


@dataclass(frozen=True, slots=True)
class Shape:
    num_chunks: int
    num_rows: int
    row_tokens: int
    prefix_tokens: int

    @property
    def num_visual(self) -> int:
        return self.num_chunks * CHUNK_TOKENS

    @property
    def rows_start(self) -> int:
        return self.num_visual

    @property
    def prefix_start(self) -> int:
        return self.rows_start + self.num_rows * self.row_tokens

    @property
    def num_tokens(self) -> int:
        """Rounded up to whole blocks of flex_attention."""
        return -(-(self.prefix_start + self.prefix_tokens) // 128) * 128


class Layout:
    """Who stands where and sees what. Its tensors stay where they are, so that compiled code may hold them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        n = shape.num_tokens
        self.group, self.sees = (torch.zeros(n, dtype=torch.int64, device=device) for _ in range(2))
        self.positions = torch.zeros(3, n, dtype=torch.int64, device=device)
        self.kept = torch.ones(n, dtype=torch.bool, device=device)
        """Which visual tokens the rows see."""

    def arrange(self, video_chunks: int) -> None:
        """For videos of ``video_chunks`` chunks."""
        shape = self.shape
        num_videos = shape.num_chunks // video_chunks
        ticks, rows = video_chunks * CHUNK_TICKS, shape.num_rows // num_videos
        group = _FIRST_PADDING - torch.arange(shape.num_tokens)
        sees = torch.full((shape.num_tokens,), _NOTHING)
        positions = torch.zeros(3, shape.num_tokens, dtype=torch.int64)
        axes = (ticks, HEIGHT // PATCH // MERGE, WIDTH // PATCH // MERGE)
        places = torch.stack(torch.meshgrid(*map(torch.arange, axes), indexing="ij")).flatten(1) + shape.prefix_tokens
        positions[:, : shape.num_visual] = places.repeat(1, num_videos)
        group[: shape.num_visual] = torch.arange(num_videos).repeat_interleave(ticks * TOKENS_PER_FRAME)

        row = torch.arange(shape.num_rows)
        blind = row == shape.num_rows - 1
        text = slice(shape.rows_start, shape.prefix_start)
        start = shape.prefix_tokens + torch.where(blind, 0, ticks)
        positions[:, text] = (start[:, None] + torch.arange(shape.row_tokens)).flatten()
        group[text] = (_FIRST_ROW + row).repeat_interleave(shape.row_tokens)
        sees[text] = torch.where(blind, _NOTHING, row // rows).repeat_interleave(shape.row_tokens)

        prefix = slice(shape.prefix_start, shape.prefix_start + shape.prefix_tokens)
        positions[:, prefix], group[prefix] = torch.arange(shape.prefix_tokens), _PREFIX
        for table, values in ((self.group, group), (self.sees, sees), (self.positions, positions)):
            table.copy_(values, non_blocking=True)

    def mask(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """flex_attention's mask function."""
        group, sees, kept = self.group, self.sees, self.kept

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (group[query] == group[key]) & (key <= query)
            video = (sees[query] == group[key]) & kept[key]
            prefix = (group[key] == _PREFIX) & (group[query] >= 0)
            return own | video | prefix

        return visible

    def dense(self) -> Tensor:
        """The mask as bool [tokens, tokens], for small tests."""
        token = torch.arange(len(self.group), device=self.group.device)
        return self.mask()(token, token, token[:, None], token[None])

    def row_sees(self) -> Tensor:
        """bool [rows, visual tokens]."""
        shape = self.shape
        video = self.sees[shape.rows_start : shape.prefix_start : shape.row_tokens]
        return (video[:, None] == self.group[: shape.num_visual]) & self.kept[: shape.num_visual]
