"""Images inside a message: decoded for one request, and kept nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from server.api.context import Services
from server.api.errors import bad_request
from server.api.sources import Source, decode_data_url, open_local, refuse_fetching
from server.video.image import ImageError, read_image


async def see(services: Services, sources: Sequence[Source]) -> tuple[Any, ...]:
    """The images as the engine takes them, in their order.

    Raises ApiError that names the part: 400 for what is no image or not allowed, 413 for what is too large.
    """
    seen = []
    for source in sources:
        async with services.image_slots:
            seen.append(await run_in_threadpool(_see, services, source, alone=len(sources) == 1))
    return tuple(seen)


def _see(services: Services, source: Source, *, alone: bool) -> Any:
    try:
        frame = read_image(_fetch(services, source), services.settings.max_image_pixels)
    except ImageError as error:
        raise bad_request(f"{source.param}: {error}", param=source.param, code=error.code) from error
    return services.engine.preprocess_image(frame, alone=alone)


def _fetch(services: Services, source: Source) -> bytes:
    max_bytes = services.settings.max_image_bytes
    if source.scheme == "data":
        return decode_data_url(source, "image", max_bytes)
    if source.scheme == "file":
        file, _ = open_local(services, source, max_bytes)
        with file:
            return file.read(max_bytes)  # it may have grown since it was measured
    raise refuse_fetching(source, "image")
