"""The prefills of videos: a few at a time, and each at one replica only."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from kvstore.base import Store
from kvstore.content import ContentStore
from kvstore.errors import CorruptBlob, DamagedVideo, StoreError, StoreUnavailable
from kvstore.key import ContentKey, KVKey
from kvstore.manifest import Manifest
from kvstore.resident import HighKV
from kvstore.video import VideoStore
from server.engine.ingest import Ingest
from server.engine.options import EngineOptions
from server.engine.video import Job, Video
from server.models.base import PositionLimitError, VideoModel
from server.video.errors import VideoCancelled, VideoError
from server.video.reader import VideoInfo

_POLL_S = 0.5
_RETRY_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A video that is committed to the store; ``high`` lies on the device, None where another replica made it."""

    manifest: Manifest
    high: HighKV | None


class Prefills:
    """Takes videos from their files, or from the bytes kept of them, to their KVs in the store.

    Replicas share a store. Whoever prefills a video holds a lease on it there; the others wait for what it makes, or
    for the lease to lapse, and then go on where the chunks in the store end. One thread looks after all that is waiting
    and renews the leases of all that is running.
    """

    def __init__(
        self,
        model: VideoModel,
        store: Store,
        videos: VideoStore,
        writers: Executor,
        options: EngineOptions,
        *,
        on_ingest: Callable[[Ingest], None],
        on_look: Callable[[Video], str | None],
        on_commit: Callable[[Video], None],
        on_delay: Callable[[Video], None],
        on_end: Callable[[Video, Job, Prefilled | str | None], None],
        wake: Callable[[], None],
    ) -> None:
        """``on_ingest`` gets every prefill that begins, for the engine thread to take its steps; ``on_look`` a video
        every now and then, and tells why it need not be prefilled any more, if that is so; ``on_commit`` one that has
        come into the store, and may raise StoreError to refuse it; ``on_delay`` one that waits for the store, again
        and again while it does; ``on_end`` the result, or why there is none, or None if it was stopped."""
        self._model = model
        self._store = store
        self._videos = videos
        self._contents = ContentStore(store)
        self._writers = writers
        self._options = options
        self._limits = options.limits_for(model.spec)
        self._on_ingest, self._on_look, self._on_commit = on_ingest, on_look, on_commit
        self._on_delay, self._on_end = on_delay, on_end
        self._wake = wake
        self._threads = ThreadPoolExecutor(options.max_concurrent_prefills, "x2l-ingest")
        self._keeper = threading.Thread(target=self._keep, name="x2l-leases", daemon=True)
        self._lock = threading.Lock()  # guards the table of jobs; what they are at is the keeper's to change
        self._jobs: dict[Job, Video] = {}
        self._turn = threading.Event()  # there is something new to look after
        self._closing = False

    def open(self) -> None:
        self._keeper.start()

    def close(self, timeout_s: float) -> None:
        """Stops all jobs and waits for them. Their chunks stay in the store."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            self.stop(job)
        for job in jobs:
            job.ended.wait(timeout_s)
        self._closing = True
        self._turn.set()
        if self._keeper.is_alive():
            self._keeper.join()
        self._threads.shutdown()

    def start(self, video: Video, path: Path | None, info: VideoInfo | None, *, verify: bool = False) -> None:
        """Gives the video a job. The temporary file ``path`` is removed in the end, whatever happens; None takes the
        kept bytes. ``info`` is what is known of the video already."""
        job = Job(self._new_ingest(video, info, verify), path, verify)
        video.error, video.job = None, job
        with self._lock:
            self._jobs[job] = video
        self._turn.set()

    def stop(self, job: Job) -> None:
        """Ends a job soon; ``job.ended`` tells when it has cleaned up. Does not block."""
        job.stopped = True
        job.ingest.cancel()
        self._turn.set()

    def wait_stopped(self, key: KVKey, timeout_s: float) -> None:
        """Waits for those jobs on a video that were stopped."""
        with self._lock:
            jobs = [job for job, video in self._jobs.items() if video.key == key and job.stopped]
        for job in jobs:
            job.ended.wait(timeout_s)

    def _new_ingest(self, video: Video, info: VideoInfo | None, verify: bool) -> Ingest:
        ingest = Ingest(
            video.key,
            video.fingerprint,
            self._model,
            self._videos,
            self._writers,
            self._wake,
            verify=verify,
            resident_nbytes=self._options.resident_nbytes,
            prefill_nbytes=self._options.prefill_nbytes,
        )
        ingest.info = info
        return ingest

    def _finish(self, video: Video, job: Job, result: Prefilled | str | None) -> None:
        with self._lock:
            if job.ending:
                return
            job.ending = True
        try:
            if job.path is not None:
                with suppress(OSError):  # the spool's folder goes as a whole in the end
                    job.path.unlink()  # first: nothing is left over for whoever is told that it ended
            self._on_end(video, job, result)
        finally:
            with self._lock:  # not before: until now there was something to wait for
                del self._jobs[job]
            job.ended.set()

    def _keep(self) -> None:
        while not self._closing:
            with self._lock:
                jobs = list(self._jobs.items())
            for job, video in jobs:
                self._attend(video, job)
            self._turn.wait(min(_POLL_S, self._options.lease_s / 4) if jobs else None)
            self._turn.clear()

    def _attend(self, video: Video, job: Job) -> None:
        try:
            if job.running:
                self._watch(video, job)
            elif job.stopped:
                self._finish(video, job, None)
            else:
                self._begin(video, job)
        except StoreError as error:
            if not job.running:
                self._put_off(video, job, error)
        except Exception:
            _log.exception("a prefill could not be looked after")

    def _watch(self, video: Video, job: Job) -> None:
        with job.guard:  # a lease that was given back must not be taken again
            lost = job.running and not self._lease(video.key, job)
        if lost:
            _log.warning("the lease on a video was lost to another replica")
            job.ingest.cancel()
        if self._on_look(video) is not None:
            self.stop(job)

    def _begin(self, video: Video, job: Job) -> None:
        """Starts a waiting job, if it is still wanted and its turn has come."""
        with self._lock:
            num_running, num_jobs = sum(other.running for other in self._jobs), len(self._jobs)
        full = num_running >= self._options.max_concurrent_prefills
        now_s = time.monotonic()
        if now_s < job.due_s and (full or job.failing_since_s is not None):
            return
        job.due_s = now_s + max(_POLL_S, num_jobs * _POLL_S / 50)
        result = self._result_elsewhere(video, job)
        if result is not None:
            self._finish(video, job, result)
        elif not full and self._lease(video.key, job):
            job.running = True
            self._threads.submit(self._run, video, job)

    def _result_elsewhere(self, video: Video, job: Job) -> Prefilled | str | None:
        """What became of the video at another replica, if anything did. Raises StoreUnavailable."""
        reason = self._on_look(video)
        if reason is not None:
            return reason
        with suppress(CorruptBlob):
            manifest = self._videos.manifest(video.key)
            if manifest is not None and not job.verify:
                return Prefilled(manifest, None)
        return None

    def _run(self, video: Video, job: Job) -> None:
        """On a thread of its own, with the lease."""
        try:
            result: Prefilled | str | None = self._prefill(video, job)
        except VideoCancelled:  # deleted, or the server is closing, or the lease was lost
            result = None
        except StoreUnavailable as error:
            result = None
            self._put_off(video, job, error)
        except (VideoError, PositionLimitError, StoreError) as error:
            result = str(error)
        except torch.OutOfMemoryError as error:
            _log.warning("a prefill did not fit into the device's memory: %s", error)
            result = "its prefill did not fit into the device's memory, beside what else ran there"
        except Exception:
            _log.exception("a prefill has failed")
            result = "an internal error, which the server has logged"
        if result is not None or job.stopped:
            self._finish(video, job, result)  # before another replica may look
        else:
            job.ingest = self._new_ingest(video, job.ingest.info, job.verify)
        with job.guard:
            job.running = False
            with suppress(StoreError):  # it lapses by itself
                self._store.release_lock(_lease_name(video.key), job.owner)
        self._turn.set()

    def _prefill(self, video: Video, job: Job) -> Prefilled:
        result = self._result_elsewhere(video, job) or self._whole(video, job)
        if isinstance(result, str):
            raise DamagedVideo(result)
        if result is not None:
            return result
        ingest = job.ingest
        path = job.path or self._restore(video.content)
        try:
            self._videos.note(video.key, video.sampled)
            self._on_ingest(ingest)
            manifest, high = ingest.run(path, video.sampling, self._limits)
        finally:
            if ingest.num_written:
                job.failing_since_s = None
            if path is not job.path:
                path.unlink()
        self._on_commit(video)
        return Prefilled(manifest, high)

    def _whole(self, video: Video, job: Job) -> Prefilled | None:
        """A video that could not be loaded may be whole again: another replica has healed it, or the store is back."""
        if not job.verify or video.manifest is not None:
            return None
        with suppress(DamagedVideo):
            manifest, high = self._videos.manifest(video.key), self._videos.read_high(video.key)
            if manifest is not None and high is not None:
                return Prefilled(manifest, None)
        return None

    def _put_off(self, video: Video, job: Job, error: StoreError) -> None:
        """Tries again a little later, while there is hope."""
        now_s = time.monotonic()
        job.due_s = now_s + _RETRY_S
        job.failing_since_s = job.failing_since_s or now_s
        _log.warning("a prefill waits for the store: %s", error)
        if now_s - job.failing_since_s > self._options.store_patience_s:
            self._finish(video, job, str(error))
        else:
            self._on_delay(video)

    def _restore(self, key: ContentKey) -> Path:
        """The kept bytes as a temporary file. Bytes that are damaged are kept no longer. Raises StoreError."""
        with tempfile.NamedTemporaryFile(dir=self._options.spool, delete=False) as file:
            path = Path(file.name)
            try:
                content = self._contents.get(key)
                if content is None:
                    raise DamagedVideo("its bytes are not kept")
                file.writelines(content.read())
            except BaseException as error:
                path.unlink()
                if not isinstance(error, DamagedVideo):
                    raise
                self._contents.delete(key)
                raise DamagedVideo(f"its KVs cannot be made again: upload it again ({error})") from error
        return path

    def _lease(self, key: KVKey, job: Job) -> bool:
        return self._store.acquire_lock(_lease_name(key), job.owner, self._options.lease_s)


def _lease_name(key: KVKey) -> str:
    return f"prefill/{key.digest}"
