"""A live server on loopback with the real engine, and the clients that drive it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live import Live, Serve

from server.app import open_backend
from server.config import Settings
from server.models.tiny.make_video import make_video
from server.serving import running


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Starts a server with a few settings: ``with serve(api_key=("a",)) as live``. Answers of an ``endless`` one run
    to max_tokens."""

    @contextlib.contextmanager
    def start(*, endless: bool = False, **options: Any) -> Iterator[Live]:
        settings = Settings(**{"store": "memory://", "port": 0, "log_level": "warning", "device": "cpu"} | options)
        backend = open_backend(settings)
        if endless:
            backend.model.end_ids = frozenset()
        with running(settings, backend) as url:
            yield Live(url, backend)

    return start


@pytest.fixture(scope="session")
def live(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The server that most tests share."""
    store = f"disk:{tmp_path_factory.mktemp('store') / 'x2l'}"
    with serve(store=store, keep_alive_s=0.2, max_upload_bytes=6_000_000, max_inline_bytes=2_000_000) as server:
        yield server


@pytest.fixture(scope="session")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with live.client() as stock:
        yield stock


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic mp4 of three chunks."""
    path = tmp_path_factory.mktemp("video") / "made.mp4"
    make_video(path, seed=3, chunks=3)
    return path


@pytest.fixture(scope="session")
def file_id(client: openai.OpenAI, video: Path) -> str:
    """The id of the video above, uploaded and processed."""
    file = client.files.create(file=video, purpose="user_data")
    assert client.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"
    return file.id


@pytest.fixture(autouse=True)
def no_unforeseen_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No request may end in an error that nobody foresaw."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
