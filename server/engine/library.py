"""The files that a server knows, and all replicas that share its store with it."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from compression.chunk import Chunk
from kvstore.base import Store
from kvstore.content import ContentStore
from kvstore.errors import CorruptBlob, StoreError, StoreUnavailable
from kvstore.key import KVKey
from kvstore.manifest import Manifest
from kvstore.resident import ResidentPool
from kvstore.video import VideoStore
from server.engine.fit import check_resident, choose_mode, least_resident_nbytes
from server.engine.ingest import Ingest
from server.engine.options import EngineOptions
from server.engine.record import FileRecord, FileSource, FileStatus, VideoStatus
from server.engine.records import Records
from server.engine.room import Room
from server.engine.video import Video, status_of
from server.engine.videos import Videos
from server.models.base import VideoModel
from server.video.reader import Sampling, VideoInfo, VideoReader

__all__ = ["FileRecord", "Library", "VideoStatus"]

_log = logging.getLogger(__name__)


class Library:
    """Takes files in, has them prefilled, and forgets them. Any thread may call any method; all but ``seen`` read or
    write the store and may block, ``create`` above all.

    What the store says of a file is asked whenever it is needed, because other replicas add, prefill and delete too.
    """

    def __init__(
        self,
        model: VideoModel,
        store: Store,
        kvs: VideoStore,
        pool: ResidentPool,
        writers: Executor,
        options: EngineOptions,
        *,
        on_ingest: Callable[[Ingest], None],
        on_change: Callable[[KVKey], None],
        on_delete: Callable[[str], None],
        wake: Callable[[], None],
    ) -> None:
        """``on_ingest`` gets every prefill that begins, ``on_change`` the key of a video that became ready or failed,
        ``on_delete`` the id of a deleted file; ``wake`` tells the engine thread that a prefill has work for it."""
        self._model = model
        self._kvs = kvs
        self._contents = ContentStore(store)
        self._pool = pool
        self._options = options
        self._limits = options.limits_for(model.spec)
        self._on_delete = on_delete
        self._records = Records(store, on_gone=self._forget)
        self._videos = Videos(
            model,
            store,
            kvs,
            pool,
            self._records,
            writers,
            options,
            on_ingest=on_ingest,
            on_commit=lambda video: self._room.make(0, video),
            on_change=on_change,
            wake=wake,
        )
        self._room = Room(store, options.store_quota_bytes, self._records, self._videos)
        self._sweeper = threading.Thread(target=self._sweep, name="x2l-sweep", daemon=True)
        self._closing = threading.Event()
        self._lock = threading.Lock()  # guards the files whose use is yet to be noted
        self._used: set[str] = set()
        self._notes = ThreadPoolExecutor(1, "x2l-note")

    def start(self) -> None:
        """Goes on with the prefills that a restart has cut off, or another replica. Raises StoreError."""
        self._videos.open()
        self._adopt(self._records.all())
        self._sweeper.start()

    def close(self) -> None:
        """Stops all prefills; their files stay ``uploaded`` and resume at the next start."""
        with self._lock:
            self._closing.set()
        self._videos.close()
        self._notes.shutdown(cancel_futures=True)
        if self._sweeper.is_alive():
            self._sweeper.join()

    def create(
        self,
        path: Path,
        *,
        filename: str,
        purpose: str,
        sampling: Sampling,
        tenant: str,
        expires_after_s: int | None,
        source: FileSource,
        pinned: bool = False,
        content_sha256: str | None = None,
        stored_nbytes: int = 0,
    ) -> FileRecord:
        """Takes over the temporary file ``path`` (it is gone afterwards, whatever happens) and starts its prefill.

        A content that is known under this sampling and tenant is not prefilled again. An inline one gets the record it
        had before, with a new lease of life. ``stored_nbytes`` lie in the store as an upload in parts, and go soon: the
        quota does not count them twice. Raises VideoError for what is no video within the limits, StoreError.
        """
        taken = False
        try:
            digest = content_sha256 or _sha256(path)
            now_ns, nbytes = time.time_ns(), path.stat().st_size
            now_s = now_ns // 10**9
            ttl_s = self._options.inline_ttl_s if source == "inline" else expires_after_s
            record = FileRecord(
                id=f"file-{secrets.token_hex(12)}",
                tenant=tenant,
                filename=filename,
                purpose=purpose,
                nbytes=nbytes,
                created_at=now_s,
                created_ns=now_ns,
                expires_at=None if ttl_s is None else now_s + ttl_s,
                content_sha256=digest,
                sampling=sampling,
                source=source,
                pinned=pinned,
            )
            key = self._videos.key_of(record)
            if source == "inline":  # one record for one video, at whatever replica it arrives
                record = replace(record, id=f"file-{key.digest[:24]}")
            manifest, info = self._videos.manifest(key), None
            if manifest is None:
                info = self._probe(path, sampling)
            else:
                check_resident(manifest.high_nbytes, self._options.resident_nbytes)
            self._keep(path, record, stored_nbytes)
            try:
                with self._records.changing(record.content):
                    self._keep(path, record, stored_nbytes)  # unless another replica has deleted it just now
                    manifest = self._videos.manifest(key)
                    known = self._records.get(record.id) if source == "inline" else None
                    if known is not None:
                        record = replace(known, expires_at=record.expires_at)
                    status: FileStatus = "uploaded" if manifest is None else "processed"
                    record = replace(record, status=status, status_details=None)
                    if manifest is not None:
                        record = replace(record, video=status_of(manifest))
                    self._records.put(record)
            except StoreError:
                with suppress(StoreError):  # no file refers to the bytes that were kept, unless another one does
                    self._videos.clear(key, record.sampled, record.content)
                raise
            taken = self._videos.take(record, manifest, path, info)
            return self._videos.snapshot(record)
        finally:
            if not taken:
                path.unlink(missing_ok=True)

    def check(self, path: Path, sampling: Sampling) -> None:
        """Raises VideoError if ``create`` would."""
        self._probe(path, sampling)

    def get(self, file_id: str, tenant: str) -> FileRecord | None:
        """The file as it stands; None if this tenant has no such file. Raises StoreError."""
        record = self._find(file_id, tenant)
        return None if record is None else self._looked_at(record)

    def list(self, tenant: str) -> list[FileRecord]:
        """All files of a tenant, newest first. Raises StoreError."""
        try:
            records = self._records.all()
        except StoreUnavailable as error:
            _log.warning("files are listed as last seen: %s", error)
            records = self._records.all_seen()
        records = [record for record in records if record.visible_to(tenant)]
        records.sort(key=lambda record: (record.created_at, record.created_ns, record.id), reverse=True)
        with suppress(StoreUnavailable):
            for record in records:
                self._videos.look(record)
        return [self._videos.snapshot(record) for record in records]

    def delete(self, file_id: str, tenant: str) -> bool:
        """Forgets a file; whether there was one. Questions on it end with FileNotFound. KVs and kept bytes go when no
        other file has them; a prefill for this file alone stops, and has left nothing in the store on return."""
        record = self._find(file_id, tenant)
        return record is not None and self._remove(record)

    def pin(self, file_id: str, tenant: str, pinned: bool) -> FileRecord | None:
        """Tells the quota to leave a file alone, or not to; None if this tenant has no such file. Raises StoreError."""
        record = self._find(file_id, tenant)
        if record is not None:
            record = self._records.change(record, lambda now: replace(now, pinned=pinned))
        return None if record is None else self._looked_at(record)

    def make_room(self, nbytes: int) -> None:
        """Removes unpinned videos, least recently used first, until ``nbytes`` more fit under the store's quota.

        Raises QuotaExceeded, with nothing removed, if they never would.
        """
        self._room.make(nbytes)

    def check_room(self, nbytes: int) -> None:
        """Raises QuotaExceeded if ``make_room`` would. Removes nothing."""
        self._room.check(nbytes)

    def chunks(self, record: FileRecord) -> Sequence[tuple[Chunk, int, int, bool]]:
        """``(chunk, low tokens, high tokens, resident)`` of every chunk prefilled so far."""
        status = self._videos.snapshot(record).video
        if status is None:
            return []
        resident = self._videos.key_of(record) in self._pool
        rows = zip(status.chunks, status.low_tokens, status.high_tokens, strict=True)
        return [(chunk, low, high, resident) for chunk, low, high in rows]

    def thumbnail(self, record: FileRecord, index: int) -> bytes | None:
        """A JPEG of the chunk's middle frame; None if there is none (yet), or a damaged one, which is made again if the
        file's bytes are kept. Raises StoreError."""
        if index not in range(len(self.chunks(record))):
            return None
        try:
            jpeg = self._kvs.thumbnail(self._videos.key_of(record), index)
        except CorruptBlob as error:
            _log.warning("a thumbnail is damaged: %s", error)
            self._videos.repair(self._videos.of(record))
            return None
        return None if jpeg is None else bytes(jpeg)

    def content(self, record: FileRecord) -> Iterator[bytes] | None:
        """The file's bytes; None if they were not kept, or cannot be read. Raises StoreError, also while iterating."""
        try:
            content = self._contents.get(record.content)
        except CorruptBlob as error:
            _log.warning("a kept file is damaged: %s", error)
            return None
        return None if content is None else content.read()

    def video(self, file_id: str, tenant: str) -> Video | None:
        """What a file holds; None if this tenant has no such file. Raises StoreError."""
        record = self._find(file_id, tenant)
        return None if record is None else self._videos.look(record)

    def heal(self, video: Video, manifest: Manifest | None) -> None:
        """See :meth:`Videos.heal`."""
        self._videos.heal(video, manifest)

    def repair(self, video: Video) -> None:
        """See :meth:`Videos.repair`."""
        self._videos.repair(video)

    def seen(self, file_id: str) -> bool:
        """Whether the file exists, as far as is known here without asking the store."""
        return self._records.seen(file_id) is not None

    def note_use(self, file_id: str) -> None:
        """Notes a question about a file: quotas and an inline file's expiry go by the last use. Does not block."""
        with self._lock:
            if file_id in self._used or self._closing.is_set():
                return
            self._used.add(file_id)
            self._notes.submit(self._note_use, file_id)

    def _note_use(self, file_id: str) -> None:
        with self._lock:
            self._used.discard(file_id)
        record = self._records.seen(file_id)
        if record is None:
            return
        ttl_s, now_s = self._options.inline_ttl_s, int(time.time())
        try:
            self._kvs.touch(self._videos.key_of(record))
            self._contents.touch(record.content)
            if record.source == "inline" and (record.expires_at or 0) < now_s + 0.95 * ttl_s:
                self._records.change(record, lambda now: replace(now, expires_at=now_s + ttl_s))
        except StoreError as error:
            _log.warning("a use could not be noted: %s", error)

    def _find(self, file_id: str, tenant: str) -> FileRecord | None:
        record = self._records.get(file_id)
        return record if record is not None and record.visible_to(tenant) else None

    def _looked_at(self, record: FileRecord) -> FileRecord:
        with suppress(StoreUnavailable):  # then as it was last seen
            self._videos.look(record)
        return self._videos.snapshot(record)

    def _probe(self, path: Path, sampling: Sampling) -> VideoInfo:
        with VideoReader(path, sampling, self._limits) as reader:
            choose_mode(self._model, reader.info, sampling, self._options.prefill_nbytes)
            check_resident(least_resident_nbytes(self._model, reader.info), self._options.resident_nbytes)
            return reader.info

    def _keep(self, path: Path, record: FileRecord, stored_nbytes: int) -> None:
        if self._options.keep_video and not self._contents.holds(record.content):
            self._room.make(record.nbytes - stored_nbytes, self._videos.of(record))
            with path.open("rb") as file:
                self._contents.put(record.content, file)

    def _forget(self, record: FileRecord) -> None:
        self._videos.forget(record)
        self._on_delete(record.id)

    def _remove(self, record: FileRecord, *, only_expired: bool = False) -> bool:
        with self._records.changing(record.content):
            if only_expired:  # a use of it may have put that off meanwhile, here or elsewhere
                now = self._records.get(record.id)
                if now is not None and not now.expired:
                    return False
            deleted = self._records.delete(record)  # and forgotten by that
        self._videos.wait_stopped(record)
        self._videos.clear(self._videos.key_of(record), record.sampled, record.content)
        return deleted

    def _adopt(self, records: Sequence[FileRecord]) -> None:
        """Sees to it that all that is not yet prefilled will be."""
        for record in records:
            if record.status == "uploaded" and not record.expired and self._videos.look(record).manifest is not None:
                self._records.change(record, self._videos.snapshot)

    def _sweep(self) -> None:
        """Deletes expired files, and adopts those of replicas that are gone, until the library closes."""
        while not self._closing.wait(self._options.sweep_interval_s):
            try:
                records = self._records.all()
                for record in records:
                    if record.expired:
                        self._remove(record, only_expired=True)
                self._adopt(records)
            except StoreError as error:
                _log.warning("expired files could not be deleted yet: %s", error)
            except Exception:
                _log.exception("files could not be looked after")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
