from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from server.api import sse


def test_an_event_is_one_line_of_json() -> None:
    assert sse.event({"text": "a\nb ü"}) == 'data: {"text":"a\\nb ü"}\n\n'.encode()


def test_no_client_takes_a_character_for_the_end_of_a_line() -> None:
    text = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g"
    sent = sse.event({"text": text})
    assert sent.decode().splitlines() == [sent.decode().rstrip("\n"), ""]
    assert json.loads(sent.removeprefix(b"data: ")) == {"text": text}


def test_silence_is_filled_with_comments() -> None:
    async def slow() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.25)
        yield b"1"
        yield b"2"

    async def collect() -> list[bytes]:
        return [data async for data in sse.with_keep_alive(slow(), 0.1)]

    received = asyncio.run(collect())
    assert received[-2:] == [b"1", b"2"]
    assert set(received[:-2]) == {sse.COMMENT}


def test_an_error_of_the_source_comes_through() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"1"
        raise ValueError("broken")

    async def collect() -> None:
        async for _ in sse.with_keep_alive(broken(), 1):
            pass

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(collect())


def test_on_close_is_called_even_if_nobody_listened() -> None:
    closed: list[bool] = []

    async def events() -> AsyncIterator[bytes]:
        yield b"never sent"
        await asyncio.sleep(60)

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        await asyncio.sleep(60)

    response = sse.EventStream(events(), on_close=lambda: closed.append(True))
    asyncio.run(response({"type": "http"}, receive, send))
    assert closed == [True]
