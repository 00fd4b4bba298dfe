"""Videos and images that a message names by an http(s) URL, fetched from a real server on this machine."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live import MODEL, Live, Serve
from PIL import Image

from server.bench.serving.process import serving

HOST, OTHER_HOST = "127.0.0.1", "localhost"  # one machine, two names
MOST_VIDEO, MOST_IMAGE = 3_000_000, 50_000


class Media(ThreadingHTTPServer):
    """Answers by path: ``/status/404``, ``/to/PATH`` (redirects), ``/slow``, ``/cut``, or the bytes in ``files``."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__((HOST, 0), Handler)
        self.files = files
        self.asked: list[str] = []
        self.stop = threading.Event()

    def url(self, path: str, host: str = HOST) -> str:
        return f"http://{host}:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Media
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        media, path = self.server, self.path
        media.asked.append(path)
        self.close_connection = True
        kind, _, rest = path[1:].partition("/")
        if kind == "status":
            self._head(int(rest), length="0")
        elif kind == "to":
            self._head(302, length="0", location=rest if "://" in rest else f"/{rest}")
        elif kind == "slow":
            self._head(200)
            while not media.stop.wait(0.1):
                self.wfile.write(b".")
        elif kind == "cut":
            self._head(200, length="1000")
            self.wfile.write(b"only this")
        elif kind == "unmeasured":
            self._head(200)
            self.wfile.write(media.files["/" + rest])
        else:
            data = media.files[path]
            self._head(200, length=str(len(data)))
            self.wfile.write(data)

    def _head(self, status: int, *, length: str | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("content-length", length)
        self.send_header("connection", "close")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def media(video: Path) -> Iterator[Media]:
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(picture, "PNG")
    files = {
        "/a%20film.mp4": video.read_bytes(),
        "/": video.read_bytes() + b"\0\0\0\x08free",
        "/red.png": picture.getvalue(),
        "/large.mp4": video.read_bytes() + bytes(MOST_VIDEO),
        "/large.png": picture.getvalue() + bytes(MOST_IMAGE),
        "/text.mp4": b"no video at all" * 100,
        "/empty.mp4": b"",
    }
    server = Media(files)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def fetching(serve: Serve) -> Iterator[Live]:
    limits = {"max_upload_bytes": MOST_VIDEO, "max_image_bytes": MOST_IMAGE, "fetch_timeout_s": 1.5}
    with serve(allowed_media_domains=(HOST,), **limits) as live:
        yield live


def ask(live: Live, *urls: str) -> Any:
    parts: list[Any] = []
    for url in urls:
        kind = "image_url" if url.endswith(".png") else "video_url"
        parts.append({"type": kind, kind: {"url": url}})
    content = [*parts, {"type": "text", "text": "What code is on the red star?"}]
    with live.client() as client:
        return client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=8
        )


def test_a_video_behind_a_url_is_as_one_that_was_uploaded(fetching: Live, media: Media, video: Path) -> None:
    """Also behind redirects; the same bytes are prefilled once."""
    answer = ask(fetching, media.url("/a%20film.mp4"))
    assert answer.x2l["evidence"]
    again = ask(fetching, media.url("/to/to/a%20film.mp4").replace("http:", "HTTP:"))
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert again.x2l["file_id"] == answer.x2l["file_id"]
    with fetching.client() as client:
        (file,) = client.files.list().data
        assert (file.id, file.filename, file.bytes) == (answer.x2l["file_id"], "a film.mp4", video.stat().st_size)
        messages: Any = [
            {
                "role": "user",
                "content": [
                    {"type": "file", "file": {"file_id": file.id}},
                    {"type": "text", "text": "What code is on the red star?"},
                ],
            }
        ]
        stored = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)
    assert stored.choices[0].message.content == answer.choices[0].message.content


def test_a_video_without_a_name_has_its_hosts(fetching: Live, media: Media) -> None:
    answer = ask(fetching, media.url("/"))
    with fetching.client() as client:
        assert client.files.retrieve(answer.x2l["file_id"]).filename == HOST


def test_an_image_behind_a_url(fetching: Live, media: Media) -> None:
    seen = ask(fetching, media.url("/red.png"), media.url("/unmeasured/red.png"))
    one = ask(fetching, media.url("/red.png"))
    assert seen.usage.prompt_tokens > one.usage.prompt_tokens > 10


@pytest.mark.parametrize(
    ("path", "status", "code", "message"),
    [
        ("/status/404", 400, "url_not_fetched", "status 404"),
        ("/status/500", 400, "url_not_fetched", "status 500"),
        ("/cut", 400, "url_not_fetched", "(?i)incomplete|closed"),
        ("/slow", 400, "url_not_fetched", "longer than 1.5 s"),
        ("/to" * 7 + "/a%20film.mp4", 400, "url_not_fetched", "redirected more than 5 times"),
        ("/to/ftp://127.0.0.1/a.mp4", 400, "url_not_allowed", "allowed-media-domains"),
        ("/large.mp4", 413, "file_too_large", "larger than 3000000"),
        ("/unmeasured/large.mp4", 413, "file_too_large", "larger than 3000000"),
        ("/large.png", 413, "file_too_large", "larger than 50000"),
        ("/unmeasured/large.png", 413, "file_too_large", "larger than 50000"),
        ("/empty.mp4", 400, "empty_file", "nothing behind"),
        ("/text.mp4", 400, None, "(?i)video"),
    ],
)
def test_what_cannot_be_had_is_refused_and_leaves_nothing(
    fetching: Live, media: Media, path: str, status: int, code: str | None, message: str
) -> None:
    begin_s = time.monotonic()
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        ask(fetching, media.url(path))
    kind = "image_url" if path.endswith(".png") else "video_url"
    assert (refused.value.status_code, refused.value.param) == (status, f"messages[0].content[0].{kind}.url")
    assert code is None or refused.value.code == code
    assert time.monotonic() - begin_s < 20
    assert list(fetching.backend.spool.folder.glob("*.part")) == []


def test_other_hosts_are_never_asked(fetching: Live, media: Media, live: Live) -> None:
    """Not by name, not by a redirect; and none at all where none is allowed."""
    before = len(media.asked)
    for url in (
        media.url("/a%20film.mp4", OTHER_HOST),
        media.url("/red.png", OTHER_HOST),
        media.url("/red.png", f"{HOST}@{OTHER_HOST}"),
        f"http://{HOST}.example.com/a.mp4",
    ):
        with pytest.raises(openai.BadRequestError, match="allowed-media-domains") as refused:
            ask(fetching, url)
        assert refused.value.code == "url_not_allowed"
    with pytest.raises(openai.BadRequestError, match="allowed-media-domains"):
        ask(live, media.url("/a%20film.mp4"))
    assert len(media.asked) == before
    with pytest.raises(openai.BadRequestError, match=OTHER_HOST):
        ask(fetching, media.url(f"/to/{media.url('/a%20film.mp4', OTHER_HOST)}"))
    assert len(media.asked) == before + 1


def test_a_client_that_goes_away_ends_the_fetching(serve: Serve, media: Media) -> None:
    content = [{"type": "video_url", "video_url": {"url": media.url("/slow")}}, {"type": "text", "text": "What?"}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    with serve(allowed_media_domains=(HOST,), fetch_timeout_s=60) as live:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=0.5)
        end_s = time.monotonic() + 10
        while list(live.backend.spool.folder.glob("*.part")):
            assert time.monotonic() < end_s
            time.sleep(0.05)


def test_fetching_ends_when_the_server_stops(media: Media, tmp_path: Path) -> None:
    content = [{"type": "video_url", "video_url": {"url": media.url("/slow")}}, {"type": "text", "text": "What?"}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    options = ("--store", f"disk:{tmp_path}/store", "--allowed-media-domains", f"{OTHER_HOST},{HOST}")
    with serving(*options) as served, ThreadPoolExecutor() as threads:
        before = media.asked.count("/slow")
        asked = threads.submit(httpx.post, f"{served.url}/v1/chat/completions", json=body, timeout=60)
        end_s = time.monotonic() + 10
        while media.asked.count("/slow") == before:
            assert time.monotonic() < end_s
            time.sleep(0.01)
        os.kill(served.pid, signal.SIGTERM)
        reply = asked.result()
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")


@pytest.mark.parametrize("port", [1, 99999])
def test_nobody_listens(fetching: Live, port: int) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be fetched") as refused:
        ask(fetching, f"http://{HOST}:{port}/a.mp4")
    assert refused.value.code == "url_not_fetched"
