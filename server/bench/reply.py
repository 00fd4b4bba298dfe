"""What came of one question put to a model or a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PHASES = ("score", "reload", "prefill", "decode")
MAX_TOKENS = 64
"""Of an answer: a synthetic question's longest has about 20."""


OWN = "x2l"
"""What this server says that its models are owned by."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, or the ``error`` that came instead.

    ``kv_tokens`` and ``kv_nbytes`` are those of the cache that the answer was drawn from, prefix included and question
    excluded (0 where a server tells nothing); ``reload_nbytes`` of it were read for this question. ``reloaded`` chunks
    are best first, ``spans_s`` their times. ``scores`` has one a chunk, or nothing where no scores chose. ``times_ms``
    is by phase.
    """

    text: str = ""
    error: str | None = None
    kv_tokens: int = 0
    kv_nbytes: int = 0
    reload_nbytes: int = 0
    reloaded: tuple[int, ...] = ()
    spans_s: tuple[tuple[float, float], ...] = ()
    scores: tuple[float, ...] = ()
    times_ms: Mapping[str, float] = field(default_factory=dict)
