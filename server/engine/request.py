"""What goes into the engine and what comes out: plain values, no HTTP and no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compression.select import Dial
from server.models.base import Turn

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is drawn. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 leave all tokens in.

    ``max_tokens`` None means as many as fit the model, below the engine's ceiling. ``seed`` None draws a fresh one.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One question. ``file_id`` None is a text-only question; ``generate`` False asks for the relevance alone."""

    id: str
    turns: tuple[Turn, ...]
    params: SamplingParams
    file_id: str | None
    tenant: str
    dial: Dial
    generate: bool = True


@dataclass(frozen=True, slots=True)
class Evidence:
    """A chunk that was re-loaded, with its relevance score."""

    chunk: int
    start_s: float
    end_s: float
    score: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of a request once it has ended well.

    ``mixed_tokens``, ``low_tokens`` and ``high_tokens`` are the KV tokens of the cache that was used, of the all-L and
    of the all-H cache, each with the prefix. ``selection`` holds the chosen chunks and ``evidence`` the same with
    their times, best first. ``degraded`` tells that an H-KV stood in for an L-KV that could not be read.
    ``prompt_tokens`` counts the mixed cache and the prompt, ``cached_tokens`` the part that was not recomputed.
    """

    file_id: str | None
    evidence: tuple[Evidence, ...]
    scores: tuple[float, ...]
    selection: tuple[int, ...]
    mixed_tokens: int
    low_tokens: int
    high_tokens: int
    degraded: bool
    score_ms: float
    reload_ms: float
    prefill_ms: float
    decode_ms: float
    reload_nbytes: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """A step of an answer. Exactly one is final: it has ``finish_reason`` and ``outcome``, or it has ``error``."""

    text: str = ""
    finish_reason: FinishReason | None = None
    outcome: Outcome | None = None
    error: Exception | None = None

    @property
    def final(self) -> bool:
        return self.finish_reason is not None or self.error is not None
