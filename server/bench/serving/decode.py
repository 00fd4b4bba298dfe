"""Tokens a second of a fixed number of streams, and what of the time is not the model's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

from server.bench.serving.asker import Answer, Ask, Asker
from server.bench.serving.floor import Floor
from server.bench.serving.process import Served
from server.bench.serving.video import QUESTIONS, UploadedVideo
from server.client import ServerError

_BASE_TOKENS, _TOKENS_A_ROW = 192, 4
"""Of an answer: the first streams run on while the last ones are scored and read."""
_MOST_TOKENS = 2048
"""Where that does not do, on a slow machine, answers are longer, up to this."""
_LEAST_SHARE = 0.7
"""Of the window's passes that must have had all rows, for it to count."""


@dataclass(frozen=True)
class Window:
    """What happened between two looks at ``/metrics``, both while all streams were decoding."""

    wall_s: float
    forward_s: float
    http_cpu_s: float
    passes: float
    tokens: float


def measure_decode(
    served: Served,
    asker: Asker,
    videos: Sequence[UploadedVideo],
    batch: int,
    kv_tokens: int,
    repeats: int,
    floor: Floor,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """One row: ``batch`` streams over mixed caches of about ``kv_tokens`` each, or as many as a video has, their videos
    in turn, greedy. The tokens are counted from when all have their first until one is nearly done, as the server
    counts them (``x2l_generated_tokens``).

    ``engine_ms_per_token`` is the window's wall time, less that of the forward passes with their draws
    (``x2l_forward_seconds``), over its tokens: scheduling, metrics, waiting for the interpreter, and what is not done
    beside a pass of detokenizing and stop strings. Where steps are asked for ahead one is counted from the end of the
    one before: what is left is when the device had nothing to do, which may be nothing but the ends of the window.
    ``http_ms_per_token`` is the CPU time of the thread behind HTTP, also what of it ran beside a pass. So their sum may
    count a moment twice.
    """
    picked = pick(videos, kv_tokens)
    num_tokens = _BASE_TOKENS + _TOKENS_A_ROW * batch
    windows: list[Window] = []
    answers: list[Answer] = []
    while len(windows) < repeats:
        asks = [_ask(picked[place % len(picked)], place, kv_tokens, num_tokens) for place in range(batch)]
        window, answers = _run(served, asker, asks)
        if window is not None:
            windows.append(window)
            tick()
        elif (num_tokens := 2 * num_tokens) > _MOST_TOKENS:
            raise ServerError(f"{batch} streams over {kv_tokens} KV tokens were never all decoding: {_story(answers)}")
    num_videos = min(batch, len(picked))
    return {"videos": num_videos} | summarize(
        windows, batch, sum(answer.x2l["kv_tokens"]["mixed"] for answer in answers), floor
    )


def pick(videos: Sequence[UploadedVideo], kv_tokens: int) -> Sequence[UploadedVideo]:
    """Those whose caches can have about ``kv_tokens``; where none can, the one that comes nearest."""
    able = [video for video in videos if video.high_tokens <= kv_tokens <= video.low_tokens]
    return able or [min(videos, key=lambda video: abs(kv_tokens - _nearest(video, kv_tokens)))]


def _nearest(video: UploadedVideo, kv_tokens: int) -> int:
    return max(video.high_tokens, min(video.low_tokens, kv_tokens))


def summarize(windows: Sequence[Window], batch: int, kv_tokens: int, floor: Floor) -> dict[str, Any]:
    """Medians of several windows, in which all caches together had ``kv_tokens``."""

    def middle(figure: Callable[[Window], float], digits: int) -> float:
        return round(median(map(figure, windows)), digits)

    row: dict[str, Any] = {
        "batch": batch,
        "kv_tokens": round(kv_tokens / batch),
        "rows_in_a_pass": middle(lambda one: one.tokens / one.passes, 2),
        "tokens_per_s": middle(lambda one: one.tokens / one.wall_s, 1),
        "step_ms": middle(lambda one: 1000 * one.wall_s / one.passes, 3),
        "forward_ms": middle(lambda one: 1000 * one.forward_s / one.passes, 3),
        "engine_ms_per_token": middle(lambda one: 1000 * (one.wall_s - one.forward_s) / one.tokens, 4),
        "http_ms_per_token": middle(lambda one: 1000 * one.http_cpu_s / one.tokens, 4),
        "overhead_ms_per_token": middle(
            lambda one: 1000 * (one.wall_s - one.forward_s + one.http_cpu_s) / one.tokens, 4
        ),
        "floor_ms": round(1000 * floor.step_s(kv_tokens), 3),
    }
    row["full"] = row["rows_in_a_pass"] >= _LEAST_SHARE * batch
    row["of_floor"] = round(row["floor_ms"] / row["step_ms"], 3)
    return row


def _story(answers: Sequence[Answer]) -> str:
    """When the streams began and ended."""
    begins_s, ends_s = [answer.ttft_s for answer in answers], [answer.took_s for answer in answers]
    silent = sum(answer.num_texts == 0 for answer in answers)
    return (
        f"of answers of {min(answer.num_tokens for answer in answers)} tokens or more the last one's text began after "
        f"{max(begins_s):.2f} s and the first one ended after {min(ends_s):.2f} s; {silent} had no text"
    )


def _ask(video: UploadedVideo, number: int, kv_tokens: int, max_tokens: int) -> Ask:
    budget = {"budget_tokens": _nearest(video, kv_tokens)}
    dial: Mapping[str, Any] = budget if kv_tokens < video.low_tokens else {"mode": "low"}
    return Ask(video.file_id, QUESTIONS[number % len(QUESTIONS)], max_tokens, dial)


def _run(served: Served, asker: Asker, asks: Sequence[Ask]) -> tuple[Window | None, list[Answer]]:
    """No window where the first answer was nearly done before the last had begun."""
    changed = threading.Condition()
    events = [0] * len(asks)
    last = asks[0].max_tokens * 3 // 4

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

    def look() -> tuple[float, float, Mapping[str, float]]:
        return time.perf_counter(), served.http_cpu_s, asker.counts()

    futures: list[Future[Answer]] = []
    pool = ThreadPoolExecutor(len(asks))
    try:
        futures += [pool.submit(stream, place) for place in range(len(asks))]
        wait(lambda: all(events))
        begun = all(events)
        begin_s, begin_cpu_s, before = look()
        wait(lambda: max(events) >= last)
        end_s, end_cpu_s, after = look()
        answers = [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

    def grown(name: str) -> float:
        return sum(value - before.get(key, 0.0) for key, value in after.items() if key.startswith(name))

    passes, tokens = grown("x2l_forward_seconds_count"), grown("x2l_generated_tokens_total")
    if not begun or not passes or not tokens:
        return None, answers
    window = Window(end_s - begin_s, grown("x2l_forward_seconds_sum"), end_cpu_s - begin_cpu_s, passes, tokens)
    return window, answers
