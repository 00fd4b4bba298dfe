"""A multipart upload, written to disk as it arrives: never in memory, never twice, never over the limit."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from server.api.errors import ApiError, bad_request
from server.api.middleware import discard_body, expects_go_ahead

_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 16 * 1024
_WRITE_BYTES = 1 << 20  # hand the disk a megabyte at a time: a thread hop per network read would cost more


@dataclass(frozen=True, slots=True)
class Received:
    """A file that has arrived, on disk at ``path`` (whoever holds this owns it), and the form's other fields."""

    path: Path
    filename: str
    nbytes: int
    sha256: str
    fields: Mapping[str, str]


async def receive_file(request: Request, folder: Path, max_bytes: int, *, name: str = "file") -> Received:
    """Receives a form with one part that is a file, ``name``, into a new file in ``folder``.

    Raises ApiError (400 a malformed form, 413 too large), OSError and ClientDisconnect; then nothing stays on disk.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise bad_request(
            f"The body must be multipart/form-data with a part named {name!r}", param=name, code="invalid_body"
        )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes + _MAX_FIELDS * _MAX_FIELD_BYTES:
        await discard_unread(request)
        raise _too_large(max_bytes, name)
    with _new_file(folder) as file:
        form = _Form(boundary, file, max_bytes, name)
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            more = message.get("more_body", False)
            try:
                form.feed(message.get("body", b""))
            except ApiError:
                if more:
                    await discard_body(request.receive)
                raise
            if len(form.pending) >= _WRITE_BYTES or not more:
                await asyncio.to_thread(form.flush)
        return form.finish(Path(file.name))


async def discard_unread(request: Request) -> None:
    """To be called before refusing a body of which nothing was read, unless the client waits for a word first."""
    if not expects_go_ahead(request.headers):
        await discard_body(request.receive)


@contextmanager
def _new_file(folder: Path) -> Iterator[IO[bytes]]:
    """A file that stays if the block ends well."""
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
        try:
            yield file
        except BaseException:
            Path(file.name).unlink()
            raise


def _too_large(max_bytes: int, name: str) -> ApiError:
    return ApiError(413, f"{name} is larger than {max_bytes} bytes", param=name, code="file_too_large")


def _unescaped(filename: str) -> str:
    """Without what forms escape in a name (HTML, multipart form data): these three and no others."""
    return filename.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")


class _Form:
    """The parser's callbacks. ``pending`` holds file bytes not yet written."""

    def __init__(self, boundary: bytes, file: IO[bytes], max_bytes: int, name: str) -> None:
        self.pending = bytearray()
        self._name = name
        self._file = file
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._hash = hashlib.sha256()
        self._filename: str | None = None
        self._fields: dict[str, str] = {}
        self._complete = False
        self._disposition = b""
        self._header = b""
        self._field: str | None = None  # None while the file's own part runs
        self._value = bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )
        self._value_of_header = b""

    def feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError:
            raise bad_request("The multipart body is malformed", code="invalid_body") from None

    def flush(self) -> None:
        self._file.write(self.pending)
        self._file.flush()  # a full disk must be known here, not when the file is closed
        self._hash.update(self.pending)
        self.pending.clear()

    def finish(self, path: Path) -> Received:
        if not self._complete:
            raise bad_request("The multipart body ends early", code="invalid_body")
        if self._filename is None:
            raise bad_request(f"{self._name} is missing", param=self._name, code="missing_required_parameter")
        if self._nbytes == 0:
            raise bad_request(f"{self._name} is empty", param=self._name, code="empty_file")
        return Received(path, self._filename, self._nbytes, self._hash.hexdigest(), self._fields)

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value_of_header += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value_of_header
        self._header = self._value_of_header = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._disposition = b""
        name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if name == self._name:
            if self._filename is not None:
                raise bad_request(f"{name} stands twice in the form", param=name)
            self._filename = _unescaped((filename or b"").decode("utf-8", "replace")) or "video"
            self._field = None
            return
        if name in self._fields:
            raise bad_request(f"{name[:80]} stands twice in the form", param=name[:80])
        if filename is not None or not name or len(self._fields) >= _MAX_FIELDS:
            raise bad_request(f"Unexpected form part {name[:80]!r}", param=name[:80] or None)
        self._field = name

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._nbytes += end - start
            if self._nbytes > self._max_bytes:
                raise _too_large(self._max_bytes, self._name)
            self.pending += data[start:end]
        else:
            self._value += data[start:end]
            if len(self._value) > _MAX_FIELD_BYTES:
                raise bad_request(f"{self._field[:80]} is too long", param=self._field[:80])

    def _on_part_end(self) -> None:
        if self._field is not None:
            self._fields[self._field] = self._value.decode("utf-8", "replace")
            self._value.clear()

    def _on_end(self) -> None:
        self._complete = True
