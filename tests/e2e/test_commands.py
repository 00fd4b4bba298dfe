"""The ``x2l`` commands as processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live import MODEL, Live, Serve, ask


def x2l(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "server", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(**variables),
    )


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("X2L_")}
    return kept | {"OMP_NUM_THREADS": "1"} | variables


def test_upload_ask_list_and_remove(live: Live, video: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return x2l(*arguments, "--base-url", f"{live.url}/v1")

    uploaded = run("upload", str(video), "--max-frames", "32")
    assert uploaded.returncode == 0, uploaded.stderr
    file_id = uploaded.stdout.strip()
    assert file_id.startswith("file-") and "\n" not in file_id
    listed = run("files")
    assert file_id in listed.stdout and "made.mp4" in listed.stdout
    question = "What code is on the red star?"
    answer = run("ask", file_id, question, "--reload", "1", "--max-tokens", "5")
    assert answer.returncode == 0, answer.stderr
    assert "KV tokens" in answer.stderr and "chunk" in answer.stderr
    whole = json.loads(run("ask", file_id, question, "--mode", "low", "--max-tokens", "5", "--json").stdout)
    assert whole["x2l"]["kv_tokens"]["mixed"] == whole["x2l"]["kv_tokens"]["low"]
    chosen = json.loads(run("ask", file_id, question, "--chunks", "1,0", "--max-tokens", "1", "--json").stdout)
    assert {item["chunk"] for item in chosen["x2l"]["evidence"]} == {0, 1}
    refused = run("ask", file_id, question, "--chunks", "77")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "out of range" in refused.stderr and refused.stderr.count("\n") == 1
    assert run("rm", file_id).stdout.strip() == file_id
    gone = run("rm", file_id)
    assert gone.returncode == 1 and "No such file" in gone.stderr


def test_the_key_and_the_address_come_from_the_environment(serve: Serve) -> None:
    with serve(api_key=("secret",)) as live:
        assert x2l("files", X2L_BASE_URL=live.url, X2L_API_KEY="secret").returncode == 0
        refused = x2l("files", X2L_BASE_URL=live.url)
        assert refused.returncode == 1 and "API key" in refused.stderr


def test_client_errors_are_one_line(tmp_path: Path) -> None:
    nobody = x2l("files", "--base-url", "http://127.0.0.1:9")
    assert nobody.returncode == 1 and nobody.stderr.startswith("x2l: ") and nobody.stderr.count("\n") == 1
    assert x2l("upload", str(tmp_path / "none.mp4")).returncode == 2
    assert x2l("dance").returncode == 2


def test_make_video_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        made = x2l("make-video", str(tmp_path / name), "--seed", "5", "--chunks", "2")
        assert made.returncode == 0, made.stderr
    facts = json.loads((tmp_path / "a.json").read_text())
    assert (facts["seed"], facts["chunks"]) == (5, 2)
    assert len(facts["questions"]) >= 12
    assert facts == json.loads((tmp_path / "b.json").read_text())
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert x2l("make-video", str(tmp_path / "c.avi")).returncode == 2
    assert x2l("make-video", str(tmp_path / "c.mp4"), "--seed", "1000000").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "variables", "word"),
    [
        (("--port", "eighty"), {}, "--port"),
        (("--store", "s3://bucket"), {}, "store"),
        (("--model", "no/such-model"), {}, "no/such-model"),
        ((), {"X2L_PROT": "1"}, "X2L_PROT"),
        ((), {"X2L_MAX_QUEUE": "none"}, "X2L_MAX_QUEUE"),
    ],
)
def test_a_bad_setting_stops_the_start(arguments: tuple[str, ...], variables: dict[str, str], word: str) -> None:
    stopped = x2l("serve", *arguments, **variables)
    assert stopped.returncode == 1
    assert stopped.stderr.count("\n") == 1 and word in stopped.stderr


@contextlib.contextmanager
def served(tmp_path: Path, port: int, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``x2l serve`` as a process, ready."""
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--store", f"disk:{tmp_path / 'store'}"]
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    url = f"http://127.0.0.1:{port}"
    try:
        with process:
            for _ in range(600):
                assert process.poll() is None, process.stdout.read() if process.stdout else ""
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/ready").status_code == 200:
                        break
                time.sleep(0.1)
            yield process, url
            process.kill()
    finally:
        process.kill()


def test_sigterm_lets_streams_finish_and_then_stops(tmp_path: Path, video: Path, unused_port: int) -> None:
    with served(tmp_path, unused_port, "--log-level", "warning") as (process, url):
        file = httpx.post(f"{url}/v1/files", files={"file": video.open("rb")}, data={"purpose": "vision"}).json()
        httpx.get(f"{url}/v1/files/{file['id']}/events", timeout=60)
        body = {"model": MODEL, "messages": ask(file["id"]), "max_tokens": 150, "stream": True, "temperature": 2}
        with (
            httpx.Client(base_url=url, timeout=60) as other,
            httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            for _ in range(100):
                ready = other.get("/ready").status_code
                if ready == 503:
                    break
            assert ready == 503
            refused = other.post("/v1/chat/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert "retry-after" in refused.headers
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(timeout=20) == 0
        output = process.stdout.read() if process.stdout else ""
        assert MODEL in output and "Traceback" not in output


def test_a_second_signal_stops_at_once(tmp_path: Path, video: Path, unused_port: int) -> None:
    with served(tmp_path, unused_port, "--drain-s", "600", "--max-tokens", "100000") as (process, url):
        file = httpx.post(f"{url}/v1/files", files={"file": video.open("rb")}, data={"purpose": "vision"}).json()
        body = {"model": MODEL, "messages": ask(file["id"]), "stream": True, "temperature": 2}
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response,
        ):
            next(response.iter_lines())
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            response.read()
        assert process.wait(timeout=20) == 0


@pytest.fixture
def unused_port() -> int:
    """A port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
