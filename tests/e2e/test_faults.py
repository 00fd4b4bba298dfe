"""Faults, each of them real: what is killed is killed, what is full is full. No answer is wrong without saying that it
may be, nothing hangs, and every refusal gives its reason. ``tests/benchmarks/faults.py`` runs these many times."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live import MODEL, Live, Serve, ask
from redis_servers import RedisServer
from slow_proxy import slow_proxy
from until import until

PATIENCE_S = 30.0
ENTIRE = {"mode": "low"}  # every chunk is re-loaded: the answer depends on all of them


@pytest.fixture(autouse=True)
def no_unforeseen_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A store that fails is logged as an error here; what nobody foresaw is logged with its traceback."""
    yield
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def answer(client: openai.OpenAI, file_id: str, **dials: Any) -> tuple[str, dict[str, Any]]:
    """The text and the response's ``x2l`` object."""
    completion = client.chat.completions.create(
        model=MODEL, messages=ask(file_id), max_tokens=24, extra_body={"x2l": dials or ENTIRE}
    )
    return completion.choices[0].message.content, completion.x2l


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def upload(client: openai.OpenAI, video: Path, fps: float = 1.0) -> str:
    file = client.files.create(file=video, purpose="user_data", extra_body={"fps": fps})
    assert processed(client, file.id).status == "processed"
    return file.id


def processed(client: openai.OpenAI, file_id: str) -> Any:
    return client.files.wait_for_processing(file_id, poll_interval=0.05, max_wait_seconds=120)


@contextmanager
def server_process(store: str, log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``x2l serve`` as a process of its own and its address."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("X2L_")}
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--store", store, "--device", "cpu"]
    with (
        log.open("a") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=kept) as process,
    ):
        try:
            assert process.stdout is not None
            url = next((line.split()[1] for line in process.stdout if line.startswith("address")), None)
            assert url is not None, log.read_text()
            until(lambda: is_ready(url), 60)
            yield process, url
        finally:
            process.kill()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split()[0] == name)


def test_a_server_killed_in_mid_prefill_goes_on_where_it_was(serve: Serve, video: Path, tmp_path: Path) -> None:
    with serve() as live:
        text, _ = answer(live.client(), upload(live.client(), video, fps=4.0))
    store, log = tmp_path / "store", tmp_path / "log"

    def is_whole(chunk: int) -> bool:
        return len(list(store.glob(f"blobs/kv/*/*/{chunk:05d}*"))) == 3

    with server_process(f"disk:{store}", log) as (process, url):
        file = client_of(url).files.create(file=video, purpose="user_data", extra_body={"fps": 4.0})
        until(lambda: is_whole(0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not list(store.glob("blobs/kv/*/manifest*"))
    first_missing = next(chunk for chunk in range(12) if not is_whole(chunk))
    with server_process(f"disk:{store}", log) as (process, url), client_of(url) as client:
        assert client.files.retrieve(file.id).status == "uploaded"
        assert processed(client, file.id).status == "processed"
        assert answer(client, file.id)[0] == text
        assert first_missing >= 1 and metric(url, "x2l_prefilled_chunks_total") == 12 - first_missing


def test_redis_killed_while_a_question_is_answered(serve: Serve, video: Path, tmp_path: Path) -> None:
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with (
        RedisServer(tmp_path, *options) as redis,
        serve(store=redis.url, store_cache_bytes=0) as live,
        client_of(live.url) as client,
    ):
        file_id = upload(client, video)
        text, x2l = answer(client, file_id)
        small, _ = answer(client, file_id, mode="high")
        assert not x2l["degraded"] and redis.process is not None
        redis.process.send_signal(signal.SIGSTOP)
        replies: list[Any] = []
        asking = threading.Thread(target=lambda: replies.append(answer(client, file_id)))
        asking.start()
        time.sleep(0.3)
        redis.kill()
        asking.join(PATIENCE_S)
        assert replies and replies[0][0] == small and replies[0][1]["degraded"]
        reply, x2l = answer(client, file_id)
        assert reply == small and x2l["degraded"]
        assert answer(client, file_id, mode="high")[0] == small
        assert client.files.retrieve(file_id).status == "processed"
        with pytest.raises(openai.APIStatusError) as refused:
            client.files.create(file=video, purpose="user_data", extra_body={"fps": 2.0})
        assert refused.value.status_code == 503 and refused.value.code == "store_unavailable"
        redis.start()
        until(lambda: not answer(client, file_id)[1]["degraded"])
        assert answer(client, file_id)[0] == text
        upload(client, video, fps=2.0)


def test_redis_killed_where_host_memory_has_what_was_read(serve: Serve, video: Path, tmp_path: Path) -> None:
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with RedisServer(tmp_path, *options) as redis, serve(store=redis.url) as live, client_of(live.url) as client:
        file_id = upload(client, video)
        part = {"chunks": [1]}
        expected, _ = answer(client, file_id, **part)
        text, small = answer(client, file_id, mode="low")[0], answer(client, file_id, mode="high")[0]
        other = upload(client, video, fps=2.0)  # its L-KVs were never read
        redis.kill()
        reply, x2l = answer(client, file_id, **part)
        assert reply == expected and not x2l["degraded"]
        assert answer(client, other)[1]["degraded"]
        live.backend.engine._pool.discard(live.backend.engine.library.video(file_id, "").key)
        with pytest.raises(openai.APIStatusError) as refused:
            answer(client, file_id)
        assert refused.value.status_code == 503 and refused.value.code == "store_unavailable"
        redis.start()
        until(lambda: client.files.retrieve(file_id).status == "processed")
        assert answer(client, file_id, mode="high")[0] == small
        assert answer(client, file_id, mode="low")[0] == text


def test_a_flipped_byte_is_found_and_healed(serve: Serve, video: Path, tmp_path: Path) -> None:
    with serve(store=f"disk:{tmp_path / 'store'}") as live, client_of(live.url) as client:
        file_id = upload(client, video)
        text, _ = answer(client, file_id)
        blob = next((tmp_path / "store").glob("blobs/kv/*/low/00001*"))
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 4
        blob.write_bytes(data)
        _, x2l = answer(client, file_id)
        assert x2l["degraded"]
        until(lambda: not answer(client, file_id)[1]["degraded"])
        assert answer(client, file_id)[0] == text
        assert client.files.retrieve(file_id).status == "processed"
        assert metric(live.url, "x2l_prefilled_chunks_total") == 4


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "x2l-test", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
def test_a_full_disk_is_a_clear_error_and_leaves_no_half_blob(serve: Serve, video: Path, tmp_path: Path) -> None:
    disk, filler = tmp_path / "disk", tmp_path / "disk" / ".filler"
    with small_disk(disk, 64 << 20), serve(store=f"disk:{disk}") as live, client_of(live.url) as client:
        room = os.statvfs(disk).f_bavail * 4096

        def leave(nbytes: int) -> None:
            filler.write_bytes(bytes(room - nbytes))

        leave(video.stat().st_size // 2)
        with pytest.raises(openai.APIStatusError) as refused:
            client.files.create(file=video, purpose="user_data")
        assert refused.value.status_code == 507 and refused.value.response.headers["x-should-retry"] == "false"
        assert [file.id for file in client.files.list()] == []
        leave(video.stat().st_size + 200_000)
        file = processed(client, client.files.create(file=video, purpose="user_data", extra_body={"fps": 8.0}).id)
        assert file.status == "error" and "space" in file.status_details
        for key in list(live.backend.store.keys()):
            assert live.backend.store.get(key) is not None  # raises where it is cut short
        assert list(live.backend.store.keys("kv/")) == []
        filler.unlink()
        assert answer(client, upload(client, video, fps=8.0))[0]


def test_redis_that_evicts_on_its_own_never_makes_an_answer_wrong(serve: Serve, video: Path, tmp_path: Path) -> None:
    with serve() as live, live.client() as client:
        rates = (1.0, 1.5, 2.0, 2.5)
        expected = {fps: answer(client, upload(client, video, fps))[0] for fps in rates}
        needed = sum(file.video["bytes"]["low"] + file.video["bytes"]["high"] for file in client.files.list())
    limit = ("--maxmemory", str(needed * 3 // 5 + (2 << 20)), "--maxmemory-policy", "allkeys-lru")
    with (
        RedisServer(tmp_path, *limit) as redis,
        serve(store=redis.url, store_cache_bytes=0, gpu_kv_budget="1MB") as live,
        client_of(live.url) as client,
    ):
        known: dict[str, str] = {}
        replies = []
        for fps, text in expected.items():
            file = client.files.create(file=video, purpose="user_data", extra_body={"fps": fps})
            known[file.id] = text
            for other in list(known)[-1:-4:-1]:  # older ones have lost some of their blobs, or all
                try:
                    reply, x2l = answer(client, other)
                except openai.APIStatusError as error:
                    assert error.code in ("video_failed", "file_not_found", "store_full"), error
                else:
                    replies.append(reply)
                    assert x2l["degraded"] or reply == known[other]
        with redis.client() as inside:
            assert inside.info("stats")["evicted_keys"] > 0
        assert replies


def test_a_slow_store_holds_nobody_else_up(serve: Serve, video: Path, tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis, slow_proxy(redis.port, 0.0) as proxy:
        store = f"redis://127.0.0.1:{proxy.port}"
        with serve(endless=True, store=store, store_cache_bytes=0) as live, client_of(live.url) as client:
            file_id = upload(client, video)
            text, _ = answer(client, file_id)
            proxy.delay_s = 0.05
            body = {
                "model": MODEL,
                "messages": ask(file_id),
                "max_tokens": 400,
                "extra_body": {"x2l": {"mode": "high"}},
            }
            with client.chat.completions.create(stream=True, **body) as stream:
                next(iter(stream))
                asking = [threading.Thread(target=check, args=(live, file_id, text)) for _ in range(4)]
                for thread in asking:
                    thread.start()
                tokens = sum(1 for event in stream if event.choices and event.choices[0].delta.content)
            for thread in asking:
                thread.join(PATIENCE_S)
            assert tokens > 100


def check(live: Live, file_id: str, text: str) -> None:
    with client_of(live.url) as client:
        reply, x2l = answer(client, file_id)
        assert reply == text and not x2l["degraded"]
