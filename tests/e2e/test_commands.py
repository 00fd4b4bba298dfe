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
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from clips import Clips, blank_media
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


def sizes_of_kvs(live: Live, file_id: str) -> tuple[int, int]:
    sizes = httpx.get(f"{live.url}/v1/files/{file_id}").json()["video"]["bytes"]
    return sizes["low"], sizes["high"]


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("X2L_")}
    return kept | {"OMP_NUM_THREADS": "1"} | variables


def test_upload_ask_list_and_remove(live: Live, video: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return x2l(*arguments, "--base-url", f"{live.url}/v1")

    uploaded = run("upload", str(video), "--max-frames", "64", "--expires-after-s", "86400", "--pin")
    assert uploaded.returncode == 0, uploaded.stderr
    file_id = uploaded.stdout.strip()
    assert file_id.startswith("file-") and "\n" not in file_id
    header, *rows, total = run("files").stdout.splitlines()
    [row] = [row.split() for row in rows if file_id in row]
    sizes = [f"{nbytes / 1e6:.1f}" for nbytes in (video.stat().st_size, *sizes_of_kvs(live, file_id))]
    assert row[:8] == [file_id, "made.mp4", "processed", "01:36", "2/2", *sizes] and row[10:] == ["yes"]
    assert datetime.fromisoformat(" ".join(row[8:10])) > datetime.now()
    assert " ".join(header.split()) == "id file status length chunks MB L MB H MB expires pinned"
    assert total.split()[0] == "total" and float(total.split()[1]) >= float(sizes[0])
    assert json.loads(run("files", "--json").stdout) == httpx.get(f"{live.url}/v1/files").json()["data"]
    for command, pinned in (("unpin", False), ("pin", True)):
        assert run(command, file_id).stdout.strip() == file_id
        assert httpx.get(f"{live.url}/v1/files/{file_id}").json()["pinned"] is pinned
    question = "What code is on the red star?"
    answer = run("ask", file_id, question, "--reload", "1", "--max-tokens", "5")
    assert answer.returncode == 0, answer.stderr
    assert "KV tokens" in answer.stderr and "chunk" in answer.stderr
    assert "cut off" not in run("ask", file_id, question, "--max-tokens", "64").stderr
    cut = run("ask", file_id, question, "--max-tokens", "1")
    assert cut.returncode == 0 and cut.stderr.count("the answer was cut off") == 1
    whole = json.loads(run("ask", file_id, question, "--mode", "low", "--max-tokens", "5", "--json").stdout)
    assert whole["x2l"]["kv_tokens"]["mixed"] == whole["x2l"]["kv_tokens"]["low"]
    chosen = json.loads(run("ask", file_id, question, "--chunks", "1,0", "--max-tokens", "1", "--json").stdout)
    assert {item["chunk"] for item in chosen["x2l"]["evidence"]} == {0, 1}
    other_id = run("upload", str(video), "--max-frames", "64").stdout.strip()
    both = run("ask", file_id, other_id, question, "--reload", "5", "--max-tokens", "5")
    assert both.returncode == 0 and {file_id, other_id} <= set(both.stderr.split()), both.stderr
    assert run("rm", other_id).returncode == 0
    refused = run("ask", file_id, question, "--chunks", "77")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "out of range" in refused.stderr and refused.stderr.count("\n") == 1
    assert run("rm", file_id).stdout.strip() == file_id
    gone = run("rm", file_id)
    assert gone.returncode == 1 and "No such file" in gone.stderr


def test_an_id_is_known_whatever_becomes_of_its_video(video: Path, tmp_path: Path, unused_port: int) -> None:
    store = f"disk:{tmp_path / 'store'}"
    with (
        started(unused_port, "-m", "server", "serve", "--port", str(unused_port), "--store", store) as (server, url),
        subprocess.Popen(
            [sys.executable, "-m", "server", "upload", str(video), "--base-url", url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as upload,
    ):
        assert upload.stdout is not None
        file_id = upload.stdout.readline()
        server.kill()
        rest, said = upload.communicate(timeout=60)
    assert file_id.startswith("file-") and (rest, upload.returncode) == ("", 1)
    assert said.splitlines()[-1].startswith("x2l: ")


def test_several_videos_of_which_one_is_damaged(serve: Serve, video: Path, tmp_path: Path, clips: Clips) -> None:
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clips("mp4", width=160, height=96, fps=5.0, duration_s=60.0).path.read_bytes())
    blank_media(damaged, 0.5)
    with serve() as live:
        ended = x2l("upload", str(damaged), str(video), "--base-url", live.url)
        statuses = [httpx.get(f"{live.url}/v1/files/{file_id}").json()["status"] for file_id in ended.stdout.split()]
    assert (ended.returncode, statuses) == (1, ["error", "processed"])
    said = ended.stderr.splitlines()[-1]
    assert said.startswith("x2l: damaged.mp4: ") and video.name not in said


def test_names_and_reasons_cannot_steer_a_terminal(serve: Serve, tmp_path: Path, clips: Clips) -> None:
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clips("mp4", width=160, height=96, fps=5.0, duration_s=60.0).path.read_bytes())
    blank_media(damaged, 0.5)
    with serve() as live:
        ended = x2l("upload", str(damaged), "--base-url", live.url)
        file_id = ended.stdout.strip()
        assert ended.returncode == 1 and file_id.startswith("file-") and ended.stderr.splitlines()[-1] != ""
        name = "\x1b]0;owned\x07\x9b.mp4"
        other = damaged.read_bytes() + bytes(8)  # the same bytes would have the first one tried again
        httpx.post(f"{live.url}/v1/files", files={"file": (name, other)}, data={"purpose": "vision"})
        as_json = x2l("files", "--json", "--base-url", live.url).stdout
        listed = x2l("files", "--base-url", live.url).stdout
        assert not {"\x1b", "\x07", "\x9b"} & {*as_json, *listed}
        assert "\x9b" in json.loads(as_json)[0]["filename"]
        reason = httpx.get(f"{live.url}/v1/files/{file_id}").json()["status_details"]
        assert reason and f"  {reason}" in listed.splitlines()


def test_the_key_and_the_address_come_from_the_environment(serve: Serve) -> None:
    with serve(api_key=("secret",)) as live:
        assert x2l("files", X2L_BASE_URL=live.url, X2L_API_KEY="secret").returncode == 0
        refused = x2l("files", X2L_BASE_URL=live.url)
        assert refused.returncode == 1 and "API key" in refused.stderr


def test_a_refusal_has_one_prefix(live: Live, file_id: str, video: Path) -> None:
    def refused(*arguments: str) -> str:
        ended = x2l("ask", *arguments, "--base-url", live.url)
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1
        return ended.stderr.removeprefix("x2l: ")

    several = refused(file_id, "Is there a moon?", "--reload", "1", "--mode", "low")
    assert several == "At most one of reload, budget_tokens, chunks and mode; got reload and mode\n"
    with live.client() as client:
        other = client.files.create(file=video, purpose="user_data", extra_body={"max_frames": "32"})
    whose = refused(file_id, other.id, "Is there a moon?", "--chunks", "0")
    assert whose.startswith("chunks does not tell which of the 2 videos is meant: ")


def test_client_errors_are_one_line(tmp_path: Path) -> None:
    nobody = x2l("files", "--base-url", "http://127.0.0.1:9")
    assert nobody.returncode == 1 and nobody.stderr.startswith("x2l: ") and nobody.stderr.count("\n") == 1
    assert x2l("upload", str(tmp_path / "none.mp4")).returncode == 2
    assert x2l("dance").returncode == 2


def test_make_video(tmp_path: Path) -> None:
    made = x2l("make-video", str(tmp_path / "a.mp4"), "--seed", "5", "--chunks", "1")
    assert made.returncode == 0, made.stderr
    facts = json.loads((tmp_path / "a.json").read_text())
    assert (facts["seed"], facts["chunks"]) == (5, 1)
    assert len(facts["questions"]) >= 12
    assert (tmp_path / "a.mp4").stat().st_size > 0
    assert x2l("make-video", str(tmp_path / "c.mp4"), "--seed", "1000000").returncode == 2
    nowhere = x2l("make-video", str(tmp_path / "none" / "b.mp4"), "--chunks", "1")
    assert nowhere.returncode == 1 and str(tmp_path / "none" / "b.mp4") in nowhere.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "word"),
    [
        (("--port", "eighty"), {}, "--port"),
        (("--store", "s3://bucket"), {}, "store"),
        (("--model", "no/such-model"), {"HF_HUB_OFFLINE": "1"}, "no/such-model"),
        (("--host", "192.0.2.1"), {"X2L_STORE": "memory://"}, "192.0.2.1"),
        ((), {"X2L_PROT": "1"}, "X2L_PROT"),
        ((), {"X2L_MAX_QUEUE": "none"}, "X2L_MAX_QUEUE"),
        (("--low-ratio", "64"), {"X2L_STORE": "memory://"}, "--high-ratio"),
    ],
)
def test_a_bad_setting_stops_the_start(arguments: tuple[str, ...], variables: dict[str, str], word: str) -> None:
    stopped = x2l("serve", *arguments, **variables)
    assert stopped.returncode == 1
    assert stopped.stderr.count("\n") == 1 and word in stopped.stderr


ENDLESS = """
import sys
from server.app import open_backend
from server.serving import Server
from server.config import load_settings

settings = load_settings(port=sys.argv[1], store="memory://", drain_s=sys.argv[2], max_tokens=20_000)
backend = open_backend(settings)
assert "torch._dynamo" not in sys.modules, "a start loads torch's compiler, which takes seconds"
backend.model.end_ids = frozenset()  # an answer runs to max_tokens
Server(settings, backend).serve_forever()
backend.close()
"""


@contextlib.contextmanager
def started(port: int, *command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server as a process, ready."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    url = f"http://127.0.0.1:{port}"
    with process:
        try:
            for _ in range(600):
                assert process.poll() is None, process.stdout.read() if process.stdout else ""
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/ready").status_code == 200:
                        break
                time.sleep(0.1)
            yield process, url
        finally:
            process.kill()


@contextlib.contextmanager
def stream_of(url: str, video: Path, max_tokens: int) -> Iterator[Iterator[str]]:
    """The lines of an answer that has begun."""
    file = httpx.post(f"{url}/v1/files", files={"file": video.read_bytes()}, data={"purpose": "vision"}).json()
    body = {"model": MODEL, "messages": ask(file["id"]), "max_tokens": max_tokens, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        while '"content":"' not in next(lines).replace('"content":""', ""):
            pass
        yield lines


def test_serve_says_what_it_does_and_stops_cleanly(tmp_path: Path, unused_port: int) -> None:
    store = f"disk:{tmp_path / 'store'}"
    with started(unused_port, "-m", "server", "serve", "--port", str(unused_port), "--store", store) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        output = process.stdout.read() if process.stdout else ""
    for word in (MODEL, "parameters", "cpu", store, "video-hour", "exact up to 1:40:00", str(unused_port)):
        assert word in output.replace("\n", "")
    assert "Traceback" not in output


def test_sigterm_lets_streams_finish_and_then_stops(video: Path, unused_port: int) -> None:
    with (
        started(unused_port, "-c", ENDLESS, str(unused_port), "60") as (process, url),
        httpx.Client(base_url=url, timeout=60) as other,
    ):
        with stream_of(url, video, max_tokens=300) as lines:
            assert other.get("/ready").status_code == 200
            process.send_signal(signal.SIGTERM)
            while other.get("/ready").status_code == 200:
                pass
            messages = [{"role": "user", "content": "Hello"}]
            refused = other.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert "retry-after" in refused.headers
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert process.wait(timeout=30) == 0
        said = process.stdout.read() if process.stdout else ""
        assert said.count("waits up to 60 s for running answers (1 now); Ctrl-C ends them at once") == 1


def test_a_second_signal_stops_at_once(video: Path, unused_port: int) -> None:
    with started(unused_port, "-c", ENDLESS, str(unused_port), "600") as (process, url):
        with stream_of(url, video, max_tokens=20_000) as lines:
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(httpx.TransportError):
                assert "data: [DONE]" not in list(lines)
        assert process.wait(timeout=30) == 0


@pytest.fixture
def unused_port() -> int:
    """A port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_demo_is_right() -> None:
    shown = x2l("demo")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "3 of 3 answers are right" in shown.stdout
