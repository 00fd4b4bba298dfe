"""The videos that a server looks after: what is known of each, their prefills, and what becomes of them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from kvstore.base import Store
from kvstore.content import ContentStore
from kvstore.errors import CorruptBlob, PoolError, StoreError
from kvstore.key import ContentKey, KVKey, SampledKey
from kvstore.manifest import Manifest
from kvstore.resident import ResidentPool
from kvstore.video import VideoStore
from server.engine.ingest import Ingest
from server.engine.options import EngineOptions
from server.engine.prefills import Prefilled, Prefills
from server.engine.record import FileRecord, VideoStatus
from server.engine.records import Records
from server.engine.video import Job, Video, fingerprint_of
from server.models.base import VideoModel
from server.video.reader import Sampling, VideoInfo

_STOP_TIMEOUT_S = 10.0
_REPAIR_AGAIN_S = 60.0
_QUOTA = "the store's quota removed it: upload it again"
_LOST = (
    "its KVs are not in the store (the quota removed them, or the server's settings have changed): the next question "
    "has it prefilled again, and waits for that"
)
_GONE = "neither its KVs nor its bytes are in the store: upload it again"
_DELETED = "its file was deleted"
_log = logging.getLogger(__name__)


class Videos:
    """One Video for every content, sampling and tenant; the files that hold it share it. Any thread may call any
    method."""

    def __init__(
        self,
        model: VideoModel,
        store: Store,
        kvs: VideoStore,
        pool: ResidentPool,
        records: Records,
        writers: Executor,
        options: EngineOptions,
        *,
        on_ingest: Callable[[Ingest], None],
        on_commit: Callable[[Video], None],
        on_change: Callable[[KVKey], None],
        wake: Callable[[], None],
    ) -> None:
        """``on_commit`` gets a video that has come into the store, and may raise StoreError to refuse it; the others
        as in Library."""
        self._model = model
        self._kvs = kvs
        self._contents = ContentStore(store)
        self._pool = pool
        self._records = records
        self._options = options
        self._on_change = on_change
        self._key = lru_cache(maxsize=10_000)(self._make_key)
        self._lock = threading.Lock()  # guards the table and what its videos are at, for moments only
        self._known: dict[KVKey, Video] = {}
        self._closing = False
        self._prefills = Prefills(
            model,
            store,
            kvs,
            writers,
            options,
            on_ingest=on_ingest,
            on_look=self._look_in,
            on_commit=on_commit,
            on_delay=lambda video: on_change(video.key),
            on_end=self._settle,
            wake=wake,
        )

    def open(self) -> None:
        self._prefills.open()

    def close(self) -> None:
        """Stops all prefills; their chunks stay in the store."""
        with self._lock:
            self._closing = True
        self._prefills.close(_STOP_TIMEOUT_S)

    def key_of(self, record: FileRecord) -> KVKey:
        return self._key(record.content_sha256, record.sampling, record.tenant)

    def manifest(self, key: KVKey) -> Manifest | None:
        """None as well for a damaged one, which a new prefill replaces."""
        try:
            return self._kvs.manifest(key)
        except CorruptBlob:
            return None

    def of(self, record: FileRecord) -> Video:
        """The video of a record, from the table or new there."""
        key = self.key_of(record)
        with self._lock:
            video = self._known.get(key)
            if video is None:
                fingerprint = fingerprint_of(self._model, record.sampling, self._options.low_precision)
                video = self._known[key] = Video(key, record.content, record.sampled, fingerprint, record.sampling)
        return video

    def look(self, record: FileRecord) -> Video:
        """The video of a record; what is not known of it here is looked up. A prefill that nobody seems to look after
        gets a job, which waits for whoever does."""
        video = self.of(record)
        self.see_loss(record)
        if video.manifest is not None or video.job is not None:
            return video
        manifest = self.manifest(video.key)
        lost = manifest is None and record.status == "processed"
        error = record.status_details if manifest is None and record.status == "error" else None
        if lost and not self._contents.holds(record.content):
            error = _GONE
        with self._lock:
            if video.manifest is None and video.job is None:
                video.manifest, video.error, video.lost = manifest, error, lost
                if manifest is None and record.status == "uploaded":
                    self._prefill(video, None, None)
        return video

    def see_loss(self, record: FileRecord) -> None:
        """A video that is ready here may have been removed by the quota of another replica, whose record says so."""
        with self._lock:
            video = self._known.get(self.key_of(record))
        if video is None or video.manifest is None or record.status_details is None:
            return
        if self.manifest(video.key) is not None:
            return
        with self._lock:
            video.manifest, video.lost = None, True
            video.error = record.status_details if record.status == "error" else None
        self._pool.discard(video.key)

    def snapshot(self, record: FileRecord) -> FileRecord:
        with self._lock:
            video = self._known.get(self.key_of(record))
        if video is None:
            return record
        status = video.status
        if status is None and not (video.lost and record.status == "processed"):
            return record
        described = video.describe(self._model.spec.frames_per_chunk) or _without_kvs(record.video)
        if status is None:
            return replace(record, status_details=_LOST, video=described)
        details = video.error if status == "error" else None
        return replace(record, status=status, status_details=details, video=described)

    def take(self, record: FileRecord, manifest: Manifest | None, path: Path, info: VideoInfo | None) -> bool:
        """A file has come, and the store has this ``manifest`` of its video: whether ``path`` was taken over for a
        prefill. ``info`` is what is known of it already."""
        video = self.of(record)
        with self._lock:
            if manifest is None:
                video.manifest = None  # it may have gone elsewhere
                return self._prefill(video, path, info)
            if video.unrepaired_s is not None:
                return self._prefill(video, path, info, verify=True)
            if video.job is None:
                video.manifest = manifest
        return False

    def heal(self, video: Video, manifest: Manifest | None) -> None:
        """Prefills again a video whose H-KVs or manifest, which ``manifest`` promises, are gone or damaged; does
        nothing if that was seen to already. Returns at once; the end comes through ``on_change``."""
        with self._lock:
            gone = self._known.get(video.key) is not video
            if gone or video.error is not None or video.manifest is not manifest or self._closing:
                return
            video.manifest = None
            self._pool.discard(video.key)
            self._prefill(video, None, None, verify=True)

    def repair(self, video: Video) -> None:
        """Makes again, in the background, the L-KVs of a video that are gone or damaged, if its bytes are kept. It
        answers questions meanwhile."""
        with self._lock:
            tried_s = video.unrepaired_s
            due = tried_s is None or time.monotonic() > tried_s + _REPAIR_AGAIN_S
            if due and self._known.get(video.key) is video and video.manifest is not None:
                self._prefill(video, None, None, verify=True)

    def forget(self, record: FileRecord) -> None:
        """Lets go of a file that was deleted, here or elsewhere, and stops a prefill for it alone. Does not block."""
        key = self.key_of(record)
        if any(self.key_of(other) == key for other in self._records.all_seen()):
            return
        with self._lock:
            video = self._known.pop(key, None)
        self._pool.discard(key)
        if video is not None and video.job is not None:
            self._prefills.stop(video.job)

    def wait_stopped(self, record: FileRecord) -> None:
        """Waits until a prefill that was stopped has cleaned up."""
        self._prefills.wait_stopped(self.key_of(record), _STOP_TIMEOUT_S)

    def clear(self, key: KVKey, sampled: SampledKey, content: ContentKey) -> None:
        """Removes what no file refers to any more: the KVs under ``key`` with all others made of ``sampled``, also by a
        server with other settings, and the kept bytes. Whoever is still making some stops by itself and clears them."""
        with self._records.changing(content):
            left = [record for record in self._records.all() if record.content == content]
            if all(record.sampled != sampled for record in left):
                self._kvs.delete(key)  # first, and in any case: a store's older KVs have no note
                self._kvs.delete_made_of(sampled)
            if not left:
                self._contents.delete(content)

    def busy(self) -> Sequence[Video]:
        with self._lock:
            return [video for video in self._known.values() if video.job is not None]

    def lose(self, record: FileRecord, has_kvs: bool, has_bytes: bool) -> None:
        """A question makes KVs again from the bytes; a file that has neither fails before it is asked about. Both say
        so at every replica."""
        if has_kvs:
            return
        key = self.key_of(record)
        self._pool.discard(key)
        with self._lock:
            video = self._known.get(key)
            if video is not None:
                video.manifest, video.lost = None, True
                video.error = None if has_bytes else video.error or _QUOTA

        def told(now: FileRecord) -> FileRecord:
            if not has_bytes:
                why = now.status_details if now.status == "error" else _QUOTA  # what it failed by says more
                return replace(now, status="error", status_details=why, video=_without_kvs(now.video))
            if now.status == "processed":
                return replace(now, status_details=_LOST, video=_without_kvs(now.video))
            return now

        self._records.change(record, told)

    def _prefill(self, video: Video, path: Path | None, info: VideoInfo | None, *, verify: bool = False) -> bool:
        """Gives a video a job unless it has one; whether ``path`` was taken over. Under the lock."""
        if video.job is not None or self._closing:
            return False
        self._prefills.start(video, path, info, verify=verify)
        return True

    def _make_key(self, content_sha256: str, sampling: Sampling, tenant: str) -> KVKey:
        fingerprint = fingerprint_of(self._model, sampling, self._options.low_precision)
        return KVKey.of(content_sha256, fingerprint, tenant)

    def _files_of(self, video: Video) -> Sequence[FileRecord]:
        return [record for record in self._records.all_seen() if self.key_of(record) == video.key]

    def _save(self, video: Video) -> int:
        """Writes down how the video's files stand; how many there are."""
        count = 0
        for record in self._files_of(video):
            now = self._records.get(record.id)
            if now is not None and now != self.snapshot(now):
                now = self._records.change(now, self.snapshot)
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

    def _settle(self, video: Video, job: Job, result: Prefilled | str | None) -> None:
        """Notes the end of a prefill: what it made, or why there is nothing. On its own thread or the keeper's."""
        with self._lock:
            wanted = self._known.get(video.key) is video
            if not wanted or result is None:
                pass
            elif isinstance(result, Prefilled):
                if result.high is not None:
                    with suppress(
                        PoolError, torch.OutOfMemoryError
                    ):  # then it is read from the store when it is asked about
                        self._pool.put(video.key, result.high).release()
                video.manifest, video.unrepaired_s = result.manifest, None
            elif video.manifest is not None:
                _log.warning("a damaged video could not be repaired: %s", result)
                video.unrepaired_s = time.monotonic()
            else:
                video.error = result
            if video.job is job:  # last, for those who look without the lock
                video.job = None
        try:
            if wanted and video.error is not None:
                self._kvs.delete(video.key)
            if not wanted or (result is not None and not self._save(video)):
                self.clear(video.key, video.sampled, video.content)
        except StoreError as error:
            _log.error("the end of a prefill could not be written down: %s", error)
        self._on_change(video.key)


def _without_kvs(status: VideoStatus | None) -> VideoStatus | None:
    return None if status is None else status.without_kvs()
