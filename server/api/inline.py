"""Videos that come inside a message."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from starlette.concurrency import run_in_threadpool

from server.api.context import Services
from server.api.errors import bad_request
from server.api.fetch import fetch
from server.api.sources import Source, decode_data_url, open_local
from server.video.errors import VideoError
from server.video.reader import Sampling


async def ingest(services: Services, sources: Sequence[Source], sampling: Sampling, tenant: str) -> list[str]:
    """Hands the videos of inline parts to the library and returns their file ids (the same for the same bytes), or
    refuses all of them.

    Raises ApiError: 400 for what is no video or not allowed, 413 for what is too large.
    """
    copies: list[_Copy] = []
    taken = threading.Event()
    try:
        for source in sources:
            with tempfile.NamedTemporaryFile(dir=services.spool, suffix=".part", delete=False) as file:
                copies.append(copy := _Copy(source, Path(file.name)))
                if source.is_remote:
                    copy.filename = await fetch(services, source, "video", file, services.settings.max_upload_bytes)
                else:
                    copy.filename = await run_in_threadpool(_copy, services, source, file)
        # Not the event loop's own small pool: checking a video may take long, and questions must not wait for that.
        return await run_in_threadpool(_take, services, copies, taken, sampling, tenant)
    finally:
        if not taken.is_set():  # otherwise a thread has them, and goes on if we are cancelled
            for copy in copies:
                copy.path.unlink()


@dataclass(slots=True)
class _Copy:
    """What a source holds, in a file of ours; and its name there."""

    source: Source
    path: Path
    filename: str = ""


def _take(
    services: Services, copies: Sequence[_Copy], taken: threading.Event, sampling: Sampling, tenant: str
) -> list[str]:
    """Hands all copies to the library or none, and sees to those that it has not got."""
    taken.set()
    waiting = list(copies)
    try:
        for copy in copies[1:]:  # a bad one must not leave those before it in the library
            with _naming(copy.source):
                services.engine.library.check(copy.path, sampling)
        file_ids = []
        while waiting:
            file_ids.append(_create(services, waiting.pop(0), sampling, tenant))  # the library sees to it from here on
        return file_ids
    finally:
        for copy in waiting:
            copy.path.unlink()


def _create(services: Services, copy: _Copy, sampling: Sampling, tenant: str) -> str:
    with _naming(copy.source):
        record = services.engine.library.create(
            copy.path,
            filename=copy.filename,
            purpose="user_data",
            sampling=sampling,
            tenant=tenant,
            expires_after_s=None,
            source="inline",
        )
    return record.id


@contextmanager
def _naming(source: Source) -> Iterator[None]:
    """What is wrong with a video becomes a 400 that names its part."""
    try:
        yield
    except VideoError as error:
        raise bad_request(str(error), param=source.param, code=error.code) from error


def _copy(services: Services, source: Source, target: IO[bytes]) -> str:
    """Writes the bytes of a data: or file: URL to ``target`` and returns the file's name."""
    if source.scheme == "data":
        target.write(decode_data_url(source, "video", services.settings.max_inline_bytes))
        return source.filename or "inline"
    file, name = open_local(services, source, services.settings.max_upload_bytes)
    with file:
        shutil.copyfileobj(file, target, 1 << 20)
    return name
