"""Everything the engine refuses or fails with.

EngineError
├── QueueFull                   as many requests are in flight as the options allow; try again later
├── ContextLengthExceeded       video, prompt and answer need more positions than the model has
├── FileNotFound                no such file for this tenant, or it was deleted meanwhile
├── VideoFailed                 the file could not be prefilled, or its KVs cannot be read any more
├── UploadNotFound              no such upload in parts for this tenant
├── UploadBusy                  the upload is being completed or cancelled at this moment
├── UploadRefused               the upload has ended, or its parts do not make the announced file
├── Cancelled                   the client asked for it
├── ShuttingDown                the engine is closing, or has failed
├── DeviceOutOfMemory           this one request did not fit on the device
└── RequestFailed               an unforeseen error inside this one request

``compression.select.SelectionError``, ``server.video`` errors and ``kvstore.errors`` pass through as they are.
"""

from __future__ import annotations

import logging

import torch

from compression.select import SelectionError
from kvstore.errors import StoreError

_log = logging.getLogger(__name__)


class EngineError(Exception):
    """Root of the tree above."""


class QueueFull(EngineError):  # noqa: N818 - errors are named for what is wrong
    """As many requests are in flight as the options allow."""


class ContextLengthExceeded(EngineError):  # noqa: N818
    """``asked`` tokens (mixed cache, prompt and room for the answer) where the model has ``limit`` positions."""

    def __init__(self, limit: int, asked: int) -> None:
        super().__init__(f"this model's maximum context length is {limit} tokens, but {asked} were asked for")
        self.limit = limit
        self.asked = asked


class FileNotFound(EngineError):  # noqa: N818
    """No such file for this tenant, or it was deleted meanwhile."""

    def __init__(self, file_id: str) -> None:
        super().__init__(f"no such file: {file_id}")
        self.file_id = file_id


class VideoFailed(EngineError):  # noqa: N818
    """The file could not be prefilled, or its KVs cannot be read any more; ``status_details`` tells why."""

    def __init__(self, file_id: str, status_details: str) -> None:
        super().__init__(f"file {file_id} cannot be used: {status_details}")
        self.file_id = file_id
        self.status_details = status_details


class UploadNotFound(EngineError):  # noqa: N818
    """No such upload for this tenant, or it ended long ago."""

    def __init__(self, upload_id: str) -> None:
        super().__init__(f"no such upload: {upload_id[:80]!r}")


class UploadBusy(EngineError):  # noqa: N818
    """The upload is being completed or cancelled at this moment, here or at another replica."""

    def __init__(self, upload_id: str) -> None:
        super().__init__(f"upload {upload_id} is being completed or cancelled")


class UploadRefused(EngineError):  # noqa: N818
    """The upload has ended, or its parts do not make the announced file. ``code`` names the reason, ``param`` what in
    the request it lies in."""

    def __init__(self, message: str, code: str, *, param: str = "upload_id") -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class Cancelled(EngineError):  # noqa: N818
    """The client asked for it."""


class ShuttingDown(EngineError):  # noqa: N818
    """The engine is closing, or has failed."""


class DeviceOutOfMemory(EngineError):  # noqa: N818
    """This one request did not fit on the device."""


class RequestFailed(EngineError):  # noqa: N818
    """An unforeseen error inside this one request; the cause is chained and logged."""


def reply_to(error: Exception) -> Exception:
    """What a client is told of an error that ended its request; the unforeseen is logged."""
    if isinstance(error, (EngineError, SelectionError, StoreError)):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return DeviceOutOfMemory("the request did not fit into the device's memory")
    _log.error("a request has failed", exc_info=error)
    reply = RequestFailed("the request failed inside the server, which has logged why")
    reply.__cause__ = error
    return reply
