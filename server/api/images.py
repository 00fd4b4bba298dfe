"""Images inside a message: decoded for one request, and kept nowhere."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from server.api.context import Services
from server.api.errors import bad_request
from server.api.fetch import fetch
from server.api.sources import Source, decode_data_url, open_local
from server.video.image import ImageError, read_image


async def see(services: Services, sources: Sequence[Source]) -> tuple[Any, ...]:
    """The images as the engine takes them, in their order.

    Raises ApiError that names the part: 400 for what is no image or not allowed, 413 for what is too large.
    """
    seen = []
    for source in sources:
        data = await _fetch(services, source) if source.is_remote else None
        async with services.image_slots:
            seen.append(await run_in_threadpool(_see, services, source, data, alone=len(sources) == 1))
    return tuple(seen)


def _see(services: Services, source: Source, fetched: bytes | None, *, alone: bool) -> Any:
    data = _read(services, source) if fetched is None else fetched
    try:
        frame = read_image(data, services.settings.max_image_pixels)
    except ImageError as error:
        raise bad_request(f"{source.param}: {error}", param=source.param, code=error.code) from error
    return services.engine.preprocess_image(frame, alone=alone)


async def _fetch(services: Services, source: Source) -> bytes:
    target = io.BytesIO()
    await fetch(services, source, "image", target, services.settings.max_image_bytes)
    return target.getvalue()


def _read(services: Services, source: Source) -> bytes:
    """What a data: or file: URL holds."""
    max_bytes = services.settings.max_image_bytes
    if source.scheme == "data":
        return decode_data_url(source, "image", max_bytes)
    file, _ = open_local(services, source, max_bytes)
    with file:
        return file.read(max_bytes)  # it may have grown since it was measured
