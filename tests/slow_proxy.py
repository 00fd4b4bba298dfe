"""A TCP proxy on loopback that answers late, as a store far away does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class SlowProxy:
    """``delay_s`` may be changed at any time; ``port`` is where it listens."""

    def __init__(self, behind_port: int, delay_s: float) -> None:
        self.behind_port = behind_port
        self.delay_s = delay_s
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", self.behind_port)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, behind_writer}
        await asyncio.gather(
            self._pump(reader, behind_writer, late=True), self._pump(behind_reader, writer, late=False)
        )

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, late: bool) -> None:
        try:
            with suppress(OSError):
                while data := await reader.read(1 << 20):
                    if late:  # what asks waits, once, however much is answered
                        await asyncio.sleep(self.delay_s)
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    async def stop(self) -> None:
        """Ends every connection; returns once their sockets are closed."""
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)


@contextmanager
def slow_proxy(behind_port: int, delay_s: float) -> Iterator[SlowProxy]:
    """Before ``behind_port``: every request to it takes ``delay_s`` longer."""
    proxy = SlowProxy(behind_port, delay_s)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(proxy.serve, "127.0.0.1", 0))
    proxy.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def stop() -> None:
        server.close()
        await proxy.stop()

    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
