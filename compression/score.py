"""Training-free relevance scores of chunks, from the question and the H-KVs alone (Video-X2L, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from compression.rope import Rope


@dataclass(frozen=True, slots=True)
class QueryTrace:
    """The question's queries in the first ``layers`` layers of a forward pass over prefix and H-KVs.

    ``queries`` is ``[layers, heads, tokens, head_dim]`` before RoPE; the first token stands at position ``start``.
    The last ``num_asking`` tokens are those that look for the answer: the prompt's last one, and the tokens of a draft
    of the answer where one stands behind it.
    """

    queries: Tensor
    start: int
    num_asking: int = 1


class Scorer(Protocol):
    """Scores every chunk of a video against a question; higher is more relevant."""

    @property
    def num_layers(self) -> int | None:
        """Layers whose queries are needed (the forward pass stops behind them); None means all."""

    @property
    def reads_chunks(self) -> bool:
        """Whether it looks at ``high``; the cache is enough for the others."""

    def score(self, trace: QueryTrace, cache: MixedCache, high: Sequence[ChunkKV], rope: Rope) -> Tensor:
        """``cache`` is prefix and all H-KVs, ``high`` the same H-KVs before RoPE (unless :attr:`reads_chunks` is False,
        none at all) -> float32 [chunks]."""


@dataclass(frozen=True, slots=True)
class AttentionScorer:
    """Softmax mass that the prompt's last token puts on a chunk's visual H-KVs, averaged over heads.

    ``heads`` are (layer, head) pairs; None takes all. The last token has read the whole question, so it is where a
    causal model looks for the answer; averaging over all question tokens is much worse. Where a draft of the answer is
    read along, a chunk's score is its best from any of the asking tokens: a question about two things looks for the
    second one only while it answers. With ``per_token`` a chunk's mass is averaged over its tokens too: under
    Video-X2L's edge rule the first and the last chunk have many more of them than the others, and would always win.
    """

    heads: tuple[tuple[int, int], ...] | None = None
    per_token: bool = False

    @property
    def num_layers(self) -> int | None:
        return None if self.heads is None else 1 + max(layer for layer, _ in self.heads)

    @property
    def reads_chunks(self) -> bool:
        return False

    def score(self, trace: QueryTrace, cache: MixedCache, high: Sequence[ChunkKV], rope: Rope) -> Tensor:
        layers, heads, tokens, head_dim = trace.queries.shape
        asking = trace.queries[:, :, -trace.num_asking :]
        positions = trace.start + torch.arange(tokens - trace.num_asking, tokens, device=asking.device)
        by_segment = []
        for segment in cache.segments:
            rotated = rope.rotate(asking, *rope.tables(positions - segment.offset, asking.dtype))
            keys = segment.keys[:layers]
            # Query heads that share keys are taken together: keys repeated for each would be gigabytes in a large
            # model.
            grouped = rotated.reshape(layers, keys.shape[1], -1, head_dim)
            by_segment.append((grouped @ keys.transpose(-1, -2)).reshape(layers, heads, trace.num_asking, -1))
        logits = torch.cat(by_segment, dim=-1)
        mass = _sum_spans((logits.float() / head_dim**0.5).softmax(-1), cache.spans)  # [layers, heads, asking, chunks]
        if self.per_token:
            sizes = [max(stop - start, 1) for start, stop in cache.spans]
            mass = mass / torch.tensor(sizes, device=mass.device)
        if self.heads is None:
            return mass.mean((0, 1)).amax(0)
        index = torch.tensor(self.heads, device=mass.device)
        return mass[index[:, 0], index[:, 1]].mean(0).amax(0)


@dataclass(frozen=True, slots=True)
class CosineScorer:
    """Cosine of the question's mean query and a chunk's mean key, both before RoPE, over ``temperature``.

    Averaged over layers 1 and up (in layer 0 all VSTs of a Video-XL model share one key) and over heads.
    """

    temperature: float = 0.04

    @property
    def num_layers(self) -> int | None:
        return None

    @property
    def reads_chunks(self) -> bool:
        return True

    def score(self, trace: QueryTrace, cache: MixedCache, high: Sequence[ChunkKV], rope: Rope) -> Tensor:
        query = trace.queries[1:].mean(2).float()
        # A short chunk may have no VST: its sum is 0, and so is its cosine.
        sizes = [chunk.num_tokens - chunk.num_others for chunk in high]
        sums = [chunk.keys[1:, :, :size].sum(2) / max(size, 1) for chunk, size in zip(high, sizes, strict=True)]
        keys = torch.stack(sums, dim=2).float()
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
        cosine = torch.nn.functional.cosine_similarity(query[:, :, None], keys, dim=-1)
        return cosine.mean((0, 1)) / self.temperature


def _sum_spans(mass: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Sums the last dimension over token ranges -> [..., len(spans)]."""
    total = torch.nn.functional.pad(mass.double().cumsum(-1), (1, 0))
    bounds = torch.tensor(spans, device=mass.device).reshape(-1, 2)
    return (total[..., bounds[:, 1]] - total[..., bounds[:, 0]]).float()
