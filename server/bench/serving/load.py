"""Many questions at once, against some of them one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

from server.bench.serving.asker import Answer, Ask, Asker
from server.bench.serving.floor import Floor
from server.bench.serving.video import QUESTIONS, UploadedVideo

MAX_TOKENS = 64


def measure_load(
    asker: Asker,
    videos: Sequence[UploadedVideo],
    num_questions: int,
    repeats: int,
    floor: Floor,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """One row: questions of 64 tokens, their videos in turn, all at once; against one a video, one at a time. Medians
    over ``repeats`` of both, which take turns."""
    asks = [
        Ask(videos[place % len(videos)].file_id, QUESTIONS[place // len(videos) % len(QUESTIONS)], MAX_TOKENS)
        for place in range(num_questions)
    ]
    alone: list[float] = []
    at_once: list[float] = []
    p50s: list[float] = []
    p99s: list[float] = []
    floors_s: list[float] = []
    failures: list[str] = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        tokens = sum(asker.ask(one).num_tokens for one in asks[: len(videos)])
        alone.append(tokens / (time.perf_counter() - begin_s))
        tick()
        begin_s = time.perf_counter()
        replies = asker.ask_all(asks)
        took_s = time.perf_counter() - begin_s
        answers = [reply for reply in replies if isinstance(reply, Answer)]
        failures += [str(reply) or type(reply).__name__ for reply in replies if isinstance(reply, Exception)]
        at_once.append(sum(answer.num_tokens for answer in answers) / took_s)
        sizes = [answer.x2l["kv_tokens"] for answer in answers]
        floors_s.append(floor.load_s([(one["high"], one["mixed"]) for one in sizes], MAX_TOKENS))
        if len(answers) > 1:
            cuts = quantiles([1000 * answer.ttft_s for answer in answers], n=100, method="inclusive")
            p50s.append(cuts[49])
            p99s.append(cuts[98])
        tick()
    p50, p99 = median(p50s or [0.0]), median(p99s or [0.0])
    return {
        "questions": num_questions,
        "videos": len(videos),
        "failures": len(failures),
        "first_failures": failures[:3],
        "tokens_per_s_alone": round(median(alone), 1),
        "tokens_per_s": round(median(at_once), 1),
        "floor_tokens_per_s": round(num_questions * MAX_TOKENS / median(floors_s), 1),
        "over_alone": round(median(many / one for many, one in zip(at_once, alone, strict=True)), 2),
        "ttft_ms_p50": round(p50, 1),
        "ttft_ms_p99": round(p99, 1),
        "p99_over_p50": round(p99 / p50, 2) if p50 else None,
    }
