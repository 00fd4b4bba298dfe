"""The client side of the commands: httpx, OpenAI's errors, and server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import typer

DEFAULT_BASE_URL = "http://127.0.0.1:8000"

BaseUrl = Annotated[str, typer.Option(envvar="X2L_BASE_URL", help="The server, with or without /v1.")]
ApiKey = Annotated[str, typer.Option(envvar="X2L_API_KEY", help="The key to send.", show_default=False)]


class ServerError(Exception):
    """What the server refused, in its own words."""


def connect(base_url: str, api_key: str) -> httpx.Client:
    """A client for the server at ``base_url``. Answers may take as long as they take; connecting may not.

    Raises ServerError for an address or a key that cannot be one."""
    key = sendable_key(api_key)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=server_root(base_url), headers=headers, timeout=httpx.Timeout(None, connect=10.0))


def server_root(base_url: str) -> str:
    """The address without ``/v1``; one without a scheme is taken for http://. Raises ServerError."""
    root = base_url.rstrip("/").removesuffix("/v1")
    if "://" not in root:
        root = f"http://{root}"
    if not root.startswith(("http://", "https://")):
        raise ServerError(f"not a server address: {base_url}")
    return root


def sendable_key(api_key: str) -> str:
    """A key as a header takes it; of a server's own list the first. Raises ServerError."""
    key = api_key.split(",")[0].strip()
    if not (key.isascii() and key.isprintable()):
        raise ServerError("an API key is made of printable ASCII characters, which this one is not")
    return key


def check(response: httpx.Response) -> httpx.Response:
    """The response, or ServerError with the server's message."""
    if response.is_success:
        return response
    response.read()
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {response.status_code} from {response.url}"
    raise ServerError(message)


@contextmanager
def event_stream(client: httpx.Client, method: str, path: str, **options: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The JSON objects of a stream of server-sent events. Raises ServerError, also for an error inside the stream."""
    with client.stream(method, path, **options) as response:
        yield _events(check(response))


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if not line.startswith("data: "):
            continue
        data: dict[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in data and "object" not in data:
            raise ServerError(data["error"]["message"])
        yield data
