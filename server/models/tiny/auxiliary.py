"""Losses that only training has: they show the model where to look and what to keep, then fade.

Without them the model reads every frame (a classifier on its features is right) and still answers no code: the path
from the frame through VSTs to the answer is too long to be found by the answers' loss alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from compression.rope import Rope
from server.models.lm.decoder import Layer
from server.models.tiny.encoder import TinyEncoder
from server.models.tiny.packed import Layout, Tables
from server.models.tiny.questions import TYPES, Questions
from server.models.tiny.world import CHUNK_TICKS, CODE_LENGTH, COLORS, PLATE_COLORS, SHAPES, SYMBOLS, Script

_TOKENS = TinyEncoder.TOKENS_PER_FRAME
# Answer tokens at which a code is spelt: the first (and for two codes, behind " and ", the second).
_FIRST_CODE, _SECOND_CODE = (0, 1, 2), (5, 6, 7)


class ReadingHead(nn.Module):
    """A linear classifier of one frame: object, plates and codes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.sizes = [len(COLORS), len(SHAPES), *[len(PLATE_COLORS)] * 2, *[len(SYMBOLS)] * (2 * CODE_LENGTH)]
        self.linear = nn.Linear(size, sum(self.sizes))
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, targets: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x`` [n, size], ``targets`` [n, classes] of :func:`frame_targets` -> loss and share of characters right."""
        parts = self.linear(x).float().split(self.sizes, -1)
        weight = torch.ones(len(x), device=x.device) if weight is None else weight
        total = weight.sum().clamp(min=1)
        loss, right = x.new_zeros((), dtype=torch.float32), x.new_zeros((), dtype=torch.float32)
        for index, (part, target) in enumerate(zip(parts, targets.unbind(1), strict=True)):
            loss = loss + (functional.cross_entropy(part, target, reduction="none") * weight).sum() / total
            if index >= 4:
                right = right + ((part.argmax(-1) == target) * weight).sum() / total / (2 * CODE_LENGTH)
        return loss, right


def frame_targets(script: Script) -> Tensor:
    """[V, T, classes]: the class of every property of every tick."""
    objects = script.objects[..., None]
    return torch.cat([objects // len(SHAPES), objects % len(SHAPES), script.plates, script.codes.flatten(2)], -1)


def memory_reading(head: ReadingHead, layout: Layout, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What the last VST of a frame knows of it. ``x`` [B, queries, hidden], ``targets`` [B, frames, classes].

    Only where a VST stands for one frame or less; a coarser one must choose what to keep by itself.
    """
    start, stop = layout.memory_start, layout.memory_stop
    ends_frame = (stop > start) & (stop % _TOKENS == 0) & (stop - start <= _TOKENS)
    frame = (stop - 1).clamp(min=0) // _TOKENS
    known = x[:, layout.memory_index].flatten(0, 1)
    loss, right = head(known, targets[:, frame].flatten(0, 1), ends_frame.float().repeat(len(x)))
    return loss, right


def retrieval_spans(script: Script, asked: Questions, chunks: int) -> tuple[Tensor, Tensor]:
    """Where the answers are, in visual tokens from the start of the video; empty spans (0, 0) for nowhere.

    Returns the chunks [V, R, 4, 2] and the moments [V, R, 2, 2]: the tick asked for, or the whole shot where codes
    are static or the question is about the object alone.
    """
    per_chunk = CHUNK_TICKS * _TOKENS
    chunk = torch.stack([asked.chunks, asked.chunks + 1], -1) * per_chunk
    chunk = torch.where(asked.chunks[..., None] < 0, 0, chunk)
    shape = asked.ticks.shape
    ticks = asked.ticks.flatten(1)
    start, length = script.starts.gather(1, ticks), script.lengths.gather(1, ticks)
    of_object = [TYPES.index(name) for name in ("exist", "order", "time", "count")]
    whole = torch.isin(asked.types, torch.tensor(of_object, device=ticks.device))
    whole = whole[..., None].expand(shape).flatten(1) | script.static.gather(1, ticks)
    moment = torch.stack([torch.where(whole, start, ticks), torch.where(whole, start + length, ticks + 1)], -1)
    moment = moment.view(*shape, 2) * _TOKENS
    nowhere = asked.chunks[..., 0] < 0
    return chunk, torch.where(nowhere[..., None, None], 0, moment)


def retrieval_loss(
    layer: Layer,
    x: Tensor,
    layout: Layout,
    tables: Tables,
    rope: Rope,
    answer: Tensor,
    types: Tensor,
    chunk_spans: Tensor,
    moment_spans: Tensor,
) -> tuple[Tensor, Tensor]:
    """How little attention goes where the answer is: to its chunk, and to its moment.

    ``x`` [B, queries, hidden] enters ``layer``; ``answer`` [B, rows, row_tokens] bool; ``types`` [B, rows]; spans as
    of :func:`retrieval_spans`, [B, rows, k, 2], in visual tokens of the packed sequence. Heads of the first half of
    the KV groups look for the chunk (from the prompt's last token), those of the second half for the moment (from
    where codes are spelt, too).
    """
    shape = layout.shape
    last = answer.long().argmax(-1) - 1
    first_token = shape.rows_start + torch.arange(shape.num_rows, device=x.device) * shape.row_tokens
    _, k, _ = layer.self_attn.summary(layer.input_layernorm(x[:, layout.memory_index]))
    k = rope.rotate(k, tables.memory_cos, tables.memory_sin).float()
    half = k.shape[1] // 2
    owner = layout.key_chunk[shape.num_queries :]

    def attention(offset: int) -> Tensor:
        """Log attention [B, heads, rows, memory] of the tokens ``offset`` behind the prompt's last."""
        at = first_token + (last + offset).clamp(max=shape.row_tokens - 1)
        token = x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
        q, _, _ = layer.self_attn.plain(layer.input_layernorm(token))
        q = rope.rotate(q, tables.cos[at][:, None], tables.sin[at][:, None]).float()
        logits: Tensor = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
        low, high = layout.query_low[at][:, None, :, None], layout.query_high[at][:, None, :, None]
        return logits.masked_fill((owner < low) | (owner >= high), -1e4).log_softmax(-1)

    def miss(log: Tensor, span: Tensor, when: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and count of -log(attention inside ``span`` [B, rows, 2]) over rows where ``when``."""
        start, stop = layout.memory_start, layout.memory_stop
        inside = (start < span[..., 1:]) & (stop > span[..., :1]) & (stop > start)
        when = when & (span[..., 1] > 0)
        loss = -log.masked_fill(~inside[:, None], -1e4).logsumexp(-1)
        return (loss * when[:, None]).sum(), when.sum() * log.shape[1]

    first = attention(0)
    heads = first.shape[1] * half // k.shape[1]
    everywhere = torch.ones_like(types, dtype=torch.bool)
    to_chunk = [miss(first[:, :heads:2], span, everywhere) for span in chunk_spans.unbind(2)]
    spelt = [TYPES.index(name) for name in ("code", "atcode", "multi")]
    spells = torch.isin(types, torch.tensor(spelt, device=types.device))
    to_moment = [miss(first[:, heads:], moment_spans[:, :, 0], everywhere)]
    to_moment += [miss(attention(offset)[:, heads:], moment_spans[:, :, 0], spells) for offset in _FIRST_CODE[1:]]
    two = types == TYPES.index("multi")
    to_moment += [miss(attention(offset)[:, heads:], moment_spans[:, :, 1], two) for offset in _SECOND_CODE]

    def mean(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([loss for loss, _ in parts]).sum() / torch.stack([n for _, n in parts]).sum().clamp(min=1)

    return mean(to_chunk), mean(to_moment)
