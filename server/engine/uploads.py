"""Uploads in parts. All there is of one lies in the store, so a restart and every replica go on with it.

A part is received whole, then stored as a file of its own; its manifest makes it count. An upload ends as a file, by
cancelling, or by itself an hour after it was made; its parts go with it.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from kvstore.base import Store
from kvstore.content import Content, ContentStore
from kvstore.errors import CorruptBlob, DamagedVideo, StoreError, StoreFull
from kvstore.key import UPLOADS, PartKey
from server.engine.errors import UploadBusy, UploadNotFound, UploadRefused
from server.engine.library import FileRecord, Library
from server.video.reader import Sampling

MAX_PART_NBYTES = 64 * 2**20
EXPIRES_AFTER_S = 3600
_REMEMBERED_S = 86_400  # how long an ended upload can still be asked about
_SLOWEST_NBYTES_PER_S = 10_000_000  # a completion that is slower than this counts as dead

_UPLOAD_ID = re.compile(r"upload_[0-9a-f]{24}")
_PART_ID = re.compile(r"part_[0-9a-f]{32}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """A snapshot of one upload: what its file is to become, and how far it is. Unix times in whole seconds."""

    id: str
    tenant: str
    filename: str
    purpose: str
    nbytes: int
    sampling: Sampling
    expires_after_s: int | None
    pinned: bool
    created_at: int
    expires_at: int
    end: Literal["completed", "cancelled"] | None = None
    file_id: str | None = None

    @property
    def status(self) -> Literal["pending", "completed", "cancelled", "expired"]:
        return self.end or ("expired" if self.expires_at <= time.time() else "pending")

    @property
    def root(self) -> str:
        return f"{UPLOADS}{self.id}/"

    @property
    def blob(self) -> str:
        """The key of the stored record."""
        return f"{self.root}record"


@dataclass(frozen=True, slots=True)
class UploadPart:
    """One part that has arrived whole."""

    id: str
    upload_id: str
    nbytes: int

    @property
    def created_at(self) -> int:
        return int(self.id[5:21], 16) // 10**9


_ADAPTER = TypeAdapter(UploadRecord)


class Uploads:
    """Takes files in part by part and hands them to the library. Any thread may call any method; all of them may
    block, and raise StoreError. A tenant's uploads are found by that tenant alone."""

    def __init__(self, store: Store, library: Library) -> None:
        self._store = store
        self._files = ContentStore(store)
        self._library = library

    def create(
        self,
        *,
        filename: str,
        purpose: str,
        nbytes: int,
        sampling: Sampling,
        tenant: str,
        expires_after_s: int | None,
        pinned: bool,
    ) -> UploadRecord:
        """Announces a file of ``nbytes``. Raises QuotaExceeded if it would never fit."""
        self._library.check_room(nbytes)
        now_s = int(time.time())
        record = UploadRecord(
            id=f"upload_{secrets.token_hex(12)}",
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            nbytes=nbytes,
            sampling=sampling,
            expires_after_s=expires_after_s,
            pinned=pinned,
            created_at=now_s,
            expires_at=now_s + EXPIRES_AFTER_S,
        )
        self._save(record)
        return record

    def get(self, upload_id: str, tenant: str) -> UploadRecord:
        """The upload as it stands, also for a day after its end. Raises UploadNotFound."""
        record = self._load(upload_id) if _UPLOAD_ID.fullmatch(upload_id) else None
        if record is None or record.tenant != tenant:
            raise UploadNotFound(upload_id)
        return record

    def pending(self, upload_id: str, tenant: str) -> UploadRecord:
        """The upload, if it takes parts. Raises UploadNotFound, UploadRefused."""
        record = self.get(upload_id, tenant)
        if record.status == "completed":
            raise UploadRefused(f"upload {record.id} is completed: its file is {record.file_id}", "upload_completed")
        if record.status != "pending":
            raise UploadRefused(f"upload {record.id} is {record.status}", f"upload_{record.status}")
        return record

    def parts(self, record: UploadRecord) -> list[UploadPart]:
        """What has arrived, in that order."""
        manifests = (blob for blob in self._store.keys(record.root) if blob.endswith("/manifest"))
        found = [(part_id, self._part(record, part_id)) for part_id in sorted(blob.split("/")[3] for blob in manifests)]
        return [UploadPart(part_id, record.id, part.nbytes) for part_id, part in found if part is not None]

    def add_part(self, record: UploadRecord, path: Path) -> UploadPart:
        """Stores the file ``path`` as a part of a pending upload. The file stays the caller's.

        Raises UploadRefused, UploadNotFound, StoreFull; then nothing of the part is left.
        """
        nbytes = path.stat().st_size
        if self._store.nbytes(record.root) + nbytes > 2 * max(record.nbytes, MAX_PART_NBYTES):
            raise UploadRefused("more than twice the announced bytes were sent", "too_many_bytes", param="data")
        part_id = f"part_{time.time_ns():016x}{secrets.token_hex(8)}"
        self._library.make_room(nbytes)
        with path.open("rb") as file:
            self._files.put(PartKey(record.id, part_id), file)
        try:
            self.pending(record.id, record.tenant)  # it may have ended meanwhile, and its parts with it
        except (UploadRefused, UploadNotFound):
            self._files.delete(PartKey(record.id, part_id))
            raise
        return UploadPart(part_id, record.id, nbytes)

    def complete(
        self, upload_id: str, tenant: str, part_ids: Sequence[str], md5: str | None, folder: Path
    ) -> tuple[UploadRecord, FileRecord]:
        """Makes a file of the parts in this order, by way of a temporary file in ``folder``.

        ``md5`` of the whole, in hex, is checked if given. Raises UploadNotFound, UploadBusy, UploadRefused, VideoError,
        StoreFull; then the upload stands as it did.
        """
        with self._alone(self.pending(upload_id, tenant)):
            record = self.pending(upload_id, tenant)  # again: another may have ended it before this had it alone
            parts = self._chosen(record, part_ids)
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
                path = Path(file.name)
                try:
                    sha256, found_md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
                    for piece in chain.from_iterable(part.read() for part in parts):
                        file.write(piece)
                        sha256.update(piece)
                        found_md5.update(piece)
                    if md5 is not None and md5.lower() != found_md5.hexdigest():
                        raise UploadRefused("the parts have another MD5 than md5 says", "md5_mismatch", param="md5")
                    file.flush()
                except DamagedVideo as error:
                    path.unlink()
                    raise UploadRefused(f"send it again: {error}", "part_damaged", param="part_ids") from error
                except BaseException:
                    path.unlink()
                    raise
            made = self._library.create(
                path,
                filename=record.filename,
                purpose=record.purpose,
                sampling=record.sampling,
                tenant=record.tenant,
                expires_after_s=record.expires_after_s,
                source="upload",
                pinned=record.pinned,
                content_sha256=sha256.hexdigest(),
                stored_nbytes=self._store.nbytes(record.root),
            )
            record = replace(record, end="completed", file_id=made.id)
            self._save(record)
            self._delete_parts(record)
            return record, made

    def cancel(self, upload_id: str, tenant: str) -> UploadRecord:
        """Ends an upload and removes its parts. Raises UploadNotFound, UploadBusy, UploadRefused."""
        with self._alone(self.pending(upload_id, tenant)):
            record = replace(self.pending(upload_id, tenant), end="cancelled")
            self._save(record)
            self._delete_parts(record)
            return record

    def sweep(self) -> None:
        """Removes the parts of what has ended, and what ended long ago altogether."""
        for upload_id in {blob.split("/")[1] for blob in self._store.keys(UPLOADS)}:
            try:
                self._sweep(upload_id)
            except (UploadBusy, StoreError) as error:
                _log.warning("an ended upload could not be removed yet: %s", error)

    def _sweep(self, upload_id: str) -> None:
        record = self._load(upload_id)
        if record is None:  # the record is written first and goes last: what has none is of no use to anybody
            self._delete_all(f"{UPLOADS}{upload_id}/")
        elif record.status != "pending":
            with self._alone(record):
                self._delete_parts(record)
            if record.expires_at + _REMEMBERED_S <= time.time():
                self._delete_all(record.root)

    def _chosen(self, record: UploadRecord, part_ids: Sequence[str]) -> list[Content]:
        if len(set(part_ids)) != len(part_ids):
            raise UploadRefused("a part stands twice in part_ids", "duplicate_part", param="part_ids")
        parts = []
        for part_id in part_ids:
            part = self._part(record, part_id) if _PART_ID.fullmatch(part_id) else None
            if part is None:
                raise UploadRefused(f"no such part: {part_id[:80]!r}", "part_not_found", param="part_ids")
            parts.append(part)
        nbytes = sum(part.nbytes for part in parts)
        if nbytes != record.nbytes:
            raise UploadRefused(
                f"the parts have {nbytes} bytes, but {record.nbytes} were announced", "bytes_mismatch", param="part_ids"
            )
        return parts

    @contextmanager
    def _alone(self, record: UploadRecord) -> Iterator[None]:
        """Nobody else, at any replica, ends this upload meanwhile. Raises UploadBusy."""
        owner, ttl_s = uuid.uuid4().hex, 60 + record.nbytes / _SLOWEST_NBYTES_PER_S
        with suppress(StoreFull):  # removing what has ended makes room, so it must not need any
            if not self._store.acquire_lock(record.root[:-1], owner, ttl_s):
                raise UploadBusy(record.id)
        try:
            yield
        finally:
            self._store.release_lock(record.root[:-1], owner)

    def _part(self, record: UploadRecord, part_id: str) -> Content | None:
        """None as well for a damaged one, which has to be sent again."""
        try:
            return self._files.get(PartKey(record.id, part_id))
        except CorruptBlob:
            return None

    def _load(self, upload_id: str) -> UploadRecord | None:
        """None as well for what is damaged."""
        try:
            data = self._store.get(f"{UPLOADS}{upload_id}/record")
            return None if data is None else _ADAPTER.validate_json(data)
        except (CorruptBlob, ValidationError) as error:
            _log.error("the record of an upload is damaged: %s", error)
            return None

    def _save(self, record: UploadRecord) -> None:
        self._store.put(record.blob, _ADAPTER.dump_json(record))

    def _delete_parts(self, record: UploadRecord) -> None:
        self._delete_all(f"{record.root}part/")

    def _delete_all(self, root: str) -> None:
        for blob in sorted(self._store.keys(root), key=lambda blob: not blob.endswith("/manifest")):
            self._store.delete(blob)
