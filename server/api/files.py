"""``/v1/files``: upload, list, watch, look inside, delete."""

from __future__ import annotations

import asyncio
import mimetypes
import re
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from compression.select import Dial
from server.api import sse
from server.api.answer import Answer, unless_disconnected
from server.api.context import Context, Services, Tenant
from server.api.errors import ApiError, bad_request, file_not_found, replies
from server.api.multipart import Received, receive_file
from server.api.schemas import (
    ChunkObject,
    FileDeleted,
    FileList,
    FileObject,
    Levels,
    Relevance,
    RelevanceRequest,
    Tokens,
    UpdateFile,
    Video,
)
from server.engine.errors import ContextLengthExceeded
from server.engine.record import FileRecord, VideoStatus
from server.engine.request import Request, SamplingParams
from server.models.base import Turn

router = APIRouter(prefix="/v1/files")

_PURPOSES = ("user_data", "vision")
_FORM_FIELDS = frozenset({"purpose", "fps", "max_frames", "pinned", "expires_after[anchor]", "expires_after[seconds]"})
_MAX_EXPIRY_S = 30 * 86_400
_POLL_S = 0.2
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(_PURPOSES)},
                        "fps": {"type": "number"},
                        "max_frames": {"type": "integer"},
                        "pinned": {"type": "boolean"},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=_FORM, responses=replies(400, 413, 503, 507))
async def upload(http: HttpRequest, services: Context, tenant: Tenant) -> FileObject:
    """Receives a video; prefilling goes on after the reply."""
    services.check_open()
    received = await receive_file(http, services.spool, services.settings.max_upload_bytes)
    return await run_in_threadpool(_create, services, received, tenant)


@router.get("", responses=replies(400, 404, 503))
def list_files(
    services: Context,
    tenant: Tenant,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> FileList:
    """The client's files, newest first."""
    records = services.engine.library.list(tenant)
    if order == "asc":
        records = records[::-1]
    if purpose is not None:
        records = [record for record in records if record.purpose == purpose]
    if after is not None:
        known = [record.id for record in records]
        if after not in known:
            raise file_not_found(after, param="after")
        records = records[known.index(after) + 1 :]
    page = [file_object(record) for record in records[:limit]]
    return FileList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(records) > limit,
    )


@router.get("/{file_id}", responses=replies(404, 503))
def get_file(file_id: str, services: Context, tenant: Tenant) -> FileObject:
    """A file as it stands."""
    return file_object(_record(services, file_id, tenant))


@router.post("/{file_id}", responses=replies(400, 404, 413, 503, 507))
def update_file(file_id: str, body: UpdateFile, services: Context, tenant: Tenant) -> FileObject:
    """Pins a file, which the store's quota then never removes, or unpins it."""
    record = services.engine.library.pin(file_id, tenant, body.pinned)
    if record is None:
        raise file_not_found(file_id)
    return file_object(record)


@router.delete("/{file_id}", responses=replies(404, 503))
def delete_file(file_id: str, services: Context, tenant: Tenant) -> FileDeleted:
    """Deletes a file and what was made of it, also while it is prefilling."""
    if not services.engine.library.delete(file_id, tenant):
        raise file_not_found(file_id)
    return FileDeleted(id=file_id)


@router.get("/{file_id}/events", response_class=Response, responses=replies(404, 503, events=FileObject.__name__))
async def events(file_id: str, services: Context, tenant: Tenant) -> Response:
    """The file each time it changes, until it is processed or has failed. A stream that ends before that was cut off by
    a server that stops: ask again."""
    await asyncio.to_thread(_record, services, file_id, tenant)
    changes = _changes(services, file_id, tenant)
    return sse.EventStream(sse.with_keep_alive(changes, services.settings.keep_alive_s))


@router.get("/{file_id}/chunks", responses=replies(404, 503))
def chunks(file_id: str, services: Context, tenant: Tenant) -> list[ChunkObject]:
    """The chunks prefilled so far."""
    record = _record(services, file_id, tenant)
    return [
        ChunkObject(
            index=chunk.index,
            start_s=chunk.start_s,
            end_s=chunk.end_s,
            num_frames=chunk.num_frames,
            tokens=Levels(low=low_tokens, high=high_tokens),
            resident=resident,
        )
        for chunk, low_tokens, high_tokens, resident in services.engine.library.chunks(record)
    ]


@router.get(
    "/{file_id}/chunks/{index}/thumbnail",
    response_class=Response,
    responses=replies(400, 404, 503, media_types=["image/jpeg"]),
)
def thumbnail(file_id: str, index: int, services: Context, tenant: Tenant) -> Response:
    """A small JPEG of the chunk."""
    jpeg = services.engine.library.thumbnail(_record(services, file_id, tenant), index)
    if jpeg is None:
        raise ApiError(404, f"No thumbnail of chunk {index}", param="index", code="thumbnail_not_found")
    return Response(jpeg, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})


@router.get("/{file_id}/content", response_class=Response, responses=replies(404, 416, 503, media_types=["video/*"]))
def content(file_id: str, http: HttpRequest, services: Context, tenant: Tenant) -> Response:
    """The uploaded bytes, also in part (``Range``)."""
    record = _record(services, file_id, tenant)
    data = services.engine.library.content(record)
    if data is None:
        raise ApiError(404, "The bytes of this file were not kept", param="file_id", code="content_not_kept")
    kind = mimetypes.guess_type(record.filename)[0] or ""
    headers = {
        "accept-ranges": "bytes",
        "content-disposition": f"attachment; filename*=utf-8''{urllib.parse.quote(record.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    start, end = _byte_range(http.headers.get("range"), record.nbytes)
    partial = (start, end) != (0, record.nbytes)
    if partial:
        headers["content-range"] = f"bytes {start}-{end - 1}/{record.nbytes}"
    headers["content-length"] = str(end - start)
    return StreamingResponse(
        _between(data, start, end),
        206 if partial else 200,
        headers,
        media_type=kind if kind.startswith("video/") else "application/octet-stream",
    )


@router.post("/{file_id}/relevance", responses=replies(400, 404, 413, 429, 503))
async def relevance(
    file_id: str, body: RelevanceRequest, http: HttpRequest, services: Context, tenant: Tenant
) -> Relevance:
    """How relevant each chunk is to a question, and which ones it would re-load; nothing is generated."""
    if not body.question.strip():
        raise bad_request("question is empty", param="question")
    request = Request(
        id=f"relevance-{uuid.uuid4().hex}",
        turns=(Turn("user", body.question),),
        params=SamplingParams(temperature=0.0, max_tokens=1),
        file_ids=(file_id,),
        tenant=tenant,
        dial=body.x2l.dial() if body.x2l else Dial(),
        generate=False,
    )
    answer = Answer(services.engine, request)
    try:
        await answer.start()
        try:
            _, _, outcome = await unless_disconnected(http, answer.collect())
        finally:
            answer.cancel()
    except ContextLengthExceeded as error:
        raise bad_request(str(error), param="question", code="context_length_exceeded") from None
    return Relevance(file_id=file_id, scores=list(outcome.scores), selection=list(outcome.selection))


def file_object(record: FileRecord) -> FileObject:
    """A record as clients see it."""
    return FileObject(
        id=record.id,
        bytes=record.nbytes,
        created_at=record.created_at,
        expires_at=record.expires_at,
        filename=record.filename,
        purpose=record.purpose,
        status=record.status,
        status_details=record.status_details,
        pinned=record.pinned,
        video=None if record.video is None else _video(record.video),
    )


def _video(status: VideoStatus) -> Video:
    return Video(
        duration_s=status.duration_s,
        width=status.width,
        height=status.height,
        num_frames=status.num_frames,
        num_chunks=status.num_chunks,
        chunks_done=status.chunks_done,
        progress=status.progress,
        tokens=Tokens(visual=status.tokens_visual, low=status.tokens_low, high=status.tokens_high),
        bytes=Levels(low=status.nbytes_low, high=status.nbytes_high),
        prefill_s=status.prefill_s,
        prefill_mode=status.prefill_mode,
    )


def _record(services: Services, file_id: str, tenant: str) -> FileRecord:
    record = services.engine.library.get(file_id, tenant)
    if record is None:
        raise file_not_found(file_id)
    return record


def _create(services: Services, received: Received, tenant: str) -> FileObject:
    try:
        options = _library_options(services, received.fields)
    except ApiError:
        received.path.unlink()
        raise
    record = services.engine.library.create(
        received.path,
        filename=received.filename,
        tenant=tenant,
        source="upload",
        content_sha256=received.sha256,
        **options,
    )
    return file_object(record)


def _library_options(services: Services, fields: Mapping[str, str]) -> dict[str, Any]:
    unknown = sorted(fields.keys() - _FORM_FIELDS)
    if unknown:
        raise bad_request(f"Unknown form field {unknown[0][:80]!r}", param=unknown[0][:80], code="unknown_parameter")
    purpose = fields.get("purpose")
    if purpose is None:
        raise bad_request("purpose is missing", param="purpose", code="missing_required_parameter")
    check_purpose(purpose)
    pinned = fields.get("pinned", "false").lower()
    if pinned not in ("true", "false"):
        raise bad_request("pinned must be true or false", param="pinned")
    fps = fields.get("fps")
    max_frames = fields.get("max_frames")
    sampling = services.sampling(
        None if fps is None else _number(fps, "fps"),
        None if max_frames is None else _integer(max_frames, "max_frames"),
        fps_param="fps",
        frames_param="max_frames",
    )
    expires_after_s = _expiry(fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]"))
    return {
        "purpose": purpose,
        "sampling": sampling,
        "expires_after_s": expires_after_s,
        "pinned": pinned == "true",
    }


def check_purpose(purpose: str) -> None:
    """Raises ApiError (400) for a purpose that is none here."""
    if purpose not in _PURPOSES:
        raise bad_request(f"purpose must be {' or '.join(_PURPOSES)}", param="purpose")


def check_expiry(expires_after_s: int, *, param: str) -> int:
    """``expires_after_s``, if a file may live so long. Raises ApiError (400)."""
    if not 1 <= expires_after_s <= _MAX_EXPIRY_S:
        raise bad_request(f"{param} must be between 1 and {_MAX_EXPIRY_S}", param=param)
    return expires_after_s


def _expiry(anchor: str | None, seconds: str | None) -> int | None:
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise bad_request("expires_after[anchor] must be created_at", param="expires_after[anchor]")
    param = "expires_after[seconds]"
    return check_expiry(_integer(seconds or "", param), param=param)


def _number(text: str, param: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise bad_request(f"{param} must be a number", param=param) from None


def _integer(text: str, param: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise bad_request(f"{param} must be a positive whole number", param=param)
    return int(text)


async def _changes(services: Services, file_id: str, tenant: str) -> AsyncIterator[bytes]:
    shown: FileObject | None = None
    while not services.stopping:
        record = await asyncio.to_thread(services.engine.library.get, file_id, tenant)
        if record is None:
            yield sse.event(file_not_found(file_id).body())
            return
        current = file_object(record)
        if current != shown:
            shown = current
            yield sse.event(current.model_dump())
        if current.status != "uploaded":
            return
        await asyncio.sleep(_POLL_S)


def _byte_range(header: str | None, nbytes: int) -> tuple[int, int]:
    """``[start, end)`` of a single range; the whole file without one (or with several, as RFC 9110 allows)."""
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", (header or "").strip(), re.ASCII)
    if match is None or match.groups() == ("", ""):
        return 0, nbytes
    first, last = match.groups()
    start = int(first) if first else max(nbytes - int(last), 0)
    end = min(int(last) + 1, nbytes) if first and last else nbytes
    if start >= nbytes or start >= end:
        raise ApiError(
            416, "The range lies outside the file", code="invalid_range", headers={"content-range": f"bytes */{nbytes}"}
        )
    return start, end


def _between(data: Iterator[bytes], start: int, end: int) -> Iterator[bytes]:
    position = 0
    for piece in data:
        if position >= end:
            return
        part = piece[max(start - position, 0) : end - position]
        position += len(piece)
        if part:
            yield part
