"""One request of the engine, seen from asyncio: deltas as they come, cancelled when nobody wants them any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from server.engine.engine import Engine
from server.engine.request import Delta, Outcome, Request

T = TypeVar("T")


class Answer:
    """A running request. Whoever starts one must call :meth:`cancel` in the end; after the final delta it is free."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._first: Delta | None = None
        self._ended = False

    async def start(self) -> None:
        """Submits the request. Raises what the engine refuses at once."""
        submitted = asyncio.ensure_future(asyncio.to_thread(self._engine.submit, self._request, self._on_delta))
        try:
            await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(self._on_submitted)
            raise

    async def wait_first(self, timeout_s: float) -> None:
        """Waits for the first delta, but no longer than ``timeout_s``. Raises the error that it may be."""
        with contextlib.suppress(TimeoutError):
            self._first = await asyncio.wait_for(self._deltas.get(), timeout_s)
        if self._first is not None and self._first.error is not None:
            self._ended = True
            raise self._first.error

    async def deltas(self, silence_s: float | None = None) -> AsyncIterator[Delta | None]:
        """All deltas, the last one with finish_reason and outcome, and None whenever none has come for ``silence_s``.
        Raises the engine's error otherwise."""
        while not self._ended:
            try:
                async with asyncio.timeout(silence_s):
                    delta, self._first = self._first or await self._deltas.get(), None
            except TimeoutError:
                yield None
                continue
            if delta.error is not None:
                self._ended = True
                raise delta.error
            self._ended = delta.final
            yield delta

    async def collect(self) -> tuple[str, Delta, Outcome]:
        """The whole text, the final delta and its outcome."""
        text = ""
        async for delta in self.deltas():
            if delta is None:
                continue
            text += delta.text
            if delta.outcome is not None:
                return text, delta, delta.outcome
        raise RuntimeError("the answer ended without an outcome")

    def cancel(self) -> None:
        """Frees the engine's slot, unless the request has ended."""
        if not self._ended:
            self._ended = True
            self._engine.cancel(self._request.id)

    def _on_submitted(self, submitted: asyncio.Future[None]) -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            self.cancel()

    def _on_delta(self, delta: Delta) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone, and so is the client
            self._loop.call_soon_threadsafe(self._deltas.put_nowait, delta)


async def unless_disconnected(request: HttpRequest, work: Awaitable[T]) -> T:
    """The result of ``work``. Raises ClientDisconnect, with ``work`` cancelled, if the client goes away first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
