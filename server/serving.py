"""Runs the application under uvicorn, in the foreground or on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.app import Backend, create_app
from server.config import Settings

_CLOSE_S = 3.0  # for streams that end because the engine has closed


class Server(uvicorn.Server):
    """uvicorn, with a drain: the first signal lets running answers finish (new ones get a 503), the second stops."""

    def __init__(self, settings: Settings, backend: Backend) -> None:
        """Binds its address at once. Raises OSError."""
        self._socket = _listen(settings.host, settings.port)
        self.app: FastAPI = create_app(settings, backend)
        super().__init__(
            uvicorn.Config(
                self.app,
                log_level=settings.log_level,
                timeout_graceful_shutdown=int(_CLOSE_S),
                server_header=False,
                ws="none",
            )
        )
        self._drain_s = settings.drain_s
        self._engine = backend.engine
        self._closing: list[asyncio.Future[None]] = []

    @property
    def address(self) -> str:
        """The base URL on this machine, with the port that was found where 0 was asked for."""
        host, port = self._socket.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve_forever(self) -> None:
        """Serves until a signal, or until ``should_exit`` is set."""
        with self._socket:
            self.run(sockets=[self._socket])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM; unlike uvicorn's own, a handled signal does not kill the process afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def handle(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._on_signal)

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends as uvicorn does; then cuts off whoever has not hung up."""
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    def _on_signal(self) -> None:
        if not self.started:
            self.should_exit = self.force_exit = True
            return
        drain_s = 0.0 if self._closing else self._drain_s
        if drain_s and (count := self._engine.num_in_flight):
            print(
                f"x2l: stopping: waits up to {drain_s:g} s for running answers ({count} now); Ctrl-C ends them at once",
                file=sys.stderr,
                flush=True,
            )
        self._closing.append(asyncio.ensure_future(self._drain(drain_s)))

    async def _drain(self, drain_s: float) -> None:
        self.app.state.services.stopping = True
        await asyncio.to_thread(self._engine.close, drain_s)
        self.should_exit = True


@contextlib.contextmanager
def running(settings: Settings, backend: Backend) -> Iterator[str]:
    """A server on a thread; its base URL. It is stopped and the backend closed in the end."""
    server = Server(settings, backend)
    thread = threading.Thread(target=server.serve_forever, name="http")
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise OSError("the server did not start")
            time.sleep(0.01)
        yield server.address
    finally:
        server.should_exit = True
        thread.join()
        backend.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}") from None
    # Every connection has it from here. asyncio sets it for sockets that name their protocol, which this one does not;
    # without, what an answer writes second waits for the client to acknowledge the first, and clients take 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
