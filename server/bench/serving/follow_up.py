"""Time to the first token of a follow-up question, by where its L-KVs are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

from kvstore.base import Tier
from server.bench.serving.asker import Answer, Ask, Asker
from server.bench.serving.floor import Floor
from server.bench.serving.video import QUESTIONS, UploadedVideo
from server.client import ServerError

MAX_TOKENS = 4
_RELOAD = 3
_FEWER = 0.8
"""Of the chunks, tried next where so many do not fit the model."""


def measure_follow_up(
    asker: Asker,
    video: UploadedVideo,
    tier: Tier,
    repeats: int,
    floor: Floor,
    pace: float | None,
    before: Callable[[], None],
    tick: Callable[[], None],
) -> dict[str, Any]:
    """One row: medians of ``repeats`` questions that re-load three chunks, each followed by one that re-loads all L-KVs
    (as many as fit the model, and then ``whole_low_ms`` is scaled to all). ``before`` is called before each of them.
    ``pace`` is that of the slowest part of the L-KVs' way, in bytes a second.

    ``from_tier`` is the share of the bytes that came from ``tier``, as ``/metrics`` counts them. L-KVs that are to be
    on the device are brought there by asking each question twice.
    """
    num_whole, num_chunks = _most_chunks(asker, video), int(video.facts["num_chunks"])
    top: list[Answer] = []
    whole: list[Answer] = []
    counted = asker.counts()
    for turn, text in enumerate(itertools.islice(itertools.cycle(QUESTIONS), repeats + 1)):
        if turn == 1:  # the first one has warmed up
            counted = asker.counts()
        for taken, dial in ((top, {"reload": _RELOAD}), (whole, _first(num_whole))):
            one = Ask(video.file_id, text, MAX_TOKENS, dial)
            if tier == "device" and taken is top:
                asker.ask(one)
            before()
            taken.append(asker.ask(one))
        tick()
    now = asker.counts()
    nbytes = {
        name.split('"')[1]: now[name] - counted.get(name, 0.0) for name in now if name.startswith("x2l_reload_bytes")
    }
    return summarize(top[1:], whole[1:], num_whole / num_chunks, float(video.facts["prefill_s"]), floor, pace) | {
        "tier": tier,
        "from_tier": round(nbytes.get(tier, 0.0) / max(1.0, sum(nbytes.values())), 3),
        "whole_low_chunks": [num_whole, num_chunks],
    }


def summarize(
    top: Sequence[Answer],
    whole: Sequence[Answer],
    share: float,
    prefill_s: float,
    floor: Floor,
    pace: float | None,
) -> dict[str, Any]:
    """Medians. ``share`` of all chunks were re-loaded for ``whole``: what their re-load took is scaled to all."""
    ttft_ms = [1000 * answer.ttft_s for answer in top]
    p50, tokens = median(ttft_ms), top[-1].x2l["kv_tokens"]
    reload_nbytes = round(median(answer.x2l["reload_bytes"] for answer in top))
    whole_ms = median(1000 * answer.ttft_s + answer.x2l["timings_ms"]["reload"] * (1 / share - 1) for answer in whole)
    floor_ms = 1000 * floor.first_token_s(tokens["high"], tokens["mixed"], reload_nbytes, pace)
    return {
        "ttft_ms_p50": round(p50, 1),
        "ttft_ms_p95": round(quantiles(ttft_ms, n=20, method="inclusive")[18], 1) if len(top) > 1 else round(p50, 1),
        "server_ms_p50": {
            name: round(median(answer.x2l["timings_ms"][name] for answer in top), 2)
            for name in ("score", "reload", "prefill")
        },
        "reload_bytes": reload_nbytes,
        "kv_tokens": dict(tokens),
        "floor_ms": round(floor_ms, 2),
        "over_floor": round(p50 / floor_ms, 2),
        "prefill_s": round(prefill_s, 2),
        "prefill_over_ttft": round(1000 * prefill_s / p50, 1),
        "whole_low_ms": round(whole_ms, 1),
        "whole_low_over_ttft": round(whole_ms / p50, 2),
    }


def _first(num_chunks: int) -> dict[str, Any]:
    return {"chunks": list(range(num_chunks))}


def _most_chunks(asker: Asker, video: UploadedVideo) -> int:
    """How many chunks can be re-loaded at a time: all, unless the model has too few positions. Raises ServerError."""
    number = int(video.facts["num_chunks"])
    while True:
        try:
            asker.ask(Ask(video.file_id, QUESTIONS[0], MAX_TOKENS, _first(number)))
            return number
        except ServerError as error:
            if "maximum context length" not in str(error) or number <= 1:
                raise
            number = int(number * _FEWER)
