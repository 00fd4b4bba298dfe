"""Videos that come inside a message: data: URLs, and file: URLs below the allowed folder."""

from __future__ import annotations

import base64
import binascii
import os
import re
import shutil
import stat
import tempfile
import urllib.parse
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from server.api.context import Services
from server.api.errors import ApiError, bad_request
from server.api.messages import VideoSource
from server.video.errors import VideoError
from server.video.reader import Sampling

_DATA_URL = re.compile(r"data:([^;,]*)((?:;[^;,]*)*),", re.IGNORECASE)


async def ingest(services: Services, source: VideoSource, sampling: Sampling, tenant: str) -> str:
    """Hands the video of an inline part to the library and returns its file id (the same for the same bytes).

    Raises ApiError: 400 for what is no video or not allowed, 413 for what is too large.
    """
    # Not the event loop's own small pool: checking a video may take long, and questions must not wait for that.
    return await run_in_threadpool(_ingest, services, source, sampling, tenant)


def _ingest(services: Services, source: VideoSource, sampling: Sampling, tenant: str) -> str:
    with tempfile.NamedTemporaryFile(dir=services.spool, suffix=".part", delete=False) as file:
        path = Path(file.name)
    try:
        filename = _fetch(services, source, path)
    except BaseException:
        path.unlink()
        raise
    try:
        record = services.engine.library.create(
            path,
            filename=filename,
            purpose="user_data",
            sampling=sampling,
            tenant=tenant,
            expires_after_s=None,
            source="inline",
        )
    except VideoError as error:
        raise bad_request(str(error), param=source.param, code=error.code) from error
    return record.id


def _fetch(services: Services, source: VideoSource, target: Path) -> str:
    """Writes the source's bytes to ``target`` and returns the file's name."""
    scheme = source.location.partition(":")[0].lower()
    if scheme == "data":
        target.write_bytes(_decode(source, services.settings.max_inline_bytes))
        return source.filename or "inline"
    if scheme == "file":
        return _copy_local(services, source, target)
    raise bad_request(
        "http(s) URLs are not fetched by this server: upload the video through /v1/files",
        param=source.param,
        code="url_not_allowed",
    )


def _decode(source: VideoSource, max_bytes: int) -> bytes:
    url = source.location
    head = _DATA_URL.match(url)
    if head is None or not head[2].lower().endswith(";base64"):
        raise bad_request("Not a base64 data: URL", param=source.param, code="invalid_data_url")
    if not head[1].lower().startswith("video/") and head[1].lower() != "application/octet-stream":
        raise bad_request(
            f"A data: URL of type {head[1][:40]!r} is no video", param=source.param, code="invalid_data_url"
        )
    if (len(url) - head.end()) * 3 // 4 - 2 > max_bytes:
        raise ApiError(413, f"The video is larger than {max_bytes} bytes", param=source.param, code="file_too_large")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad_request("The data: URL holds invalid base64", param=source.param, code="invalid_base64") from None
    if not data:
        raise bad_request("The data: URL is empty", param=source.param, code="empty_file")
    return data


def _copy_local(services: Services, source: VideoSource, target: Path) -> str:
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
        if found.st_size > settings.max_upload_bytes:
            raise ApiError(413, f"The file is larger than {settings.max_upload_bytes} bytes", param=source.param)
        with os.fdopen(handle, "rb", closefd=False) as file, target.open("wb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
    finally:
        os.close(handle)
    return path.name
