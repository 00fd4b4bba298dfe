"""Server-sent events: framing, keep-alive comments, and a response that notices when nobody listens any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"


# JSON leaves these as they are, but many clients take them for ends of a line.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def event(data: Any) -> bytes:
    """One event; ``data`` goes as one line of JSON."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return b"data: " + text.encode() + b"\n\n"


async def with_keep_alive(events: AsyncIterator[bytes], every_s: float) -> AsyncIterator[bytes]:
    """``events``, with a comment after every ``every_s`` seconds of silence. It costs a task an event."""
    following: asyncio.Future[bytes] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({following}, timeout=every_s)
            if not done:
                yield COMMENT
                continue
            try:
                data = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield data
    finally:
        if following is not None:
            following.cancel()


class EventStream(StreamingResponse):
    """A stream of events. ``on_close`` is called once it is over, however it ends, even before the first event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], *, on_close: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            events,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},  # the latter is for nginx
        )
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()
