"""A video that fails or goes while it is asked about: the refusal names its part of the request."""

from __future__ import annotations

import base64
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from clips import blank_media
from live import MODEL, Live
from until import until


@pytest.mark.parametrize("stream", [False, True])
def test_a_video_that_turns_out_to_be_damaged(
    live: Live, client: openai.OpenAI, video: Path, tmp_path: Path, stream: bool
) -> None:
    damaged = tmp_path / "damaged.mp4"
    shutil.copy(video, damaged)
    blank_media(damaged, 0.5)
    before = {file.id for file in client.files.list()}
    url = f"data:video/mp4;base64,{base64.b64encode(damaged.read_bytes()).decode()}"
    inline = {"type": "video_url", "video_url": {"url": url}}
    error = failure(chat(live, {"messages": about(inline), "stream": stream}))
    assert (error["param"], error["code"]) == ("messages[0].content[1].video_url.url", "video_failed")
    assert error["message"].startswith("The video cannot be used: ") and "file-" not in error["message"]

    stored = client.files.create(file=damaged, purpose="user_data").id
    assert client.files.wait_for_processing(stored, poll_interval=0.1).status == "error"
    error = failure(chat(live, {"messages": about({"type": "video", "video": stored}), "stream": stream}))
    assert error["param"] == "messages[0].content[1].video" and stored in error["message"]
    for file in {file.id for file in client.files.list()} - before:
        client.files.delete(file)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["inline", "stored"])
def test_a_video_that_is_deleted_while_the_question_waits(
    live: Live, client: openai.OpenAI, video: Path, stream: bool, kind: str
) -> None:
    before = {file.id for file in client.files.list()}

    def new() -> set[str]:
        return {file.id for file in client.files.list()} - before

    if kind == "stored":
        stored = client.files.create(file=video, purpose="user_data", extra_body={"fps": "4"}).id
        part, kwargs = {"type": "file", "file": {"file_id": stored}}, {}
    else:
        url = f"data:video/mp4;base64,{base64.b64encode(video.read_bytes()).decode()}"
        part, kwargs = {"type": "video_url", "video_url": {"url": url}}, {"media_io_kwargs": {"video": {"fps": 4}}}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(chat, live, {"messages": about(part), "stream": stream} | kwargs)
        in_flight = live.backend.engine.metrics.registry.get_sample_value
        until(lambda: in_flight("x2l_requests_waiting"))
        (deleted,) = new()
        client.files.delete(deleted)
        error = failure(waiting.result(), 404)
    assert error["code"] == "file_not_found"
    if kind == "stored":
        assert error["param"] == "messages[0].content[1].file.file_id" and deleted in error["message"]
    else:
        assert error["param"] == "messages[0].content[1].video_url.url" and "file-" not in error["message"]


def about(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": "What is shown?"}, part]}]


def failure(reply: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error object of a reply, also of one that had begun as a stream."""
    if not reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.status_code == status
        return reply.json()["error"]
    *_, last = (line for line in reply.text.splitlines() if line.startswith("data: "))
    return json.loads(last.removeprefix("data: "))["error"]


def chat(live: Live, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/chat/completions", json={"model": MODEL, "max_tokens": 2} | body, timeout=60)
