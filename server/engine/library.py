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
from functools import lru_cache
from pathlib import Path

from compression.chunk import Chunk
from kvstore.base import Store
from kvstore.content import ContentStore
from kvstore.errors import CorruptBlob, PoolError, StoreError, StoreUnavailable
from kvstore.key import ContentKey, KVKey
from kvstore.manifest import Manifest
from kvstore.resident import ResidentPool
from kvstore.video import VideoStore
from server.engine.ingest import Ingest
from server.engine.options import EngineOptions
from server.engine.prefills import Prefilled, Prefills
from server.engine.record import FileRecord, FileSource, VideoStatus
from server.engine.records import Records
from server.engine.room import Room
from server.engine.video import Job, Video, fingerprint_of
from server.models.base import VideoModel
from server.video.reader import Sampling, VideoInfo, VideoReader

__all__ = ["FileRecord", "Library", "VideoStatus"]

_STOP_TIMEOUT_S = 10.0
_QUOTA = "the store's quota removed it: upload it again"
_DELETED = "its file was deleted"
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
        videos: VideoStore,
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
        self._videos = videos
        self._contents = ContentStore(store)
        self._pool = pool
        self._options = options
        self._limits = options.limits_for(model.spec)
        self._on_change, self._on_delete = on_change, on_delete
        self._key = lru_cache(maxsize=10_000)(self._make_key)
        self._records = Records(store, on_gone=self._forget)
        self._prefills = Prefills(
            model,
            store,
            videos,
            writers,
            options,
            on_ingest=on_ingest,
            on_look=self._look_in,
            on_commit=lambda video: self._room.make(0, video),
            on_end=self._settle,
            wake=wake,
        )
        self._room = Room(
            store,
            options.store_quota_bytes,
            self._records,
            key_of=self._key_of,
            busy=self._busy,
            on_removed=self._removed_by_quota,
        )
        self._sweeper = threading.Thread(target=self._sweep, name="x2l-sweep", daemon=True)
        self._closing = threading.Event()
        self._lock = threading.Lock()  # guards the table and what its videos are at, for moments only
        self._known: dict[KVKey, Video] = {}
        self._notes = ThreadPoolExecutor(1, "x2l-note")
        self._used: set[str] = set()

    def start(self) -> None:
        """Goes on with the prefills that a restart has cut off, or another replica. Raises StoreError."""
        self._prefills.open()
        self._adopt(self._records.all())
        self._sweeper.start()

    def close(self) -> None:
        """Stops all prefills; their files stay ``uploaded`` and resume at the next start."""
        with self._lock:
            self._closing.set()
        self._prefills.close(_STOP_TIMEOUT_S)
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
            key = self._key(digest, sampling, tenant)
            ttl_s = self._options.inline_ttl_s if source == "inline" else expires_after_s
            record = FileRecord(
                # An inline video has one record, at whatever replica it arrives.
                id=f"file-{key.digest[:24] if source == 'inline' else secrets.token_hex(12)}",
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
            info = None if self._manifest(key) is not None else self._probe(path, sampling)
            self._keep(path, record, stored_nbytes)
            with self._records.changing(record.content):
                self._keep(path, record, stored_nbytes)  # unless another replica has deleted it just now
                manifest = self._manifest(key)
                known = self._records.get(record.id) if source == "inline" else None
                if known is not None:
                    record = replace(known, expires_at=record.expires_at)
                record = replace(record, status="uploaded" if manifest is None else "processed", status_details=None)
                self._records.put(record)
            video = self._video_of(record)
            with self._lock:
                if manifest is None:
                    video.manifest = None  # it may have gone elsewhere
                    taken = self._prefill(video, path, info)
                elif not video.repairable:
                    video.repairable = True
                    taken = self._prefill(video, path, info, verify=True)
                elif video.job is None:
                    video.manifest = manifest
            return self._snapshot(record)
        finally:
            if not taken:
                path.unlink(missing_ok=True)

    def get(self, file_id: str, tenant: str) -> FileRecord | None:
        """The file as it stands; None if this tenant has no such file. Raises StoreError."""
        record = self._find(file_id, tenant)
        if record is None:
            return None
        with suppress(StoreUnavailable):  # then as it was last seen
            self._look(record)
        return self._snapshot(record)

    def list(self, tenant: str) -> list[FileRecord]:
        """All files of a tenant, newest first. Raises StoreError."""
        records = [record for record in self._records.all() if record.visible_to(tenant)]
        records.sort(key=lambda record: (record.created_at, record.created_ns, record.id), reverse=True)
        with suppress(StoreUnavailable):  # then as they were last seen
            for record in records:
                self._see_loss(record)
        return [self._snapshot(record) for record in records]

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
        return None if record is None else self._snapshot(record)

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
        content = self._contents.get(record.content)
        return None if content is None else content.read()

    def video(self, file_id: str, tenant: str) -> Video | None:
        """What a file holds; None if this tenant has no such file. Raises StoreError."""
        record = self._find(file_id, tenant)
        return None if record is None else self._look(record)

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
            self._videos.touch(self._key_of(record))
            self._contents.touch(record.content)
            if record.source == "inline" and (record.expires_at or 0) < now_s + 0.95 * ttl_s:
                self._records.change(record, lambda now: replace(now, expires_at=now_s + ttl_s))
        except StoreError as error:
            _log.warning("a use could not be noted: %s", error)

    def heal(self, video: Video, manifest: Manifest | None) -> None:
        """Prefills again a video whose H-KVs or manifest, which ``manifest`` promises, are gone or damaged; does
        nothing if that was seen to already. Returns at once; the end comes through ``on_change``."""
        with self._lock:
            gone = self._known.get(video.key) is not video
            if gone or video.error is not None or video.manifest is not manifest or self._closing.is_set():
                return
            video.manifest = None
            self._pool.discard(video.key)
            self._prefill(video, None, None, verify=True)

    def repair(self, video: Video) -> None:
        """Makes again, in the background, the L-KVs of a video that are gone or damaged, if its bytes are kept. It
        answers questions meanwhile."""
        with self._lock:
            if self._known.get(video.key) is video and video.manifest is not None and video.repairable:
                self._prefill(video, None, None, verify=True)

    def _prefill(self, video: Video, path: Path | None, info: VideoInfo | None, *, verify: bool = False) -> bool:
        """Gives a video a job unless it has one; whether ``path`` was taken over. Under the lock."""
        if video.job is not None or self._closing.is_set():
            return False
        self._prefills.start(video, path, info, verify=verify)
        return True

    def _find(self, file_id: str, tenant: str) -> FileRecord | None:
        record = self._records.get(file_id)
        return record if record is not None and record.visible_to(tenant) else None

    def _video_of(self, record: FileRecord) -> Video:
        """The video of a record, from the table or new there."""
        key = self._key_of(record)
        with self._lock:
            video = self._known.get(key)
            if video is None:
                fingerprint = fingerprint_of(self._model, record.sampling, self._options.low_precision)
                video = self._known[key] = Video(key, record.content, fingerprint, record.sampling)
        return video

    def _look(self, record: FileRecord) -> Video:
        """The video of a record; what is not known of it here is looked up. A prefill that nobody seems to look after
        gets a job, which waits for whoever does."""
        video = self._video_of(record)
        self._see_loss(record)
        if video.manifest is not None or video.job is not None:
            return video
        manifest = self._manifest(video.key)
        with self._lock:
            if video.manifest is None and video.job is None:
                video.manifest = manifest
                failed = manifest is None and record.status == "error"
                video.error = record.status_details if failed else None
                if manifest is None and record.status == "uploaded":
                    self._prefill(video, None, None)
        return video

    def _see_loss(self, record: FileRecord) -> None:
        """A video that is ready here may have been removed by the quota of another replica, whose record says so."""
        with self._lock:
            video = self._known.get(self._key_of(record))
        if video is None or video.manifest is None or record.status != "error" or self._manifest(video.key) is not None:
            return
        with self._lock:
            video.manifest, video.error = None, record.status_details
        self._pool.discard(video.key)

    def _snapshot(self, record: FileRecord) -> FileRecord:
        with self._lock:
            video = self._known.get(self._key_of(record))
        status = None if video is None else video.status
        if video is None or status is None:
            return record
        described = video.describe(self._model.spec.frames_per_chunk) or record.video
        details = video.error if status == "error" else None
        return replace(record, status=status, status_details=details, video=described)

    def _make_key(self, content_sha256: str, sampling: Sampling, tenant: str) -> KVKey:
        fingerprint = fingerprint_of(self._model, sampling, self._options.low_precision)
        return KVKey.of(content_sha256, fingerprint, tenant)

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

    def _keep(self, path: Path, record: FileRecord, stored_nbytes: int) -> None:
        if self._options.keep_video and self._contents.get(record.content) is None:
            self._room.make(record.nbytes - stored_nbytes, self._video_of(record))
            with path.open("rb") as file:
                self._contents.put(record.content, file)

    def _files_of(self, video: Video) -> Sequence[FileRecord]:
        return [record for record in self._records.all_seen() if self._key_of(record) == video.key]

    def _save(self, video: Video) -> int:
        """Writes down how the video's files stand; how many there are."""
        count = 0
        for record in self._files_of(video):
            now = self._records.get(record.id)
            if now is not None and now != self._snapshot(now):
                now = self._records.change(now, self._snapshot)
            count += now is not None
        return count

    def _look_in(self, video: Video) -> str | None:
        """Tells other replicas how far a prefill is; why it is no longer wanted, if that is so."""
        job = video.job
        if job is not None and job.running:
            return None if self._save(video) else _DELETED
        files = [self._records.get(record.id) for record in self._files_of(video)]
        left = [record for record in files if record is not None]
        if not left:
            return _DELETED
        failed = all(record.status == "error" for record in left)
        return left[0].status_details if failed and job is not None and job.path is None else None

    def _forget(self, record: FileRecord) -> None:
        """Lets go of a file that was deleted, here or elsewhere, and stops a prefill for it alone."""
        video = self._detach(record)
        if video is not None and video.job is not None:
            self._prefills.stop(video.job)
        self._on_delete(record.id)

    def _detach(self, record: FileRecord) -> Video | None:
        key = self._key_of(record)
        if any(self._key_of(other) == key for other in self._records.all_seen()):
            return None
        with self._lock:
            video = self._known.pop(key, None)
        self._pool.discard(key)
        return video

    def _remove(self, record: FileRecord) -> bool:
        with self._lock:
            video = self._known.get(self._key_of(record))
        job = None if video is None else video.job
        with self._records.changing(record.content):
            deleted = self._records.delete(record)  # and forgotten by that
        if job is not None and job.stopped:
            job.ended.wait(_STOP_TIMEOUT_S)
        self._clear(self._key_of(record), record.content)
        return deleted

    def _clear(self, key: KVKey, content: ContentKey) -> None:
        """Removes what no file refers to any more."""
        with self._records.changing(content):
            records = self._records.all()
            if all(self._key_of(record) != key for record in records):
                self._videos.delete(key)
            if all(record.content != content for record in records):
                self._contents.delete(content)

    def _settle(self, video: Video, job: Job, result: Prefilled | str | None) -> None:
        """Notes the end of a prefill: what it made, or why there is nothing. On its own thread or the keeper's."""
        with self._lock:
            wanted = self._known.get(video.key) is video
            if not wanted or result is None:
                pass
            elif isinstance(result, Prefilled):
                if result.high is not None:
                    with suppress(PoolError):  # then it is read from the store when it is asked about
                        self._pool.put(video.key, result.high).release()
                video.manifest, video.repairable = result.manifest, True
            elif video.manifest is not None:
                _log.warning("a damaged video could not be repaired: %s", result)
                video.repairable = False
            else:
                video.error = result
            if video.job is job:  # last, for those who look without the lock
                video.job = None
        try:
            if wanted and video.error is not None:
                self._videos.delete(video.key)
            if not wanted or (result is not None and not self._save(video)):
                self._clear(video.key, video.content)
        except StoreError as error:
            _log.error("the end of a prefill could not be written down: %s", error)
        self._on_change(video.key)

    def _busy(self) -> Sequence[Video]:
        with self._lock:
            return [video for video in self._known.values() if video.job is not None]

    def _removed_by_quota(self, record: FileRecord, has_kvs: bool, has_bytes: bool) -> None:
        """A question makes KVs again from the bytes; a file that has neither says so before it is asked about."""
        if has_kvs:
            return
        key = self._key_of(record)
        self._pool.discard(key)
        with self._lock:
            video = self._known.get(key)
            if video is not None:
                video.manifest = None
                video.error = None if has_bytes else _QUOTA
        if not has_bytes:
            self._records.change(record, lambda now: replace(now, status="error", status_details=_QUOTA))

    def _adopt(self, records: Sequence[FileRecord]) -> None:
        """Sees to it that all that is not yet prefilled will be."""
        for record in records:
            if record.status == "uploaded" and not record.expired and self._look(record).manifest is not None:
                self._records.change(record, self._snapshot)

    def _sweep(self) -> None:
        """Deletes expired files, and adopts those of replicas that are gone, until the library closes."""
        while not self._closing.wait(self._options.sweep_interval_s):
            try:
                records = self._records.all()
                for record in records:
                    if record.expired:
                        self._remove(record)
                self._adopt(records)
            except StoreError as error:
                _log.warning("expired files could not be deleted yet: %s", error)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
