"""Public benchmarks against a live server: tiny folders in the official formats, real videos, the bundled model."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dataset_folders as made
import pytest
from clips import Clips, blank_media
from live import Live, Serve
from rich.console import Console

from server.bench.datasets.asker import Asking
from server.bench.datasets.item import DatasetError
from server.bench.datasets.records import Records
from server.bench.datasets.run import run_dataset
from server.client import ServerError


@pytest.fixture
def clip(clips: Clips) -> Path:
    return clips("mp4", duration_s=4.0).path


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


FOLDERS: dict[str, tuple[Callable[[Path, Path], Path], int, int]] = {
    "vnbench": (made.vnbench, 8, 2),
    "mlvu": (made.mlvu_dev, 4, 4),
    "videomme": (lambda folder, clip: made.videomme(folder, clip, form="parquet"), 3, 3),
    "longvideobench": (made.longvideobench, 2, 2),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_question_is_asked_and_every_upload_deleted(live: Live, tmp_path: Path, clip: Path, name: str) -> None:
    make, num_items, num_groups = FOLDERS[name]
    data, out, console = make(tmp_path / "data", clip), tmp_path / "out", quiet()
    with live.client() as client:
        before = {file.id for file in client.files.list().data}
        summary = run_dataset(name, data, out=out, base_url=live.url, console=console)
        assert {file.id for file in client.files.list().data} == before
    assert summary["items"] == {
        "all": num_items, "answered": num_items, "missing_video": 0, "failed": 0, "not_asked": 0
    }  # fmt: skip
    assert summary["groups"]["all"] == num_groups
    assert summary["groups"]["scored"] + summary["groups"]["unanswered"] == num_groups
    tokens = summary["kv_tokens"]
    assert tokens["high"] <= tokens["mixed"] <= tokens["low"]
    written = json.loads((out / f"{name}.json").read_text())
    assert {key: written[key] for key in summary} == summary
    assert written["run"]["model"] == "x2l-tiny"
    assert len(records(out / f"{name}.jsonl")) == num_items
    assert f"score of {name}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_subtitles_and_dials_reach_the_server(live: Live, tmp_path: Path, clip: Path) -> None:
    data = made.longvideobench(tmp_path / "data", clip)
    asking = Asking(fps=1, max_frames=2, dials={"mode": "high"})
    summary = run_dataset(
        "longvideobench", data, out=tmp_path, base_url=live.url, subtitles=True, asking=asking, console=quiet()
    )
    assert summary["items"]["answered"] == 2
    assert summary["kv_tokens"]["mixed"] == summary["kv_tokens"]["high"]
    with pytest.raises(DatasetError, match="no subtitles"):
        run_dataset("mlvu", data, out=tmp_path, base_url=live.url, subtitles=True, console=quiet())


def test_videos_that_the_server_reads_itself(serve: Serve, tmp_path: Path, clip: Path) -> None:
    data = made.mlvu_dev(tmp_path / "a folder", clip)
    with serve(allowed_local_media_path=tmp_path) as live:
        arguments = {"out": tmp_path, "base_url": live.url, "media_root": data, "console": quiet()}
        summary = run_dataset("mlvu", data, asking=Asking(max_frames=3), **arguments)
        with live.client() as client:  # the same bytes are one file; it stays for the next run, and then expires
            assert [file.to_dict()["video"]["num_frames"] for file in client.files.list().data] == [3]
    assert summary["items"]["answered"] == 4


def test_a_server_of_its_own(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X2L_RELOAD", "1")
    data = made.mlvu_dev(tmp_path / "data", clip, questions=1)
    summary = run_dataset("mlvu", data, out=tmp_path, settings={"reload": 0}, console=quiet())
    assert summary["items"]["answered"] == 2
    assert summary["kv_tokens"]["mixed"] == summary["kv_tokens"]["high"]


def test_missing_and_undecodable_videos_are_counted(live: Live, tmp_path: Path, clip: Path) -> None:
    data, console = made.vnbench(tmp_path / "data", clip, ["ret_edit", "cnt_edit", "ord_edit"]), quiet()
    (data / "VNBench_new/v_cnt_edit.mp4").unlink()
    blank_media(data / "VNBench_new/v_ord_edit.mp4", 0.0)
    summary = run_dataset("vnbench", data, out=tmp_path, base_url=live.url, console=console)
    assert summary["items"] == {"all": 12, "answered": 4, "missing_video": 4, "failed": 4, "not_asked": 0}
    assert summary["groups"] == {"all": 3, "scored": 1, "unanswered": 0}
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4 of 12 questions have a reply: 4 without their video, 4 failed" in printed
    errors = {record["video"]: record["error"] for record in records(tmp_path / "vnbench.jsonl")}
    assert errors["v_ret_edit.mp4"] is None
    assert "no such video" in errors["v_cnt_edit.mp4"]
    assert errors["v_ord_edit.mp4"]
    # A later run asks again what failed, and nothing else.
    made.copy_videos(clip, [data / "VNBench_new" / f"v_{kind}.mp4" for kind in ("cnt_edit", "ord_edit")])
    summary = run_dataset("vnbench", data, out=tmp_path, base_url=live.url, console=quiet())
    assert summary["items"]["answered"] == 12
    assert len(records(tmp_path / "vnbench.jsonl")) == 12 + 8


def test_a_folder_without_videos(tmp_path: Path, clip: Path) -> None:
    data = made.mlvu_dev(tmp_path, clip)
    for video in data.rglob("*.mp4"):
        video.unlink()
    with pytest.raises(DatasetError, match=r"none of the videos is there: looked for .*v1.mp4 first"):
        run_dataset("mlvu", data, out=tmp_path / "out", base_url="http://127.0.0.1:9", console=quiet())
    assert not (tmp_path / "out").exists()


def test_an_empty_selection(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(DatasetError, match="no questions were selected"):
        run_dataset("mlvu", made.mlvu_dev(tmp_path, clip), out=tmp_path, limit=0, console=quiet())


class Stub:
    """Another vendor's server: the first ``failures`` questions get ``status``, then every answer is B. The question
    with number ``held`` (from 1) waits for ``release``."""

    def __init__(self) -> None:
        self.failures, self.status = 0, 500
        self.held = 0
        self.holding, self.release = threading.Event(), threading.Event()
        self.asked: list[dict[str, Any]] = []
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": "other"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    stub.asked.append(body)
                    number = len(stub.asked)
                if number == stub.held:
                    stub.holding.set()
                    stub.release.wait(60)
                if number <= stub.failures:
                    self._send(stub.status, {"error": {"message": "out of order"}})
                else:
                    self._send(200, {"choices": [{"message": {"role": "assistant", "content": "B"}}]})

            def _send(self, status: int, body: dict[str, Any]) -> None:
                payload = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(payload)))
                self.send_header("retry-after", "0.1")
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    other = Stub()
    yield other
    other.close()


def test_another_server_and_what_it_is_sent(stub: Stub, tmp_path: Path, clip: Path) -> None:
    data = made.mlvu_dev(tmp_path / "data", clip)
    seen_there = Path("/srv/bench mark")
    summary = run_dataset("mlvu", data, out=tmp_path, base_url=stub.url, media_root=seen_there, console=quiet())
    assert (summary["accuracy"]["right"], summary["accuracy"]["asked"]) == (2, 4)
    assert summary["kv_tokens"] is None
    assert len(stub.asked) == 4
    body = next(body for body in stub.asked if "plotQA" in body["messages"][1]["content"][0]["video_url"]["url"])
    assert body["model"] == "other"
    assert body["temperature"] == 0
    assert body["messages"][0]["role"] == "system"
    video, text = body["messages"][1]["content"]
    assert video["video_url"]["url"] == "file:///srv/bench%20mark/video/1_plotQA/v1.mp4"
    assert text["text"].startswith("Question: What is shown")
    assert {"x2l", "media_io_kwargs"}.isdisjoint(body)
    with pytest.raises(ServerError, match="needs --media-root"):
        run_dataset("mlvu", data, out=tmp_path / "upload", base_url=stub.url, console=quiet())
    with pytest.raises(ServerError, match="serves other, not another"):
        run_dataset("mlvu", data, out=tmp_path / "upload", base_url=stub.url, model="another", console=quiet())


def test_errors_of_the_server_do_not_end_the_run(stub: Stub, tmp_path: Path, clip: Path) -> None:
    stub.failures = 3
    data = made.mlvu_dev(tmp_path / "data", clip)
    arguments = {"out": tmp_path, "base_url": stub.url, "media_root": data, "console": quiet()}
    summary = run_dataset("mlvu", data, **arguments)
    assert summary["items"] == {"all": 4, "answered": 1, "missing_video": 0, "failed": 3, "not_asked": 0}
    assert {record["error"] for record in records(tmp_path / "mlvu.jsonl")} == {None, "out of order"}
    assert run_dataset("mlvu", data, **arguments)["items"]["answered"] == 4
    assert len(stub.asked) == 4 + 3


def test_a_busy_server_is_asked_again(stub: Stub, tmp_path: Path, clip: Path) -> None:
    stub.failures, stub.status = 3, 429
    data = made.mlvu_dev(tmp_path / "data", clip)
    summary = run_dataset("mlvu", data, out=tmp_path, base_url=stub.url, media_root=data, console=quiet())
    assert summary["items"]["answered"] == 4
    assert len(stub.asked) == 4 + 3


def test_an_interrupted_run_goes_on(stub: Stub, tmp_path: Path, clip: Path) -> None:
    data = made.vnbench(tmp_path / "data", clip)
    arguments = {"out": tmp_path, "base_url": stub.url, "media_root": data, "console": quiet()}
    whole = run_dataset("vnbench", data, **arguments)
    path = tmp_path / "vnbench.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])  # the run, three replies, and one that was cut off
    stub.asked.clear()
    assert run_dataset("vnbench", data, **arguments) == whole
    assert len(stub.asked) == 5
    assert len({record["id"] for record in records(path)}) == len(records(path)) == 8


def test_records_of_another_run_are_not_mixed_in(stub: Stub, tmp_path: Path, clip: Path) -> None:
    data = made.mlvu_dev(tmp_path / "data", clip)
    arguments = {"out": tmp_path, "base_url": stub.url, "media_root": data, "console": quiet()}
    run_dataset("mlvu", data, **arguments)
    before = (tmp_path / "mlvu.jsonl").read_bytes()
    with pytest.raises(DatasetError, match=r"another run's records \(max_frames\): choose another --out"):
        run_dataset("mlvu", data, asking=Asking(max_frames=8), **arguments)
    assert (tmp_path / "mlvu.jsonl").read_bytes() == before
    run = json.loads(before.splitlines()[0])["run"]
    with Records(tmp_path / "mlvu.jsonl", run), pytest.raises(DatasetError, match="another process"):
        run_dataset("mlvu", data, **arguments)  # as if a second command did
    (tmp_path / "mlvu.jsonl").write_text("something else\n")
    with pytest.raises(DatasetError, match="does not hold the records"):
        run_dataset("mlvu", data, **arguments)


def test_a_wrong_key_ends_the_run_at_once(serve: Serve, tmp_path: Path, clip: Path) -> None:
    data = made.mlvu_dev(tmp_path / "data", clip)
    with serve(api_key=("right",)) as live, pytest.raises(ServerError, match="key"):
        run_dataset("mlvu", data, out=tmp_path / "out", base_url=live.url, api_key="wrong", console=quiet())


def command(*options: object) -> list[str]:
    return [sys.executable, "-m", "server", "bench", "quality", *map(str, options)]


def test_the_command(live: Live, tmp_path: Path, clip: Path) -> None:
    data = made.mlvu_dev(tmp_path / "data", clip)
    options = ["--dataset", "mlvu", "--data", data, "--limit", 2, "--reload", 1, "--base-url", live.url]
    done = subprocess.run(command(*options), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "score of mlvu (mean of task)" in done.stdout
    written = json.loads((tmp_path / "x2l-quality-mlvu" / "mlvu.json").read_text())
    assert written["run"]["dials"] == {"reload": 1}
    assert {name: cell["asked"] for name, cell in written["categories"]["task"].items()} == {"count": 1, "plotQA": 1}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--dataset", "mlvu"], "--dataset needs --data"),
        (["--limit", "3"], "--limit means nothing without --dataset"),
        (["--dataset", "mlvu", "--data", ".", "--quick"], "--quick means nothing with --dataset"),
        (["--dataset", "mlvu", "--data", ".", "--reload", "1", "--mode", "low"], "at most one of"),
        (["--dataset", "mlvu", "--data", ".", "--media-root", "/srv"], "--media-root is an absolute path"),
        (["--dataset", "mlvu", "--data", "absent"], "no such folder: absent"),
    ],
)
def test_the_command_refuses(options: list[str], complaint: str, tmp_path: Path) -> None:
    done = subprocess.run(command(*options), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert complaint in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_with_the_question_in_flight(stub: Stub, tmp_path: Path, clip: Path) -> None:
    stub.held = 3
    data = made.vnbench(tmp_path / "data", clip)
    options = ["--dataset", "vnbench", "--data", data, "--base-url", stub.url, "--media-root", data, "--out", tmp_path]
    # A suite that runs in the background ignores Ctrl-C, and so would its children.
    heeding = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    started = [sys.executable, "-c", heeding, *command(*options, "--concurrency", 1)]
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert stub.holding.wait(60)
        run.send_signal(signal.SIGINT)
        time.sleep(2)  # so that it is known before the answer comes
        stub.release.set()
        assert run.wait(60) == 130
    assert len(stub.asked) == len(records(tmp_path / "vnbench.jsonl")) == 3
    arguments = {"out": tmp_path, "base_url": stub.url, "media_root": data, "console": quiet()}
    assert run_dataset("vnbench", data, **arguments)["items"]["answered"] == 8
    assert len(stub.asked) == 8
