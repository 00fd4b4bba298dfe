"""``/v1/uploads``: a file in parts, in any order and in parallel, resumable after a cut connection."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest

from server.api.context import Context, Services, Tenant
from server.api.errors import ApiError, bad_request, replies
from server.api.files import check_expiry, check_purpose, file_object
from server.api.multipart import Received, discard_unread, receive_file
from server.api.schemas import CompleteUpload, CreateUpload, UploadObject, UploadPartObject, UploadState
from server.engine.errors import EngineError
from server.engine.record import FileRecord
from server.engine.uploads import MAX_PART_NBYTES, UploadPart, UploadRecord

router = APIRouter(prefix="/v1/uploads")

_OTHER_MIME_TYPES = ("application/mp4", "application/octet-stream")
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("", responses=replies(400, 413, 503, 507))
def create(body: CreateUpload, services: Context, tenant: Tenant) -> UploadObject:
    """Announces a video that comes in parts. The upload expires after an hour."""
    services.check_open()
    check_purpose(body.purpose)
    if not body.mime_type.lower().startswith("video/") and body.mime_type.lower() not in _OTHER_MIME_TYPES:
        raise bad_request("mime_type must be that of a video, such as video/mp4", param="mime_type")
    sampling = services.sampling(body.fps, body.max_frames, fps_param="fps", frames_param="max_frames")
    expiry_s = None
    if body.expires_after is not None:
        expiry_s = check_expiry(body.expires_after.seconds, param="expires_after.seconds")
    limit = services.settings.max_upload_bytes
    if body.bytes > limit:
        raise ApiError(413, f"The file is larger than {limit} bytes", param="bytes", code="file_too_large")
    record = services.uploads.create(
        filename=body.filename,
        purpose=body.purpose,
        nbytes=body.bytes,
        sampling=sampling,
        tenant=tenant,
        expires_after_s=expiry_s,
        pinned=body.pinned,
    )
    return _upload_object(record, None)


@router.get("/{upload_id}", responses=replies(404, 503))
def get(upload_id: str, services: Context, tenant: Tenant) -> UploadState:
    """An upload as it stands and the parts that have arrived."""
    record = services.uploads.get(upload_id, tenant)
    file = None if record.file_id is None else services.engine.library.get(record.file_id, tenant)
    parts = [_part_object(part) for part in services.uploads.parts(record)]
    return UploadState(**_upload_object(record, file).model_dump(), parts=parts)


@router.post("/{upload_id}/parts", openapi_extra=_FORM, responses=replies(400, 404, 413, 503, 507))
async def add_part(upload_id: str, http: HttpRequest, services: Context, tenant: Tenant) -> UploadPartObject:
    """Receives one part, at most 64 MB. One whose connection is cut leaves nothing."""
    try:
        services.check_open()
        record = await run_in_threadpool(services.uploads.pending, upload_id, tenant)
    except (ApiError, EngineError):
        await discard_unread(http)
        raise
    received = await receive_file(http, services.spool, MAX_PART_NBYTES, name="data")
    return _part_object(await run_in_threadpool(_add_part, services, record, received))


@router.post("/{upload_id}/complete", responses=replies(400, 404, 409, 413, 503, 507))
def complete(upload_id: str, body: CompleteUpload, services: Context, tenant: Tenant) -> UploadObject:
    """Makes a file of the parts in this order; prefilling goes on after the reply."""
    services.check_open()
    record, file = services.uploads.complete(upload_id, tenant, body.part_ids, body.md5, services.spool)
    return _upload_object(record, file)


@router.post("/{upload_id}/cancel", responses=replies(400, 404, 409, 503, 507))
def cancel(upload_id: str, services: Context, tenant: Tenant) -> UploadObject:
    """Ends an upload and removes its parts."""
    return _upload_object(services.uploads.cancel(upload_id, tenant), None)


def _add_part(services: Services, record: UploadRecord, received: Received) -> UploadPart:
    try:
        if received.fields:
            name = min(received.fields)[:80]
            raise bad_request(f"Unknown form field {name!r}", param=name, code="unknown_parameter")
        return services.uploads.add_part(record, received.path)
    finally:
        received.path.unlink()


def _upload_object(record: UploadRecord, file: FileRecord | None) -> UploadObject:
    return UploadObject(
        id=record.id,
        bytes=record.nbytes,
        created_at=record.created_at,
        expires_at=record.expires_at,
        filename=record.filename,
        purpose=record.purpose,
        status=record.status,
        file=None if file is None else file_object(file),
    )


def _part_object(part: UploadPart) -> UploadPartObject:
    return UploadPartObject(id=part.id, upload_id=part.upload_id, created_at=part.created_at, bytes=part.nbytes)
