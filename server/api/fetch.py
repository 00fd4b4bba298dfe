"""Videos and images that a message names by an http(s) URL, fetched from hosts that the server may ask."""

from __future__ import annotations

import asyncio
import urllib.parse
from pathlib import PurePosixPath
from typing import IO

import httpx

from server.api.context import Services
from server.api.errors import ApiError, bad_request
from server.api.sources import Kind, Source

_MOST_REDIRECTS = 5
_LARGEST_PORT = 65_535
_SILENCE_S = 30.0
"""Of a host, once it is asked."""
_LOOK_S = 0.25
"""How often to look whether the server stops."""
_PIECE_NBYTES = 1 << 20


async def fetch(services: Services, source: Source, kind: Kind, target: IO[bytes], max_bytes: int) -> str:
    """Writes what is behind the URL to ``target``; the name that it has there. Every host on the way must be allowed.

    Raises ApiError: 400 for a host that is not, and for what cannot be fetched; 413 above ``max_bytes``; 503 once the
    server stops.
    """
    fetching = asyncio.ensure_future(_fetch(services, source, kind, target, max_bytes))
    try:
        while not fetching.done():
            services.check_open()
            await asyncio.wait({fetching}, timeout=_LOOK_S)
        return fetching.result()
    finally:
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)


async def _fetch(services: Services, source: Source, kind: Kind, target: IO[bytes], max_bytes: int) -> str:
    def failed(why: str) -> ApiError:
        return bad_request(f"The {kind} cannot be fetched: {why}", param=source.param, code="url_not_fetched")

    limit_s = services.settings.fetch_timeout_s
    try:
        async with asyncio.timeout(limit_s), httpx.AsyncClient(timeout=httpx.Timeout(_SILENCE_S)) as client:
            url = httpx.URL(source.location)
            for _ in range(1 + _MOST_REDIRECTS):
                _check_host(services, source, kind, url)
                if not 0 < (url.port or 80) <= _LARGEST_PORT:
                    raise failed(f"there is no port {url.port}")
                async with client.stream("GET", url, headers={"accept-encoding": "identity"}) as response:
                    if response.next_request is not None:
                        url = response.next_request.url
                        continue
                    if not response.is_success:
                        raise failed(f"{url.host} answers with HTTP status {response.status_code}")
                    await _receive(response, source, kind, target, max_bytes)
                    return PurePosixPath(urllib.parse.unquote(url.path)).name or url.host
            raise failed(f"it was redirected more than {_MOST_REDIRECTS} times")
    except TimeoutError:
        raise failed(f"it took longer than {limit_s:g} s") from None
    except httpx.TimeoutException:
        raise failed(f"nothing came for {_SILENCE_S:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise failed(str(error) or type(error).__name__) from error


def _check_host(services: Services, source: Source, kind: Kind, url: httpx.URL) -> None:
    is_http = url.scheme in ("http", "https")
    if is_http and url.host in services.settings.allowed_media_domains:
        return
    what = f"{url.host[:100]!r} is none of them" if is_http else f"it was redirected to a {url.scheme}: URL"
    way = "upload it through /v1/files" if kind == "video" else "send it as a data: URL"
    raise bad_request(
        f"http(s) URLs are fetched from the hosts of --allowed-media-domains only, and {what}; the {kind} can come "
        f"another way: {way}",
        param=source.param,
        code="url_not_allowed",
    )


async def _receive(response: httpx.Response, source: Source, kind: Kind, target: IO[bytes], max_bytes: int) -> None:
    told, nbytes = response.headers.get("content-length", ""), 0
    too_large = ApiError(413, f"The {kind} is larger than {max_bytes} bytes", param=source.param, code="file_too_large")
    if told.isdecimal() and int(told) > max_bytes:
        raise too_large
    async for piece in response.aiter_bytes(_PIECE_NBYTES):
        nbytes += len(piece)
        if nbytes > max_bytes:
            raise too_large
        await asyncio.to_thread(target.write, piece)
    if not nbytes:
        raise bad_request(f"There is nothing behind the {kind}'s URL", param=source.param, code="empty_file")
