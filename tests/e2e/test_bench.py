"""``x2l bench quality`` against servers: ours, another that knows no dials, and one that fails."""

from __future__ import annotations

import base64
import itertools
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Response
from live import MODEL, Live
from rich.console import Console
from typer.testing import CliRunner

from server.bench.quality import Target, num_errors, run_quality
from server.bench.records import open_folder
from server.bench.synthetic import choose_videos
from server.bench.video import ServerUnusable
from server.cli import app as x2l
from server.models.tiny.make_video import make_video

SEED, CHUNKS = 78, 2


@pytest.fixture(scope="module")
def videos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    (video,) = choose_videos(SEED, {CHUNKS: 1})
    make_video(folder / video.filename, video.seed, video.chunks)
    return folder


def run(out: Path, videos_folder: Path, base_url: str | None, *patterns: str) -> dict[str, Any]:
    return run_quality(
        {CHUNKS: 1},
        patterns,
        Target(base_url=base_url, device="cpu"),
        seed=SEED,
        out=out,
        videos_folder=videos_folder,
        plot=False,
        console=Console(file=StringIO()),
    )


def test_this_server_says_what_the_engine_says(live: Live, videos_folder: Path, tmp_path: Path) -> None:
    before = len(live.client().files.list().data)
    remote = run(tmp_path / "remote", videos_folder, f"{live.url}/v1", "low", "high", "attention-1", "oracle", "plain")
    assert num_errors(remote) == 0
    assert "model_sha256" not in remote  # it may be other weights than those of this installation
    (length,) = remote["lengths"]
    assert set(length["methods"]) == {"low", "high", "attention-1", "oracle", "plain"}
    assert len(live.client().files.list().data) == before  # it has tidied up
    local = run(tmp_path / "local", videos_folder, None, "high", "attention-1", "oracle")
    for name, row in local["lengths"][0]["methods"].items():
        for figure in ("accuracy", "by_type", "kv_tokens", "kv_nbytes", "recall", "span_recall", "contained"):
            assert length["methods"][name][figure] == row[figure], (name, figure)


@contextmanager
def other_server(fail_every: int | None = None) -> Iterator[tuple[str, list[bytes]]]:
    """Answers Yes to whatever video comes inline; the videos it got."""
    app, videos, number = FastAPI(), [], itertools.count(1)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "other", "object": "model", "created": 0, "owned_by": "somebody"}]}

    @app.post("/v1/chat/completions")
    def chat(request: dict[str, Any], response: Response) -> dict[str, Any]:
        if fail_every is not None and next(number) % fail_every == 0:
            response.status_code = 500
            return {"error": {"message": "out of luck", "type": "server_error"}}
        assert "x2l" not in request
        video, text = request["messages"][0]["content"]
        videos.append(base64.b64decode(video["video_url"]["url"].removeprefix("data:video/mp4;base64,")))
        assert text["type"] == "text"
        message = {"role": "assistant", "content": "Yes"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "other", "choices": [choice]}

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", videos
        finally:
            server.should_exit = True
            thread.join()


def test_another_server_gets_the_video_and_no_dials(videos_folder: Path, tmp_path: Path) -> None:
    (video,) = choose_videos(SEED, {CHUNKS: 1})
    with other_server() as (url, videos):
        result = run(tmp_path / "run", videos_folder, url)
        with pytest.raises(ValueError, match="none of these methods can be asked here; there are plain"):
            run(tmp_path / "other", videos_folder, url, "low")
    assert set(videos) == {(videos_folder / video.filename).read_bytes()}
    (row,) = result["lengths"][0]["methods"].values()
    assert row["accuracy"]["right"] == sum(question.answer == "Yes" for question in video.questions)
    assert row["accuracy"]["asked"] == len(videos) == len(video.questions)


def test_errors_are_counted_and_the_run_goes_on(videos_folder: Path, tmp_path: Path) -> None:
    with other_server(fail_every=3) as (url, _):
        arguments = ["bench", "quality", "--seed", str(SEED), "--chunks", str(CHUNKS), "--videos", "1", "--no-plot"]
        arguments += ["--base-url", url, "--out", str(tmp_path / "run"), "--videos-dir", str(videos_folder)]
        ran = CliRunner().invoke(x2l, arguments)
    assert ran.exit_code == 1
    num_questions = len(choose_videos(SEED, {CHUNKS: 1})[0].questions)
    assert f"{num_questions // 3} questions got an error" in ran.stderr
    assert ran.stderr.count("\n") == 1 and "plain" in ran.stdout
    with open_folder(tmp_path / "run", configuration(url)) as folder:
        errors = [record.error for record in folder.records if record.error is not None]
    assert len(errors) == num_questions // 3 and all("out of luck" in error for error in errors)


def configuration(url: str) -> dict[str, Any]:
    return {"seed": SEED, "videos": {str(CHUNKS): 1}, "server": url, "model": "other"}


def test_servers_that_cannot_be_used(live: Live, videos_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerUnusable, match="cannot use the server"):
        run(tmp_path / "run", videos_folder, "http://127.0.0.1:9/v1")
    with pytest.raises(ServerUnusable, match=f"serves {MODEL}, not gpt"):
        run_quality(
            {CHUNKS: 1},
            (),
            Target(model="gpt", base_url=live.url),
            seed=SEED,
            out=tmp_path / "run",
            videos_folder=videos_folder,
            plot=False,
            console=Console(quiet=True),
        )
    assert not (tmp_path / "run").exists()


def test_without_the_client_it_says_what_to_install(
    videos_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "server.bench.remote", raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ServerUnusable, match=r"video-x2l-server\[bench\]"):
        run(tmp_path / "run", videos_folder, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--full"], "exclude each other"),
        (["--chunks", "8,x"], "not a list of numbers"),
        (["--chunks", "0"], "number of chunks must lie in"),
        (["--methods", "nothing"], "no method is called 'nothing'"),
        (["--base-url", "nowhere"], "cannot use the server"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    ran = CliRunner().invoke(x2l, ["bench", "quality", "--out", str(tmp_path / "run"), "--no-plot", *arguments])
    assert ran.exit_code in (1, 2)
    assert message in " ".join(ran.stderr.split())
    assert not (tmp_path / "run").exists()
