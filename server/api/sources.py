"""Where the media of a message come from: stored files, URLs (data:, and file: below the allowed folder; http(s) is
:mod:`server.api.fetch`'s)."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from server.api.context import Services
from server.api.errors import ApiError, bad_request

_DATA_URL = re.compile(r"data:([^;,]*)((?:;[^;,]*)*),", re.IGNORECASE)

Kind = Literal["video", "image"]


@dataclass(frozen=True, slots=True)
class Source:
    """A video or an image of a message: a stored file's id, or a URL (data:, file:, http:, https:).

    ``param`` is the field of the request that holds it.
    """

    location: str
    filename: str
    param: str

    @property
    def is_stored(self) -> bool:
        """Whether ``location`` is a file id."""
        return self.location.startswith("file-")

    @property
    def scheme(self) -> str:
        """The URL's scheme in lower case."""
        return self.location.partition(":")[0].lower()

    @property
    def is_url(self) -> bool:
        """Whether ``location`` is a URL of a kind that is known here, if not always allowed."""
        return self.is_remote or self.scheme in {"data", "file"}

    @property
    def is_remote(self) -> bool:
        """Whether it has to be fetched from somewhere else."""
        return self.scheme in {"http", "https"}


def decode_data_url(source: Source, kind: Kind, max_bytes: int) -> bytes:
    """The bytes in a base64 data: URL. Raises ApiError: 400, or 413 above ``max_bytes``."""
    url = source.location
    head = _DATA_URL.match(url)
    if head is None or not head[2].lower().endswith(";base64"):
        raise bad_request("Not a base64 data: URL", param=source.param, code="invalid_data_url")
    if not head[1].lower().startswith(f"{kind}/") and head[1].lower() != "application/octet-stream":
        raise bad_request(
            f"A data: URL of type {head[1][:40]!r} is no {kind}", param=source.param, code="invalid_data_url"
        )
    if (len(url) - head.end()) * 3 // 4 - 2 > max_bytes:
        raise ApiError(413, f"The {kind} is larger than {max_bytes} bytes", param=source.param, code="file_too_large")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad_request("The data: URL holds invalid base64", param=source.param, code="invalid_base64") from None
    if not data:
        raise bad_request("The data: URL is empty", param=source.param, code="empty_file")
    return data


def open_local(services: Services, source: Source, max_bytes: int) -> tuple[BinaryIO, str]:
    """The file of a file: URL, to be closed by the caller, and its name. Raises ApiError: 400, or 413 above
    ``max_bytes``."""
    settings = services.settings
    refusal = bad_request(
        "file: URLs are read below --allowed-local-media-path only", param=source.param, code="url_not_allowed"
    )
    parsed = urllib.parse.urlsplit(source.location)
    path_text = urllib.parse.unquote(parsed.path)
    if settings.allowed_local_media_path is None or parsed.netloc not in ("", "localhost") or "\0" in path_text:
        raise refusal
    root = settings.allowed_local_media_path.resolve()
    try:
        path = Path(path_text).resolve(strict=True)
        if not path.is_relative_to(root):
            raise refusal
        # O_NOFOLLOW: the resolved path must still be what was checked; O_NONBLOCK: a pipe must not hang us.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        if not Path(os.path.normpath(path_text)).is_relative_to(root):
            raise refusal from None  # whether a file exists outside is not told
        raise bad_request("No such file below the allowed folder", param=source.param, code="file_not_found") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
            raise bad_request("Not a regular file with content", param=source.param)
        if found.st_size > max_bytes:
            raise ApiError(413, f"The file is larger than {max_bytes} bytes", param=source.param)
        return os.fdopen(handle, "rb"), path.name
    except BaseException:
        os.close(handle)
        raise
