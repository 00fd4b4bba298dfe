"""Asks a server about videos: its own files API, or ``file://`` URLs, which other servers take as well."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from server.bench.datasets.item import Item
from server.client import ServerError, check

_BUSY = (429, 503)
_TRIES = 6
_POLL_S = 0.25


@dataclass(frozen=True)
class Asking:
    """How videos are sampled and questions asked. ``dials`` is the request's ``x2l`` object."""

    fps: float | None = None
    max_frames: int | None = None
    max_tokens: int = 16
    dials: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """The answer, and the ``x2l`` object of this server (empty from others)."""

    text: str
    x2l: dict[str, Any]


class Asker:
    """One client for many threads. ``stop`` ends waiting."""

    def __init__(self, client: httpx.Client, model: str, asking: Asking, stop: threading.Event) -> None:
        self._client = client
        self._model = model
        self._asking = asking
        self._stop = stop

    @contextmanager
    def uploaded(self, video: Path) -> Iterator[dict[str, Any]]:
        """The message part for a video that is uploaded, prefilled once, and deleted in the end.

        Raises ServerError for a video that cannot be used, httpx.HTTPError, OSError.
        """
        sampling = {"fps": self._asking.fps, "max_frames": self._asking.max_frames}
        form = {name: str(value) for name, value in sampling.items() if value is not None}
        with video.open("rb") as file:
            sent = {"file": (video.name, file, "video/mp4")}
            record = check(self._client.post("/v1/files", data={"purpose": "user_data"} | form, files=sent)).json()
        path = f"/v1/files/{record['id']}"
        try:
            while record["status"] == "uploaded":
                if self._stop.wait(_POLL_S):
                    raise ServerError("the run was interrupted")
                record = check(self._client.get(path)).json()
            if record["status"] != "processed":
                raise ServerError(record["status_details"] or "the video could not be processed")
            yield {"type": "file", "file": {"file_id": record["id"]}}
        finally:
            with suppress(httpx.HTTPError):
                self._client.delete(path)

    def ask(self, item: Item, part: Mapping[str, Any]) -> Reply:
        """Asks and waits for the whole answer. Raises ServerError, httpx.HTTPError."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": [part, {"type": "text", "text": item.prompt}]}]
        if item.system:
            messages.insert(0, {"role": "system", "content": item.system})
        body: dict[str, Any] = {"model": self._model, "messages": messages, "temperature": 0}
        body["max_tokens"] = self._asking.max_tokens
        if self._asking.dials:
            body["x2l"] = dict(self._asking.dials)
        if part["type"] == "video_url":
            sampling = {"fps": self._asking.fps, "num_frames": self._asking.max_frames}
            given = {name: value for name, value in sampling.items() if value is not None}
            if given:
                body["media_io_kwargs"] = {"video": given}
        reply = check(self._post(body)).json()
        try:
            text = reply["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise ServerError("the reply is no chat completion") from None
        return Reply(text, reply.get("x2l") or {})

    def _post(self, body: Mapping[str, Any]) -> httpx.Response:
        for attempt in range(_TRIES):
            response = self._client.post("/v1/chat/completions", json=body)
            if response.status_code not in _BUSY or attempt == _TRIES - 1:
                break
            if self._stop.wait(_retry_after_s(response)):
                break
        return response


def local_url(video: Path, data: Path, media_root: Path) -> dict[str, Any]:
    """The message part for a video that the server reads itself, below the path by which it knows ``data``."""
    return {"type": "video_url", "video_url": {"url": (media_root / video.relative_to(data)).as_uri()}}


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return min(max(float(response.headers.get("retry-after", "1")), 0.1), 30.0)
    except ValueError:
        return 1.0
