"""The files that a server knows. Their records lie in the store, so a restart finds them again."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from compression.chunk import Chunk
from kvstore.base import Store
from kvstore.content import ContentStore
from kvstore.errors import CorruptBlob, PoolError, StoreError
from kvstore.key import ContentKey, KVKey
from kvstore.manifest import Manifest
from kvstore.quota import Quota
from kvstore.resident import ResidentPool
from kvstore.video import VideoStore
from server.engine.ingest import Ingest
from server.engine.options import EngineOptions
from server.engine.prefills import Prefilled, Prefills
from server.engine.record import RECORDS, FileRecord, FileSource, VideoStatus
from server.engine.video import Job, Video, fingerprint_of
from server.models.base import VideoModel
from server.video.reader import Sampling, VideoInfo, VideoReader

__all__ = ["FileRecord", "Library", "VideoStatus"]

_STOP_TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)


class Library:
    """Takes files in, has them prefilled, and forgets them. Any thread may call any method; those that read or write
    the store, ``create`` above all, may block."""

    def __init__(
        self,
        model: VideoModel,
        store: Store,
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
        self._store = store
        self._videos = VideoStore(store)
        self._contents = ContentStore(store)
        self._pool = pool
        quota_nbytes = options.store_quota_bytes
        self._quota = None if quota_nbytes is None else Quota(store, quota_nbytes)
        self._options = options
        self._limits = options.limits_for(model.spec)
        self._on_change, self._on_delete = on_change, on_delete
        self._prefills = Prefills(
            model,
            store,
            writers,
            options,
            on_ingest=on_ingest,
            on_commit=lambda video: self._make_room(0, video),
            on_end=self._settle,
            wake=wake,
        )
        self._sweeper = threading.Thread(target=self._sweep, name="x2l-sweep", daemon=True)
        self._closing = threading.Event()
        self._changes = threading.RLock()  # one create, delete or heal at a time: they look, then act on the store
        self._lock = threading.Lock()  # guards the two tables, for moments only
        self._files: dict[str, FileRecord] = {}
        self._known: dict[KVKey, Video] = {}

    def start(self) -> None:
        """Reads the records from the store and goes on with the prefills that a restart has cut off."""
        for blob in list(self._store.keys(RECORDS)):
            try:
                data = self._store.get(blob)
                record = None if data is None else FileRecord.from_json(data)
            except CorruptBlob as error:
                _log.error("a file record is damaged and left out: %s", error)
                continue
            if record is not None:
                self._resume(record)
        self._sweeper.start()

    def close(self) -> None:
        """Stops all prefills; their files stay ``uploaded`` and resume at the next start."""
        self._closing.set()
        with self._changes:
            for video in list(self._known.values()):
                if video.job is not None:
                    video.job.stop(_STOP_TIMEOUT_S)
        self._prefills.close()
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
            nbytes = path.stat().st_size
            digest = content_sha256 or _sha256(path)
            key = self._key(digest, sampling, tenant)
            with self._lock:
                known = self._known.get(key)
            info = None
            if (known is None or known.error is not None) and self._manifest(key) is None:
                info = self._probe(path, sampling)
            with self._changes:
                video = self._open(digest, sampling, tenant)
                self._keep(path, nbytes, stored_nbytes, video)
                if video.manifest is None and video.job is None:
                    self._prefills.start(video, path, info)
                    taken = True
                now_s = int(time.time())
                record = self._same_inline(key, source) or FileRecord(
                    id=f"file-{secrets.token_hex(12)}",
                    tenant=tenant,
                    filename=filename,
                    purpose=purpose,
                    nbytes=nbytes,
                    created_at=now_s,
                    expires_at=None,
                    content_sha256=digest,
                    sampling=sampling,
                    source=source,
                    pinned=pinned,
                )
                ttl_s = self._options.inline_ttl_s if source == "inline" else expires_after_s
                record = replace(record, expires_at=None if ttl_s is None else now_s + ttl_s)
                with self._lock:
                    self._files[record.id] = record
                self._save(record.id)
            return self._snapshot(record)
        finally:
            if not taken:
                path.unlink(missing_ok=True)

    def get(self, file_id: str, tenant: str) -> FileRecord | None:
        """The file as it stands; None if this tenant has no such file."""
        record = self._find(file_id, tenant)
        return None if record is None else self._snapshot(record)

    def list(self, tenant: str) -> list[FileRecord]:
        """All files of a tenant, newest first."""
        with self._lock:
            records = [record for record in self._files.values() if record.visible_to(tenant)]
        records.reverse()  # for those of the same second
        return [self._snapshot(record) for record in sorted(records, key=lambda r: r.created_at, reverse=True)]

    def delete(self, file_id: str, tenant: str) -> bool:
        """Forgets a file; whether there was one. Questions on it end with FileNotFound. KVs and kept bytes go when no
        other file has them; a prefill for this file alone stops, and has left nothing in the store on return."""
        with self._changes:
            record = self._find(file_id, tenant)
            return record is not None and self._remove(record)

    def pin(self, file_id: str, tenant: str, pinned: bool) -> FileRecord | None:
        """Tells the quota to leave a file alone, or not to; None if this tenant has no such file. Raises StoreError."""
        with self._changes:
            record = self._find(file_id, tenant)
            if record is None:
                return None
            record = replace(record, pinned=pinned)
            with self._lock:
                self._files[file_id] = record
            self._save(file_id)
        return self._snapshot(record)

    def make_room(self, nbytes: int) -> None:
        """Removes unpinned videos, least recently used first, until ``nbytes`` more fit under the store's quota.

        Raises QuotaExceeded, with nothing removed, if they never would.
        """
        self._make_room(nbytes)

    def check_room(self, nbytes: int) -> None:
        """Raises QuotaExceeded if ``make_room`` would. Removes nothing."""
        if self._quota is not None:
            self._quota.check_room(nbytes, self._spared(None))

    def chunks(self, record: FileRecord) -> Sequence[tuple[Chunk, int, int, bool]]:
        """``(chunk, low tokens, high tokens, resident)`` of every chunk prefilled so far."""
        status = self._snapshot(record).video
        if status is None:
            return []
        resident = self._key_of(record) in self._pool
        rows = zip(status.chunks, status.low_tokens, status.high_tokens, strict=True)
        return [(chunk, low, high, resident) for chunk, low, high in rows]

    def thumbnail(self, record: FileRecord, index: int) -> bytes | None:
        """A JPEG of the chunk's middle frame; None if there is none (yet). Raises StoreError."""
        jpeg = self._videos.thumbnail(self._key_of(record), index)
        return None if jpeg is None else bytes(jpeg)

    def content(self, record: FileRecord) -> Iterator[bytes] | None:
        """The file's bytes; None if they were not kept. Raises StoreError, also while iterating."""
        content = self._contents.get(ContentKey.of(record.content_sha256, record.tenant))
        return None if content is None else content.read()

    def video(self, file_id: str, tenant: str) -> Video | None:
        """What a file holds; None if this tenant has no such file."""
        record = self._find(file_id, tenant)
        return None if record is None else self._video_of(record)

    def use(self, file_id: str) -> None:
        """Notes a question about a file: quotas and an inline file's expiry go by the last use."""
        try:
            self._use(file_id)
        except StoreError as error:
            _log.warning("a use could not be noted: %s", error)

    def _use(self, file_id: str) -> None:
        with self._lock:
            record = self._files.get(file_id)
        if record is None:
            return
        key = self._key_of(record)
        self._videos.touch(key)
        self._contents.touch(ContentKey.of(record.content_sha256, record.tenant))
        ttl_s, now_s = self._options.inline_ttl_s, int(time.time())
        if record.source == "inline" and (record.expires_at or 0) < now_s + 0.95 * ttl_s:
            with self._lock:
                if file_id in self._files:
                    self._files[file_id] = replace(record, expires_at=now_s + ttl_s)
            self._save(file_id)

    def heal(self, video: Video, manifest: Manifest | None) -> None:
        """Prefills again a video of which what ``manifest`` promises is gone or damaged, or lets it fail if its bytes
        are not kept; does nothing if that was seen to already. Returns at once; the end of the prefill comes through
        ``on_change``. Raises StoreError."""
        with self._changes:
            with self._lock:
                gone = self._known.get(video.key) is not video
            settled = video.job is not None or video.error is not None or video.manifest is not manifest
            if gone or settled or self._closing.is_set():
                return
            video.manifest = None
            self._pool.discard(video.key)
            self._videos.delete(video.key)
            if self._contents.get(video.content) is None:
                self._fail(video, "its KVs are no longer in the store and its bytes were not kept: upload it again")
            else:
                self._prefills.start(video, None, None)

    def _video_of(self, record: FileRecord) -> Video | None:
        with self._lock:
            return self._known.get(self._key_of(record))

    def _find(self, file_id: str, tenant: str) -> FileRecord | None:
        with self._lock:
            record = self._files.get(file_id)
        return record if record is not None and record.visible_to(tenant) else None

    def _snapshot(self, record: FileRecord) -> FileRecord:
        video = self._video_of(record)
        if video is None:
            return record
        described = video.describe(self._model.spec.frames_per_chunk) or record.video
        return replace(record, status=video.status, status_details=video.error, video=described)

    def _key(self, content_sha256: str, sampling: Sampling, tenant: str) -> KVKey:
        return KVKey.of(content_sha256, fingerprint_of(self._model, sampling), tenant)

    def _key_of(self, record: FileRecord) -> KVKey:
        return self._key(record.content_sha256, record.sampling, record.tenant)

    def _manifest(self, key: KVKey) -> Manifest | None:
        """None as well for a damaged one, which a new prefill replaces."""
        try:
            return self._videos.manifest(key)
        except CorruptBlob:
            return None

    def _probe(self, path: Path, sampling: Sampling) -> VideoInfo:
        with VideoReader(path, sampling, self._limits) as reader:
            return reader.info

    def _open(self, content_sha256: str, sampling: Sampling, tenant: str) -> Video:
        """The video of this key, from the table or the store, or a new one."""
        key = self._key(content_sha256, sampling, tenant)
        with self._lock:
            video = self._known.get(key)
        if video is None:
            content = ContentKey.of(content_sha256, tenant)
            video = Video(key, content, fingerprint_of(self._model, sampling), sampling, self._manifest(key))
            with self._lock:
                self._known[key] = video
        return video

    def _keep(self, path: Path, nbytes: int, stored_nbytes: int, video: Video) -> None:
        if self._options.keep_video and self._contents.get(video.content) is None:
            self._make_room(nbytes - stored_nbytes, video)
            with path.open("rb") as file:
                self._contents.put(video.content, file)

    def _make_room(self, nbytes: int, video: Video | None = None) -> None:
        if self._quota is None:
            return
        removed = self._quota.make_room(nbytes, self._spared(video))
        for key in removed:
            if isinstance(key, KVKey):
                self._pool.discard(key)  # a question on it then finds it gone, and heals it
        with self._lock:
            videos = list(self._known.values())
        for hit in videos:
            if hit.key in removed or hit.content in removed:
                self._fail_if_lost(hit)

    def _spared(self, video: Video | None) -> set[KVKey | ContentKey]:
        """What the quota must leave alone: ``video``, what is being prefilled, and what is pinned."""
        with self._lock:
            busy = [other for other in self._known.values() if other is video or other.job is not None]
            pinned = [record for record in self._files.values() if record.pinned]
        keys: set[KVKey | ContentKey] = {key for other in busy for key in (other.key, other.content)}
        for record in pinned:
            keys |= {self._key_of(record), ContentKey.of(record.content_sha256, record.tenant)}
        return keys

    def _fail_if_lost(self, video: Video) -> None:
        """A file of which the quota has left nothing says so, before it is asked about."""
        if video.manifest is not None and not any(self._store.stat(key.manifest) for key in (video.key, video.content)):
            video.manifest = None
            self._fail(video, "the store's quota removed it: upload it again")

    def _same_inline(self, key: KVKey, source: FileSource) -> FileRecord | None:
        if source != "inline":
            return None
        with self._lock:
            records = list(self._files.values())
        return next((r for r in records if r.source == "inline" and self._key_of(r) == key), None)

    def _save(self, file_id: str) -> None:
        """Writes a record as it stands, unless it was deleted meanwhile."""
        with self._changes:
            with self._lock:
                record = self._files.get(file_id)
            if record is not None:
                self._store.put(record.blob, self._snapshot(record).to_json())

    def _save_all(self, video: Video) -> None:
        with self._lock:
            records = list(self._files.values())
        for record in records:
            if self._key_of(record) == video.key:
                self._save(record.id)

    def _remove(self, record: FileRecord) -> bool:
        self._store.delete(record.blob)
        key = self._key_of(record)
        with self._lock:
            self._files.pop(record.id, None)
            others = list(self._files.values())
            video = None if any(self._key_of(other) == key for other in others) else self._known.pop(key, None)
        self._on_delete(record.id)
        if video is not None:
            if video.job is not None:
                video.job.stop(_STOP_TIMEOUT_S)
            self._pool.discard(key)
            self._videos.delete(key)
        if all((o.content_sha256, o.tenant) != (record.content_sha256, record.tenant) for o in others):
            self._contents.delete(ContentKey.of(record.content_sha256, record.tenant))
        return True

    def _resume(self, record: FileRecord) -> None:
        with self._changes:
            video = self._open(record.content_sha256, record.sampling, record.tenant)
            with self._lock:
                self._files[record.id] = record
            if video.manifest is not None or video.job is not None:
                return
            if record.status == "error":
                video.error = record.status_details
            elif record.status == "uploaded":
                self.heal(video, None)

    def _settle(self, video: Video, job: Job, result: Prefilled | str) -> None:
        """Notes the end of a prefill, if it is still wanted: what it made, or why it failed. On its own thread."""
        with self._lock:
            if self._known.get(video.key) is not video or video.job is not job:
                return
            if isinstance(result, str):
                video.error = result
            else:
                with suppress(PoolError):  # then it is read from the store when it is asked about
                    self._pool.put(video.key, result.high).release()
                video.manifest = result.manifest
            video.job = None
        try:
            if isinstance(result, str):
                self._videos.delete(video.key)
            self._save_all(video)
        except StoreError as cause:
            _log.error("a file record could not be written: %s", cause)
        self._on_change(video.key)

    def _fail(self, video: Video, error: str) -> None:
        video.error = error
        self._save_all(video)
        self._on_change(video.key)

    def _sweep(self) -> None:
        """Deletes expired files until the library closes."""
        while not self._closing.wait(self._options.sweep_interval_s):
            with self._lock:
                expired = [record for record in self._files.values() if record.expired]
            for record in expired:
                try:
                    with self._changes:
                        self._remove(record)
                except StoreError as error:
                    _log.warning("an expired file could not be deleted yet: %s", error)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
