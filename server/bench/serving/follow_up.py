"""Time to the first token of a follow-up question, by where its L-KVs are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

from kvstore.base import Tier
from server.bench.serving.asker import Answer, Ask, Asker
from server.bench.serving.floor import Floor
from server.bench.serving.video import UploadedVideo
from server.client import ServerError

MAX_TOKENS = 4
_FEWER = 0.8
"""Of the chunks, tried next where so many do not fit the model."""


def measure_follow_up(
    asker: Asker,
    video: UploadedVideo,
    tier: Tier,
    repeats: int,
    *,
    floor: Floor | None,
    pace: float | None,
    before: Callable[[], None] = lambda: None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One row: medians of ``repeats`` questions with the default re-load, each followed by one that re-loads all
    L-KVs (as many as fit the model). ``before`` is called before each of them.

    ``from_tier`` is the share of the bytes that came from ``tier``, as ``/metrics`` counts them. L-KVs that are to be
    on the device are brought there by asking each question twice.
    """
    num_whole = _most_chunks(asker, video)
    whole_dial = {"mode": "low"} if num_whole == video.facts["num_chunks"] else {"chunks": [*range(num_whole)]}
    top, whole = [], []
    texts = itertools.islice(itertools.cycle(video.questions), repeats + 1)
    counted = asker.counts()
    for turn, text in enumerate(texts):  # the first one warms up
        if turn == 1:
            counted = asker.counts()
        for taken, dial in ((top, None), (whole, whole_dial)):
            one = Ask(video.file_id, text, MAX_TOKENS, dial)
            if tier == "device" and dial is None:
                asker.ask(one)
            before()
            taken.append(asker.ask(one))
        tick()
    now = asker.counts()
    nbytes = {
        name.split('"')[1]: now[name] - counted.get(name, 0.0) for name in now if name.startswith("x2l_reload_bytes")
    }
    top, whole = top[1:], whole[1:]
    ttft_ms = [1000 * answer.ttft_s for answer in top]
    p50 = median(ttft_ms)
    row: dict[str, Any] = {
        "tier": tier,
        "from_tier": round(nbytes.get(tier, 0.0) / max(1.0, sum(nbytes.values())), 3),
        "ttft_ms_p50": round(p50, 1),
        "ttft_ms_p95": round(quantiles(ttft_ms, n=20, method="inclusive")[18], 1) if repeats > 1 else round(p50, 1),
        "server_ms_p50": _phases(top),
        "reload_bytes": round(median(answer.x2l["reload_bytes"] for answer in top)),
        "kv_tokens": dict(top[-1].x2l["kv_tokens"]),
        "whole_low_ttft_ms_p50": round(median(1000 * answer.ttft_s for answer in whole), 1),
        "whole_low_chunks": [num_whole, video.facts["num_chunks"]],
        "prefill_s": round(video.facts["prefill_s"], 2),
    }
    row["prefill_over_ttft"] = round(1000 * row["prefill_s"] / p50, 1)
    row["whole_low_over_ttft"] = round(row["whole_low_ttft_ms_p50"] / p50, 2)
    if floor is not None:
        tokens = row["kv_tokens"]
        row["floor_ms"] = round(
            1000 * floor.first_token_s(tokens["high"], tokens["mixed"], row["reload_bytes"], pace), 2
        )
        row["over_floor"] = round(p50 / row["floor_ms"], 2)
    return row


def _most_chunks(asker: Asker, video: UploadedVideo) -> int:
    """How many chunks can be re-loaded at a time: all, unless the model has too few positions. Raises ServerError."""
    number = int(video.facts["num_chunks"])
    while True:
        try:
            asker.ask(Ask(video.file_id, video.questions[0], MAX_TOKENS, {"chunks": [*range(number)]}))
            return number
        except ServerError as error:
            if "maximum context length" not in str(error) or number <= 1:
                raise
            number = int(number * _FEWER)


def _phases(answers: list[Answer]) -> dict[str, float]:
    names = ("score", "reload", "prefill")
    return {name: round(median(answer.x2l["timings_ms"][name] for answer in answers), 2) for name in names}
