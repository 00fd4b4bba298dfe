"""What goes into the engine and what comes out: plain values (but for images, as the model takes them), no HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from compression.select import Dial
from server.models.base import Turn

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is drawn. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 leave all tokens in.

    ``max_tokens`` None means as many as fit the model, below the engine's ceiling. ``seed`` None draws a fresh one.
    With ``ignore_eos`` only ``max_tokens`` and ``stop`` end it, which is for measurements.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One question about the videos in ``file_ids``, in this order; without any it is a text-only question.

    ``images`` are what :meth:`VideoModel.preprocess_image` makes of them; the model sees them behind the videos and
    before the turns. ``generate`` False asks for the relevance alone. A dial's ``chunks`` are numbered
    through all videos, its times are those of each video.
    """

    id: str
    turns: tuple[Turn, ...]
    params: SamplingParams
    file_ids: tuple[str, ...]
    tenant: str
    dial: Dial
    generate: bool = True
    images: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """A chunk that was re-loaded, with its relevance score. ``chunk`` is its index in its own file."""

    file_id: str
    chunk: int
    start_s: float
    end_s: float
    score: float


@dataclass(frozen=True, slots=True)
class FileChunks:
    """A file that was asked about, and how many of the scores are its chunks'."""

    file_id: str
    num_chunks: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of a request once it has ended well.

    ``files`` are those asked about, in their order in the cache. ``scores`` has one a chunk of all of them, in that
    order, and ``selection`` the chosen places in it; ``evidence`` tells the same with files and times, best first.
    ``mixed_tokens``, ``low_tokens`` and ``high_tokens`` are the KV tokens of the cache that was used, of the all-L and
    of the all-H cache, each with the prefix. ``degraded`` tells that an H-KV stood in for an L-KV that could not be
    read. ``prompt_tokens`` counts the mixed cache, images and prompt, ``cached_tokens`` the part not recomputed.
    """

    files: tuple[FileChunks, ...]
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
