"""What wraps every request, as plain ASGI so that streams and disconnects pass untouched."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import NO_RETRY, ApiError
from server.engine.metrics import Ending, EngineMetrics

log = logging.getLogger("x2l")

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
OPEN_FOLDER = "/playground/"
_QUESTIONS = re.compile(r"/v1/chat/completions|/v1/files/[^/]+/relevance")
_LINGER_S = 5.0
STALL_S = 60.0
"""Between two pieces of a body."""


class RequestId:
    """Names every request in ``x-request-id`` and turns what nobody caught into a 500 that tells nothing inside."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        started = False

        async def named_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, named_send)
        except ClientDisconnect:
            log.info("%s: client went away", request_id)
        except Exception:
            log.exception("%s: %s %s failed", request_id, scope["method"], scope["path"])
            if started:
                raise
            error = ApiError(500, f"Internal error ({request_id})", code="internal_error", headers=NO_RETRY)
            await error.response()(scope, receive, named_send)


class Auth:
    """Asks for one of the API keys and puts the tenant (SHA-256 hex of the key, "" without keys) into the state."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._tenants = [hashlib.sha256(key.encode()).hexdigest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            tenant = self._tenant(Headers(scope=scope))
            open_path = scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER)
            if tenant is None and not open_path:
                error = ApiError(
                    401,
                    "Incorrect or missing API key: send 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant or ""
        await self.app(scope, receive, send)

    def _tenant(self, headers: Headers) -> str | None:
        if not self._tenants:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        presented = hashlib.sha256(key.strip().encode()).hexdigest()
        matches = [known for known in self._tenants if hmac.compare_digest(known, presented)]  # all, for constant time
        return matches[0] if matches else None


class CountRequests:
    """Tells the metrics how each request for an answer or for relevance has ended.

    An error amid a stream is told by its status in the request's state, as ``failed_status``.
    """

    def __init__(self, app: ASGIApp, metrics: EngineMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not _QUESTIONS.fullmatch(scope["path"]):
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        status = 500
        counted = False

        async def watched_send(message: Message) -> None:
            nonlocal status, counted
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body"):
                counted = True
                self.metrics.ended(_ending(state.get("failed_status", status)))  # before the client can look for it
            await send(message)

        ending: Ending = "cancelled"
        try:
            await self.app(scope, receive, watched_send)
        except Exception as error:
            if not isinstance(error, ClientDisconnect):
                ending = "failed"
            raise
        finally:
            if not counted:
                self.metrics.ended(ending)


def _ending(status: int) -> Ending:
    if status < 400:
        return "ok"
    special: dict[int, Ending] = {404: "not_found", 429: "busy", 503: "unavailable"}
    return special.get(status, "rejected" if status < 500 else "failed")


class BodyLimit:
    """Refuses bodies over ``max_bytes``, as they say or while they arrive, and such as stop arriving or are encoded.
    Routes that take files are ``exempt`` from the first: they count."""

    def __init__(self, app: ASGIApp, max_bytes: int, exempt: re.Pattern[str]) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.exempt = exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = None if self.exempt.fullmatch(scope["path"]) else self.max_bytes
        received, ended = 0, False

        async def watched_receive() -> Message:
            nonlocal received, ended
            try:
                async with asyncio.timeout(None if ended else STALL_S):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"Nothing more of the body came for {STALL_S:g} s", code="request_timeout"
                ) from None
            received += len(message.get("body", b""))
            ended = not message.get("more_body")
            if most is not None and received > most:
                if not ended:
                    await discard_body(receive)
                raise self._too_large()
            return message

        headers = Headers(scope=scope)
        announced, encoding = headers.get("content-length", ""), headers.get("content-encoding", "identity")
        refusal: ApiError | None = None
        if most is not None and announced.isdecimal() and int(announced) > most:
            refusal = self._too_large()
        elif encoding.strip().lower() != "identity":
            refusal = ApiError(
                415, f"The body is encoded ({encoding[:40]}): send it plain", code="unsupported_encoding"
            )
        if refusal is None:
            await self.app(scope, watched_receive, send)
            return
        if not expects_go_ahead(headers):
            await discard_body(receive)
        await refusal.response()(scope, receive, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self.max_bytes} bytes", code="request_too_large")


def expects_go_ahead(headers: Headers) -> bool:
    """Whether the client waits for a word before it sends the body."""
    return "100-continue" in headers.get("expect", "").lower()


async def discard_body(receive: Receive) -> None:
    """Reads on for a moment, so that a client that is still sending gets the refusal and not a broken connection."""
    try:
        async with asyncio.timeout(_LINGER_S):
            while (await receive()).get("more_body"):
                pass
    except TimeoutError:
        return
