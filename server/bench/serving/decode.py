"""Tokens a second of a fixed number of streams, and what of the time is not the model's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

from server.bench.serving.asker import Answer, Ask, Asker
from server.bench.serving.floor import Floor
from server.bench.serving.video import UploadedVideo
from server.client import ServerError

_BASE_TOKENS, _TOKENS_A_ROW = 192, 8
"""Of an answer: the first streams run on while the last ones are scored and read."""
_LEAST_SHARE = 0.7
"""Of the window's passes that must have had all rows, for it to count."""


@dataclass(frozen=True)
class _Window:
    """What happened between two looks at ``/metrics``, both while all streams were decoding."""

    wall_s: float
    forward_s: float
    passes: float
    tokens: float


def measure_decode(
    asker: Asker,
    videos: Sequence[UploadedVideo],
    batch: int,
    repeats: int,
    *,
    floor: Floor | None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One row: ``batch`` streams, their videos in turn, greedy. From when all have their first token until one is
    nearly done the tokens are counted, as the server counts them (``x2l_generated_tokens``).

    ``overhead_ms_per_token``: the window's wall time, less that of the forward passes with their draws
    (``x2l_forward_seconds``), over its tokens. It holds all else that a token waits for: scheduling, detokenizing,
    stop strings, metrics, and whatever the HTTP side takes of the interpreter between two passes. What the HTTP side
    takes during a pass lengthens the pass and is not in it.
    """
    max_tokens = _BASE_TOKENS + _TOKENS_A_ROW * batch
    windows, answers = [], []
    for turn in range(repeats):
        picked = [videos[(turn + place) % len(videos)] for place in range(batch)]
        asks = [
            Ask(video.file_id, video.questions[(turn + place) % len(video.questions)], max_tokens)
            for place, video in enumerate(picked)
        ]
        window, answers = _run(asker, asks)
        windows.append(window)
        tick()
    kv_tokens = sum(answer.x2l["kv_tokens"]["mixed"] for answer in answers)
    step_ms = median(1000 * one.wall_s / one.passes for one in windows)
    row: dict[str, Any] = {
        "batch": batch,
        "kv_tokens": round(kv_tokens / batch),
        "rows_in_a_pass": round(median(one.tokens / one.passes for one in windows), 2),
        "tokens_per_s": round(median(one.tokens / one.wall_s for one in windows), 1),
        "step_ms": round(step_ms, 3),
        "forward_ms": round(median(1000 * one.forward_s / one.passes for one in windows), 3),
        "overhead_ms_per_token": round(median(1000 * (one.wall_s - one.forward_s) / one.tokens for one in windows), 4),
        "steps_in_window": round(median(one.passes for one in windows)),
    }
    row["full"] = row["rows_in_a_pass"] >= _LEAST_SHARE * batch
    if floor is not None:
        row["floor_ms"] = round(1000 * floor.step_s(kv_tokens), 3)
        row["of_floor"] = round(row["floor_ms"] / step_ms, 3)
    return row


def _run(asker: Asker, asks: Sequence[Ask]) -> tuple[_Window, list[Answer]]:
    changed = threading.Condition()
    events = [0] * len(asks)

    def stream(place: int) -> Answer:
        def on_event() -> None:
            events[place] += 1
            if events[place] in (1, last):  # not at every token: this process must not be what is measured
                with changed:
                    changed.notify()

        return asker.ask(asks[place], on_event)

    def wait(reached: Callable[[], bool]) -> None:
        with changed:
            while not (reached() or any(future.done() for future in futures)):
                changed.wait(0.05)

    last = asks[0].max_tokens * 3 // 4
    futures: list[Future[Answer]] = []
    pool = ThreadPoolExecutor(len(asks))
    try:
        futures += [pool.submit(stream, place) for place in range(len(asks))]
        wait(lambda: all(events))
        before_s, before = time.perf_counter(), asker.counts()
        wait(lambda: max(events) >= last)
        wall_s, after = time.perf_counter() - before_s, asker.counts()
        answers = [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

    def grown(name: str) -> float:
        return sum(value - before.get(key, 0.0) for key, value in after.items() if key.startswith(name))

    passes = grown("x2l_forward_seconds_count")
    if not passes:
        raise ServerError(f"{len(asks)} streams were never all decoding: their answers are too short")
    window = _Window(wall_s, grown("x2l_forward_seconds_sum"), passes, grown("x2l_generated_tokens_total"))
    return window, answers
