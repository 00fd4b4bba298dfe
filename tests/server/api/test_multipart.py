from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from server.api.errors import ApiError
from server.api.multipart import Received, receive_file

BOUNDARY = "frontier"


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'
    head += f'; filename="{filename}"\r\nContent-Type: video/mp4' if filename else ""
    return head.encode() + b"\r\n\r\n" + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def receive(
    body: bytes, folder: Path, *, max_bytes: int = 1000, piece: int = 7, cut: bool = False, headers: tuple = ()
) -> Received:
    """Sends ``body`` in small pieces; with ``cut`` the client goes away instead of ending."""
    pieces = [body[start : start + piece] for start in range(0, len(body), piece)]
    messages = [{"type": "http.request", "body": data, "more_body": True} for data in pieces]
    messages.append({"type": "http.disconnect"} if cut else {"type": "http.request", "body": b"", "more_body": False})
    queue = iter(messages)

    async def next_message() -> dict[str, object]:
        return next(queue, {"type": "http.disconnect"})

    content_type = (b"content-type", f"multipart/form-data; boundary={BOUNDARY}".encode())
    request = Request({"type": "http", "method": "POST", "headers": [content_type, *headers]}, next_message)
    return asyncio.run(receive_file(request, folder, max_bytes))


@given(data=st.binary(min_size=1, max_size=600), piece=st.integers(1, 300))
def test_bytes_arrive_as_sent_however_they_are_cut(
    data: bytes, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    body = form(part("purpose", b"vision"), part("file", data, "a.mp4"), part("expires_after[seconds]", b"60"))
    upload = receive(body, folder, piece=piece)
    assert upload.path.read_bytes() == data
    assert (upload.nbytes, upload.filename) == (len(data), "a.mp4")
    assert upload.sha256 == hashlib.sha256(data).hexdigest()
    assert upload.fields == {"purpose": "vision", "expires_after[seconds]": "60"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (form(part("file", b"x" * 1001, "a.mp4")), 413),
        (form(part("file", b"", "a.mp4")), 400),
        (form(part("purpose", b"vision")), 400),
        (form(part("file", b"x", "a.mp4"), part("file", b"y", "b.mp4")), 400),
        (form(part("file", b"x", "a.mp4"), part("other", b"y", "b.mp4")), 400),
        (form(part("purpose", b"vision"), part("purpose", b"vision"), part("file", b"x", "a.mp4")), 400),
        (form(part("purpose", b"x" * 20_000), part("file", b"x", "a.mp4")), 400),
        (part("file", b"x", "a.mp4"), 400),
        (b"not multipart at all", 400),
        (b"", 400),
    ],
)
def test_a_bad_form_is_refused_and_leaves_nothing(body: bytes, status: int, tmp_path: Path) -> None:
    with pytest.raises(ApiError) as refused:
        receive(body, tmp_path)
    assert refused.value.status_code == status
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_as_it_was_before_the_form_escaped_it(tmp_path: Path) -> None:
    upload = receive(form(part("file", b"x", "my %22v%22 100%.mp4")), tmp_path)
    assert upload.filename == 'my "v" 100%.mp4'


def test_an_aborted_upload_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ClientDisconnect):
        receive(part("file", b"x" * 500, "a.mp4"), tmp_path, cut=True)
    assert list(tmp_path.iterdir()) == []


def test_an_announced_length_over_the_limit_is_refused_before_reading(tmp_path: Path) -> None:
    with pytest.raises(ApiError) as refused:
        receive(b"", tmp_path, headers=((b"content-length", b"10000000"), (b"expect", b"100-continue")))
    assert refused.value.status_code == 413
