"""Videos that come inside a message."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from server.api.context import Services
from server.api.errors import bad_request
from server.api.sources import Source, decode_data_url, open_local, refuse_fetching
from server.video.errors import VideoError
from server.video.reader import Sampling


async def ingest(services: Services, sources: Sequence[Source], sampling: Sampling, tenant: str) -> list[str]:
    """Hands the videos of inline parts to the library and returns their file ids (the same for the same bytes), or
    refuses all of them.

    Raises ApiError: 400 for what is no video or not allowed, 413 for what is too large.
    """
    # Not the event loop's own small pool: checking a video may take long, and questions must not wait for that.
    return await run_in_threadpool(_ingest, services, sources, sampling, tenant)


def _ingest(services: Services, sources: Sequence[Source], sampling: Sampling, tenant: str) -> list[str]:
    library = services.engine.library
    waiting: set[Path] = set()
    try:
        fetched = []
        for source in sources:
            with tempfile.NamedTemporaryFile(dir=services.spool, suffix=".part", delete=False) as file:
                path = Path(file.name)
            waiting.add(path)
            fetched.append((source, path, _fetch(services, source, path)))
        for source, path, _ in fetched[1:]:  # a bad one must not leave those before it in the library
            with _naming(source):
                library.check(path, sampling)
        file_ids = []
        for source, path, filename in fetched:
            waiting.remove(path)  # the library sees to it from here on
            file_ids.append(_create(services, source, path, filename, sampling, tenant))
        return file_ids
    finally:
        for path in waiting:
            path.unlink()


def _create(services: Services, source: Source, path: Path, filename: str, sampling: Sampling, tenant: str) -> str:
    with _naming(source):
        record = services.engine.library.create(
            path,
            filename=filename,
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


def _fetch(services: Services, source: Source, target: Path) -> str:
    """Writes the source's bytes to ``target`` and returns the file's name."""
    if source.scheme == "data":
        target.write_bytes(decode_data_url(source, "video", services.settings.max_inline_bytes))
        return source.filename or "inline"
    if source.scheme == "file":
        file, name = open_local(services, source, services.settings.max_upload_bytes)
        with file, target.open("wb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
        return name
    raise refuse_fetching(source, "video")
