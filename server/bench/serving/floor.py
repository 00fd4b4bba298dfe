"""The least time that bytes and operations allow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.bench.serving.hardware import Paces

_PASSES = 2
"""Over the weights before a first token: the question is read over the H-KVs, for its scores, and over the mixed
cache."""


@dataclass(frozen=True)
class Floor:
    """Of a model whose step reads ``weight_nbytes`` and whose KV token takes ``token_nbytes``."""

    paces: Paces
    weight_nbytes: int
    token_nbytes: int

    def step_s(self, kv_tokens: int) -> float:
        """Of a step of all rows together, with so many KV tokens in their caches: weights and KVs are read once, at
        the pace of a copy."""
        return (self.weight_nbytes + kv_tokens * self.token_nbytes) / self.paces.copy

    def first_token_s(self, high_tokens: int, mixed_tokens: int, reload_nbytes: int, pace: float | None) -> float:
        """Of a follow-up question: both passes, and its L-KVs at the slowest ``pace`` on their way (None: they are
        where they are needed)."""
        read = _PASSES * self.weight_nbytes + (high_tokens + mixed_tokens) * self.token_nbytes
        return read / self.paces.copy + (reload_nbytes / pace if pace else 0.0)

    def load_s(self, sizes: Iterable[tuple[int, int]], num_tokens: int) -> float:
        """Of answers of ``num_tokens`` each that are all asked for at once: question after question is read, then all
        are decoded together. ``sizes`` are the KV tokens of each one's H-only and mixed cache. What they re-load comes
        beside that, if it comes early enough."""
        pairs = list(sizes)
        first_s = sum(self.first_token_s(high, mixed, 0, None) for high, mixed in pairs)
        return first_s + (num_tokens - 1) * self.step_s(sum(mixed for _, mixed in pairs))
