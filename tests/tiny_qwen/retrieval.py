"""Losses that only training has: what a visual token is to know, and where the answer's tokens are to look.

As with the bundled model (server/models/tiny/auxiliary.py): without them codes stay unread for thousands of steps.
"""

from __future__ import annotations

import torch
from tiny_qwen.sequence import Layout
from torch import Tensor, nn
from torch.nn import functional

from compression.rope import Rope
from server.models.lm.decoder import LayerLike
from server.models.tiny.questions import TYPES
from server.models.tiny.world import COLORS, PLATE_COLORS, SHAPES

# What the answer token ``offset`` behind the prompt's last one spells, or is about to: (types, which of two moments).
# "ABC and DEF" for two codes, "00:10 and 01:25, so the ..." for an order.
_SPELLING = (
    (0, ("code", "multi", "time", "order", "exist", "object"), 0),
    (1, ("code", "multi", "time", "order", "object"), 0),
    (2, ("code", "multi"), 0),
    (3, ("time", "order"), 0),
    (4, ("time", "order"), 0),
    (5, ("multi",), 1),
    (6, ("multi",), 1),
    (7, ("multi", "order"), 1),
    (8, ("order",), 1),
    (10, ("order",), 1),
    (11, ("order",), 1),
)
_GIST = (len(COLORS), len(SHAPES), len(PLATE_COLORS), len(PLATE_COLORS))
_DIGITS = (10, 10, 10, 10)
Spelling = tuple[Tensor, Tensor, Tensor]


class Classifier(nn.Module):
    """A linear one, of several properties at once."""

    def __init__(self, size: int, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.classes = classes
        self.linear = nn.Linear(size, sum(classes))
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """``x`` [n, size], ``targets`` [n, properties] -> the sum of the properties' mean losses."""
        parts = self.linear(x).float().split(self.classes, -1)
        return torch.stack(
            [functional.cross_entropy(p, t) for p, t in zip(parts, targets.unbind(1), strict=True)]
        ).sum()


def gist_classifier(size: int) -> Classifier:
    """Object and plate colours, to be read off every visual token of a frame."""
    return Classifier(size, _GIST)


def clock_classifier(size: int) -> Classifier:
    """The digits of mm:ss."""
    return Classifier(size, _DIGITS)


def digits(seconds: Tensor) -> Tensor:
    """int64 [n] -> [n, 4]"""
    return torch.stack([seconds // 600 % 10, seconds // 60 % 10, seconds % 60 // 10, seconds % 10], -1)


def retrieval_loss(
    layer: LayerLike,
    x: Tensor,
    layout: Layout,
    tables: tuple[Tensor, Tensor],
    rope: Rope,
    answer: Tensor,
    types: Tensor,
    chunk_spans: Tensor,
    moment_spans: Tensor,
    spelt: Spelling,
) -> tuple[Tensor, Tensor]:
    """How little attention goes where the answer is: to its chunk, and to its moment.

    ``x`` [B, tokens, hidden] enters ``layer``; ``answer`` [B, rows, row_tokens] bool; ``types`` [B, rows]; spans
    [B, rows, k, 2] in visual tokens of the sequence, (0, 0) for nowhere. The heads of the first half of the KV groups
    look for the chunk (from the prompt's last token), those of the second half for the moment (from where codes and
    times are spelt, too).
    """
    shape, (cos, sin) = layout.shape, tables
    device, num_rows, num_visual = x.device, shape.num_rows, shape.num_visual
    offsets, moments, spells = spelt
    visible = layout.row_sees()[:, None]  # [rows, 1, visual tokens]

    _, k, _ = layer.project(x[:, :num_visual], None)
    k = rope.rotate(k, cos[:num_visual], sin[:num_visual]).float()
    prompt_end = torch.arange(num_rows, device=device) * shape.row_tokens + answer.long().argmax(-1) - 1
    row_end = (torch.arange(num_rows, device=device)[:, None] + 1) * shape.row_tokens - 1
    at = shape.rows_start + torch.minimum(prompt_end[..., None] + offsets, row_end)  # [B, rows, offsets]
    asking = x.gather(1, at.flatten(1)[..., None].expand(-1, -1, x.shape[-1]))
    q, _, _ = layer.project(asking, None)
    q = rope.rotate(q, cos[at].flatten(1, 2)[:, None], sin[at].flatten(1, 2)[:, None]).float()
    q = q.unflatten(2, (num_rows, len(offsets))) / q.shape[-1] ** 0.5
    group = q.shape[1] // k.shape[1]
    half = q.shape[1] // 2

    def attention(heads: slice, at: slice) -> Tensor:
        """Log attention [B, some heads, rows, some offsets, visual tokens]."""
        keys = k.repeat_interleave(group, 1)[:, heads]
        logits = (q[:, heads, :, at].flatten(2, 3) @ keys.mT).unflatten(2, (num_rows, -1))
        return logits.masked_fill(~visible, -1e4).log_softmax(-1)

    def miss(log: Tensor, span: Tensor, when: Tensor) -> Tensor:
        """The mean of -log(attention inside ``span`` [B, rows, n, 2]) where ``when`` [B, rows, n]."""
        token = torch.arange(num_visual, device=device)
        inside = (token >= span[..., :1]) & (token < span[..., 1:]) & visible
        when = when & inside.any(-1)
        loss = -log.masked_fill(~inside[:, None], -1e4).logsumexp(-1)
        return (loss * when[:, None]).sum() / (when.sum() * log.shape[1]).clamp(min=1)

    chunk_log = attention(slice(0, half), slice(0, 1))
    to_chunk = miss(chunk_log, chunk_spans, torch.ones_like(chunk_spans[..., 0], dtype=torch.bool))
    to_moment = miss(attention(slice(half, None), slice(None)), moment_spans[:, :, moments], spells[types])
    return to_chunk, to_moment


def spelling(device: torch.device) -> Spelling:
    """_SPELLING as tensors: offsets and moments [n], and bool [types and one more, n]."""
    spells = torch.zeros(len(TYPES) + 1, len(_SPELLING), dtype=torch.bool)
    for index, (_, names, _) in enumerate(_SPELLING):
        spells[[TYPES.index(name) for name in names], index] = True
    offsets, moments = (torch.tensor([row[part] for row in _SPELLING]) for part in (0, 2))
    return offsets.to(device), moments.to(device), spells.to(device)
