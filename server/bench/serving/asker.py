"""Questions to a server of ours through HTTP, timed, and what its ``/metrics`` counts meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from server.client import ServerError, check, connect, event_stream


@dataclass(frozen=True)
class Ask:
    """A question of ``max_tokens`` tokens: the end token does not end its answer."""

    file_id: str
    text: str
    max_tokens: int
    dial: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """Seconds to the first piece of text and to the end as the client saw them; how many tokens and pieces of text
    came; the response's ``x2l`` object."""

    ttft_s: float
    took_s: float
    num_tokens: int
    num_texts: int
    x2l: Mapping[str, Any]


class Asker:
    """A client of a server with one model. Streams are plain server-sent events: a heavier client would be what is
    measured where many of them run. May be used from many threads."""

    def __init__(self, base_url: str) -> None:
        """Raises ServerError, httpx.HTTPError."""
        self.client = connect(base_url, "")
        self._model = check(self.client.get("/v1/models")).json()["data"][0]["id"]

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.client.close()

    def ask(self, one: Ask, on_event: Callable[[], None] = lambda: None) -> Answer:
        """Asks, greedily. Calls ``on_event`` at every piece of text. Raises ServerError, httpx.HTTPError."""
        content = [{"type": "file", "file": {"file_id": one.file_id}}, {"type": "text", "text": one.text}]
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": one.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"x2l": dict(one.dial)} if one.dial else {}),
        }
        begin_s = time.perf_counter()
        first_s: float | None = None
        x2l: Mapping[str, Any] = {}
        num_tokens = num_texts = 0
        with event_stream(self.client, "POST", "/v1/chat/completions", json=body) as events:
            for event in events:
                if event["choices"]:
                    if event["choices"][0]["delta"].get("content"):
                        first_s = first_s or time.perf_counter()
                        num_texts += 1
                        on_event()
                    x2l = event.get("x2l") or x2l
                elif event.get("usage"):
                    num_tokens = event["usage"]["completion_tokens"]
        end_s = time.perf_counter()
        if not x2l or x2l["degraded"]:
            raise ServerError(f"no proper answer to {one.text!r}")
        return Answer((first_s or end_s) - begin_s, end_s - begin_s, num_tokens, num_texts, x2l)

    def ask_all(self, asks: Sequence[Ask]) -> list[Answer | Exception]:
        """All at once, a thread each."""

        def attempt(one: Ask) -> Answer | Exception:
            try:
                return self.ask(one)
            except (ServerError, httpx.HTTPError) as error:
                return error

        pool = ThreadPoolExecutor(len(asks))
        try:
            return list(pool.map(attempt, asks))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for answers

    def counts(self) -> dict[str, float]:
        """``/metrics``, by name with labels as it writes them."""
        lines = check(self.client.get("/metrics")).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}
