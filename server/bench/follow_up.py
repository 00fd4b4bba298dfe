"""Time to the first token of a question, by where the video's KVs are when it comes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import openai

from server.app import open_backend
from server.config import load_settings
from server.serving import running

_TIMEOUT_S = 600.0


def measure_follow_up(
    url: str, video: Path, questions: Sequence[str], repeats: int, *, restart: bool
) -> dict[str, Any]:
    """Medians in ms over a live server, the bundled model and the store at ``url``, seen by the client.

    ``cold`` is from the first byte uploaded to the first token: everything is decoded and prefilled. ``reloaded`` is a
    follow-up with the default re-load: H-KVs on the device, L-KVs from the store, which no host memory stands before,
    and of which none stay on a GPU or come there ahead.
    ``resident`` is one with nothing re-loaded. ``after_restart`` is the first question to a new server on that store,
    which loads the H-KVs from it as well; it goes without for stores that end with their server.
    """
    nothing_kept = {"store_cache_bytes": 0, "gpu_low_kv_budget": 0, "gpu_prefetch_budget": 0}
    settings = load_settings(store=url, port=0, api_key=(), log_level="warning", **nothing_kept)
    with running(settings, open_backend(settings)) as address, _client(address) as client:
        begin_s = time.perf_counter()
        file = client.files.create(file=video, purpose="user_data")
        _ask(client, file.id, questions[0], {})
        cold_ms = (time.perf_counter() - begin_s) * 1000
        dials: tuple[dict[str, Any], ...] = ({}, {"reload": 0})
        taken: list[list[float]] = [[], []]
        reload_ms: list[float] = []
        for turn in range(-1, repeats):  # the first one warms up
            for dial, times in zip(dials, taken, strict=True):
                ms, x2l = _ask(client, file.id, questions[turn % len(questions)], dial)
                if turn >= 0:
                    times.append(ms)
                    if not dial:
                        reload_ms.append(x2l["timings_ms"]["reload"])
    result = {
        "cold_ms": round(cold_ms, 1),
        "reloaded_ms": round(median(taken[0]), 1),
        "resident_ms": round(median(taken[1]), 1),
        "reload_ms": round(median(reload_ms), 2),
    }
    if restart:
        with running(settings, open_backend(settings)) as address, _client(address) as client:
            result["after_restart_ms"] = round(_ask(client, file.id, questions[0], {})[0], 1)
            client.files.delete(file.id)
    return result


def _client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=_TIMEOUT_S)


def _ask(client: openai.OpenAI, file_id: str, question: str, dial: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Milliseconds to the first piece of content, and the response's ``x2l`` object."""
    begin_s = time.perf_counter()
    first_s = None
    x2l: dict[str, Any] = {}
    content = [{"type": "file", "file": {"file_id": file_id}}, {"type": "text", "text": question}]
    request: dict[str, Any] = {"model": "x2l-tiny", "messages": [{"role": "user", "content": content}]}
    with client.chat.completions.create(stream=True, extra_body={"x2l": dial} if dial else {}, **request) as stream:
        for event in stream:
            if first_s is None and event.choices and event.choices[0].delta.content:
                first_s = time.perf_counter()
            x2l = (event.model_extra or {}).get("x2l") or x2l
    if first_s is None or x2l["degraded"]:
        raise RuntimeError(f"no proper answer to {question!r}")
    return (first_s - begin_s) * 1000, x2l
