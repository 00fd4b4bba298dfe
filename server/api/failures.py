"""What each of the engine's errors is over HTTP."""

from __future__ import annotations

import errno
import logging

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from compression.select import SelectionError
from kvstore.errors import QuotaExceeded, StoreError, StoreFull, VideoTooLarge
from server.api.errors import NO_RETRY, ApiError, bad_request, file_not_found
from server.engine.errors import (
    Cancelled,
    ContextLengthExceeded,
    DeviceOutOfMemory,
    EngineError,
    FileNotFound,
    QueueFull,
    ShuttingDown,
    UploadBusy,
    UploadNotFound,
    UploadRefused,
    VideoFailed,
)
from server.models.base import PositionLimitError
from server.video.errors import VideoError

log = logging.getLogger("x2l")

_KINDS = (EngineError, SelectionError, PositionLimitError, VideoError, StoreError, OSError)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def install(app: FastAPI) -> None:
    """Makes what the engine raises inside a route an OpenAI error."""

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    for kind in _KINDS:
        app.add_exception_handler(kind, refuse)


def api_error(error: Exception) -> ApiError:
    """The reply to ``error``. What is not known here is a 500 that tells nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SelectionError):
        return bad_request(str(error), param=f"x2l.{error.param}")
    if isinstance(error, ContextLengthExceeded | PositionLimitError):
        return bad_request(str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, VideoTooLarge):
        advice = "ask about fewer or shorter videos, or give the server a larger --gpu-kv-budget"
        return bad_request(f"{error}: {advice}", param="messages", code="video_too_large")
    if isinstance(error, FileNotFound):
        return file_not_found(error.file_id)
    if isinstance(error, UploadNotFound):
        return ApiError(404, str(error), param="upload_id", code="upload_not_found")
    if isinstance(error, UploadRefused):
        return bad_request(str(error), param=error.param, code=error.code)
    if isinstance(error, VideoFailed):
        return bad_request(str(error), param="file_id", code="video_failed")
    if isinstance(error, VideoError):
        return bad_request(str(error), param="file", code=error.code)
    return _not_the_clients_fault(error)


def _not_the_clients_fault(error: Exception) -> ApiError:
    if isinstance(error, QueueFull):
        return ApiError(429, "Too many requests are waiting", code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, ShuttingDown | Cancelled):
        return ApiError(503, "The server is stopping", code="shutting_down", headers={"retry-after": "5"})
    if isinstance(error, DeviceOutOfMemory):
        return ApiError(503, "Out of device memory", code="out_of_memory", headers={"retry-after": "5"})
    if isinstance(error, UploadBusy):
        return ApiError(409, str(error), param="upload_id", code="upload_busy", headers={"retry-after": "2"})
    if isinstance(error, QuotaExceeded):
        return ApiError(413, str(error), code="store_quota_exceeded")
    if isinstance(error, StoreFull):
        log.warning("the store is full: %s", error)
        return ApiError(507, "The store is full", code="store_full", headers=NO_RETRY)
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        log.warning("no room for files on their way in: %s", error)
        return ApiError(507, "The disk is full", code="disk_full", headers=NO_RETRY)
    if isinstance(error, StoreError):
        log.error("store: %s", error)
        return ApiError(503, "The store is not available", code="store_unavailable", headers={"retry-after": "5"})
    log.error("request failed", exc_info=error)
    return ApiError(500, "Internal error", code="internal_error", headers=NO_RETRY)
