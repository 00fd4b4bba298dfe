"""Each bad input is one clear error in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import base64
import io
import json
import socket
import sys
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from clips import Clips
from live import MODEL, Live, Serve, ask
from PIL import Image

from server.api import middleware
from server.video.reader import VideoReader


@pytest.fixture(autouse=True)
def unharmed(live: Live, client: openai.OpenAI, file_id: str) -> Iterator[None]:
    """After each test the server answers as before, and nothing is left on its way in."""
    before = [file.id for file in client.files.list()]
    yield
    assert client.chat.completions.create(model=MODEL, messages=ask(file_id), max_tokens=1).choices
    assert [file.id for file in client.files.list()] == before


def refusal(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, after checking its shape."""
    assert reply.status_code == status, reply.text
    assert reply.headers["x-request-id"].startswith("req_")
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "Traceback" not in error["message"] and "/tmp" not in error["message"]
    return error


def post(live: Live, path: str, **options: Any) -> httpx.Response:
    return httpx.post(live.url + path, timeout=60, **options)


def upload(live: Live, data: bytes, **form: str) -> httpx.Response:
    return post(live, "/v1/files", files={"file": ("a.mp4", data)}, data={"purpose": "user_data"} | form)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (320, 240)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("data", [b"hello, I am a text\n" * 500, picture(), b"\0" * 5000, b"\x00\x00\x00\x18ftypmp42"])
def test_what_is_no_video(live: Live, data: bytes) -> None:
    assert refusal(upload(live, data), 400)["param"] == "file"


def test_an_empty_file(live: Live) -> None:
    assert refusal(upload(live, b""), 400)["code"] == "empty_file"


def test_sound_only(live: Live, tmp_path: Path) -> None:
    import av
    import numpy as np

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44_100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44_100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    refusal(upload(live, path.read_bytes()), 400)


def test_a_truncated_video(live: Live, video: Path, client: openai.OpenAI) -> None:
    data = video.read_bytes()
    refusal(upload(live, data[: len(data) // 3]), 400)  # the index stands at the end: nothing can be read


@pytest.mark.parametrize(
    ("decoder", "code"),
    [("import time; time.sleep(600)", "video_timeout"), ("import os; os.abort()", "video_decoder_crashed")],
)
def test_a_decoder_that_hangs_or_crashes(
    serve: Serve, video: Path, monkeypatch: pytest.MonkeyPatch, decoder: str, code: str
) -> None:
    with serve(decode_timeout_s=1.5) as careful:
        with monkeypatch.context() as patch:
            patch.setitem(VideoReader.__init__.__kwdefaults__, "command", (sys.executable, "-c", decoder))
            assert refusal(upload(careful, video.read_bytes()), 400)["code"] == code
        assert httpx.get(f"{careful.url}/ready").status_code == 200
        assert httpx.get(f"{careful.url}/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"fps": "fast"}, "fps"),
        ({"fps": "nan"}, "fps"),
        ({"fps": "0"}, "fps"),
        ({"fps": "1000"}, "fps"),
        ({"max_frames": "-1"}, "max_frames"),
        ({"max_frames": "1.5"}, "max_frames"),
        ({"expires_after[seconds]": "60"}, "expires_after[anchor]"),
        ({"expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "0"}, "expires_after[seconds]"),
        ({"resolution": "4k"}, "resolution"),
    ],
)
def test_form_fields(live: Live, video: Path, form: dict[str, str], param: str) -> None:
    assert refusal(upload(live, video.read_bytes(), **form), 400)["param"] == param


def test_malformed_forms(live: Live) -> None:
    assert refusal(post(live, "/v1/files", json={"file": "x"}), 400)["param"] == "file"
    assert refusal(post(live, "/v1/files", files={"purpose": (None, "vision")}), 400)["param"] == "file"
    refusal(post(live, "/v1/files", data={"purpose": "vision"}, files={"video": b"x"}), 400)
    broken = {"content-type": "multipart/form-data; boundary=b"}
    refusal(post(live, "/v1/files", content=b"--b\r\nnonsense", headers=broken), 400)


def test_over_the_size_limit(live: Live) -> None:
    assert refusal(upload(live, b"x" * 6_000_001), 413)["code"] == "file_too_large"
    assert refusal(upload(live, b"x" * 16_000_000), 413)["code"] == "file_too_large"

    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(10):
            yield b"x" * 1_000_000

    unannounced = {"content-type": "multipart/form-data; boundary=b"}
    refusal(post(live, "/v1/files", content=endless(), headers=unannounced), 413)


def test_over_the_limits_of_a_video(serve: Serve, clips: Clips) -> None:
    clip = clips("mp4").path.read_bytes()
    for limit in ({"max_duration_s": 0.5}, {"max_pixels": 1000}, {"max_frames": 1}):
        with serve(**limit) as strict:
            refusal(upload(strict, clip), 400)


def test_unknown_and_deleted_files(live: Live, client: openai.OpenAI, video: Path) -> None:
    deleted = client.files.create(file=video, purpose="user_data").id
    client.files.delete(deleted)
    for file_id in (deleted, "file-0123456789abcdef01234567", "file-..%2F..%2Fetc", "nonsense"):
        for path in ("", "/content", "/chunks", "/events", "/chunks/0/thumbnail"):
            assert refusal(httpx.get(f"{live.url}/v1/files/{file_id}{path}"), 404)["code"] in (
                "file_not_found",
                "unknown_url",
            )
        refusal(httpx.delete(f"{live.url}/v1/files/{file_id}"), 404)
    refusal(post(live, f"/v1/files/{deleted}/relevance", json={"question": "What?"}), 404)
    for file_id in (deleted, "nonsense"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.chat.completions.create(model=MODEL, messages=ask(file_id))
        assert refused.value.code == "file_not_found"
        assert refused.value.param == "messages[0].content[0].file.file_id"


def chat(live: Live, body: Any) -> httpx.Response:
    good = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    return post(live, "/v1/chat/completions", json=good | body)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "pirate", "content": "Arr"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": {"text": "Hello"}}]}, "messages[0].content"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"json_schema": "{}"}, "json_schema"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"x2l": {"reload": 1, "budget_tokens": 500}}, "x2l"),
        ({"x2l": "much"}, "x2l"),
        ({"reload": 3}, "reload"),
    ],
)
def test_chat_fields(live: Live, body: dict[str, Any], param: str) -> None:
    assert refusal(chat(live, body), 400)["param"] == param


HALF = "x \ud800"  # of a character


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": HALF}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "system", "content": HALF}, {"role": "user", "content": "Hello"}]},
            "messages[0].content",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hello"},
                    {"role": "assistant", "content": HALF},
                    {"role": "user", "content": "And?"},
                ]
            },
            "messages[1].content",
        ),
        ({"stop": HALF}, "stop"),
        ({"stop": ["a", HALF]}, "stop"),
        ({"model": HALF}, "model"),
        ({"x2l": {HALF: 1}}, "x2l"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": f"file:///{HALF}"}]}]},
            "messages[0].content[0].video",
        ),
    ],
)
def test_half_a_character(live: Live, body: dict[str, Any], param: str, stream: bool) -> None:
    error = refusal(post_raw(live, "/v1/chat/completions", body | {"stream": stream}), 400)
    assert error["param"] == param and "surrogate" in error["message"]


def test_half_a_character_elsewhere(live: Live, file_id: str) -> None:
    for path, body, param in (
        (f"/v1/files/{file_id}/relevance", {"question": HALF}, "question"),
        (f"/v1/files/{file_id}/relevance", {"question": "What?", HALF: 1}, None),
        ("/v1/uploads", {"filename": HALF, "purpose": "user_data", "bytes": 1, "mime_type": "video/mp4"}, "filename"),
    ):
        assert refusal(post_raw(live, path, body), 400)["param"] == param
    whole = "What is \N{CLAPPER BOARD}?"  # goes as two halves
    assert post_raw(live, f"/v1/files/{file_id}/relevance", {"question": whole}).status_code == 200


def test_a_temperature_that_is_no_number(live: Live) -> None:
    error = refusal(post_raw(live, "/v1/chat/completions", {"temperature": float("nan")}), 400)
    assert (error["param"], error["message"]) == ("temperature", "temperature must be a finite number")


def post_raw(live: Live, path: str, body: dict[str, Any]) -> httpx.Response:
    """As ``json.dumps`` writes it, with half characters and NaN."""
    good = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    content = json.dumps(good | body if "chat" in path else body)
    return post(live, path, content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("part", "param", "told"),
    [
        ({"text": "Hello"}, "type", "type is missing"),
        ({"type": "image_url", "image_url": "data:image/png;base64,AA=="}, "image_url", "must be an object"),
        ({"type": "text", "text": 5}, "text", "must be a string"),
    ],
)
def test_parts_that_are_none(live: Live, part: dict[str, Any], param: str, told: str) -> None:
    error = refusal(chat(live, {"messages": [{"role": "user", "content": [part]}]}), 400)
    assert error["param"] == f"messages[0].content[0].{param}" and error["message"].endswith(told)


def test_an_unknown_model(live: Live, client: openai.OpenAI) -> None:
    assert refusal(chat(live, {"model": "gpt-9"}), 404)["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize("stream", [False, True])
def test_dials_that_the_video_cannot_meet(live: Live, file_id: str, stream: bool) -> None:
    for dials, param in (
        ({"chunks": [0, 3]}, "x2l.chunks"),
        ({"chunks": [-1]}, "x2l.chunks"),
        ({"budget_tokens": 1}, "x2l.budget_tokens"),
        ({"start_s": 20, "end_s": 10}, "x2l.start_s"),
        ({"start_s": 1000}, "x2l.start_s"),
        ({"start_s": 40, "end_s": 60, "chunks": [0]}, "x2l.chunks"),
    ):
        reply = chat(live, {"messages": ask(file_id), "x2l": dials, "stream": stream})
        assert refusal(reply, 400)["param"] == param


def test_a_huge_prompt(live: Live, file_id: str) -> None:
    question = "why? " * 200_000
    for messages in (ask(file_id, question), [{"role": "user", "content": question}]):
        error = refusal(chat(live, {"messages": messages}), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    error = refusal(post(live, f"/v1/files/{file_id}/relevance", json={"question": question}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "question")


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("data:video/mp4;base64,@@@not base64@@@", 400, "invalid_base64"),
        ("data:video/mp4;base64,QUJ", 400, "invalid_base64"),
        ("data:video/mp4;base64,", 400, "empty_file"),
        ("data:video/mp4,plain", 400, "invalid_data_url"),
        ("data:image/png;base64,QUJD", 400, "invalid_data_url"),
        ("data:video/mp4", 400, "invalid_data_url"),
        ("data:video/mp4;base64," + base64.b64encode(b"no video at all" * 100).decode(), 400, None),
        ("data:video/mp4;base64," + "QUJD" * 700_000, 413, "file_too_large"),
        ("http://127.0.0.1:1/a.mp4", 400, "url_not_allowed"),
        ("https://example.com/a.mp4", 400, "url_not_allowed"),
        ("file:///etc/passwd", 400, "url_not_allowed"),
        ("ftp://example.com/a.mp4", 400, "invalid_url"),
        ("/etc/passwd", 400, "invalid_url"),
    ],
)
def test_video_urls(live: Live, url: str, status: int, code: str | None) -> None:
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What?"}]
    error = refusal(chat(live, {"messages": [{"role": "user", "content": content}]}), status)
    assert error["param"] == "messages[0].content[0].video_url.url"
    assert code is None or error["code"] == code


def test_sampling_of_a_stored_video_cannot_be_changed(live: Live, file_id: str) -> None:
    kwargs = {"video": {"fps": 2}}
    assert refusal(chat(live, {"messages": ask(file_id), "media_io_kwargs": kwargs}), 400)["param"] == (
        "media_io_kwargs.video"
    )


def test_bodies_that_are_no_json(live: Live) -> None:
    url = f"{live.url}/v1/chat/completions"
    header = {"content-type": "application/json"}
    for body in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b"5"):
        refusal(httpx.post(url, content=body, headers=header), 400)
    refusal(httpx.post(url, content=b'{"model": "x"}', headers={"content-type": "text/plain"}), 400)
    refusal(httpx.post(url, content=b" " * 5_000_000, headers=header, timeout=60), 413)


def test_unknown_routes_and_methods(live: Live) -> None:
    assert refusal(httpx.get(f"{live.url}/v1/nothing"), 404)["code"] == "unknown_url"
    assert refusal(httpx.put(f"{live.url}/v1/files"), 405)["code"] == "method_not_allowed"
    refusal(httpx.get(f"{live.url}/v1/files?limit=0"), 400)
    refusal(httpx.get(f"{live.url}/playground/../../pyproject.toml"), 404)


def exchange(live: Live, request: bytes) -> httpx.Response:
    """What comes back for bytes that may be no whole request."""
    address = httpx.URL(live.url)
    with socket.create_connection((address.host, address.port), timeout=30) as wire:
        wire.sendall(request)
        reply = HTTPResponse(wire)
        reply.begin()
        return httpx.Response(reply.status, headers=reply.getheaders(), content=reply.read())


@pytest.mark.parametrize(
    ("path", "head", "body"),
    [
        ("/v1/chat/completions", "content-type: application/json", b'{"model":'),
        (
            "/v1/files",
            "content-type: multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="fi',
        ),
    ],
)
def test_a_body_that_stops_arriving(
    live: Live, monkeypatch: pytest.MonkeyPatch, path: str, head: str, body: bytes
) -> None:
    monkeypatch.setattr(middleware, "STALL_S", 0.3)
    reply = exchange(live, f"POST {path} HTTP/1.1\r\nhost: x\r\n{head}\r\ncontent-length: 1000\r\n\r\n".encode() + body)
    assert refusal(reply, 408)["code"] == "request_timeout"
    assert list(live.backend.spool.folder.glob("*.part")) == []


@pytest.mark.parametrize("go_ahead", ["", "expect: 100-continue\r\n"])
def test_a_body_that_says_that_it_is_too_large(live: Live, monkeypatch: pytest.MonkeyPatch, go_ahead: str) -> None:
    monkeypatch.setattr(middleware, "_LINGER_S", 0.3)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{go_ahead}content-length: 99999999999\r\n\r\n"
    assert refusal(exchange(live, head.encode()), 413)["code"] == "request_too_large"


def test_an_encoded_body(live: Live) -> None:
    reply = post(live, "/v1/chat/completions", content=b"{}", headers={"content-encoding": "gzip"})
    assert refusal(reply, 415)["code"] == "unsupported_encoding"


def test_a_long_path_is_not_told_back(live: Live) -> None:
    assert len(refusal(httpx.get(f"{live.url}/{'a' * 20_000}"), 404)["message"]) < 300
