"""The prefills of videos, a few at a time, each on a thread of its own."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kvstore.base import Store
from kvstore.content import ContentStore
from kvstore.errors import DamagedVideo, StoreError
from kvstore.key import ContentKey
from kvstore.manifest import Manifest
from kvstore.resident import HighKV
from kvstore.video import VideoStore
from server.engine.ingest import Ingest
from server.engine.options import EngineOptions
from server.engine.video import Job, Video
from server.models.base import PositionLimitError, VideoModel
from server.video.errors import VideoCancelled, VideoError
from server.video.reader import VideoInfo

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A video that is committed to the store; ``high`` lies on the device."""

    manifest: Manifest
    high: HighKV


class Prefills:
    """Takes videos from their files, or from the bytes kept of them, to their KVs in the store."""

    def __init__(
        self,
        model: VideoModel,
        store: Store,
        writers: Executor,
        options: EngineOptions,
        *,
        on_ingest: Callable[[Ingest], None],
        on_commit: Callable[[Video], None],
        on_end: Callable[[Video, Job, Prefilled | str], None],
        wake: Callable[[], None],
    ) -> None:
        """``on_ingest`` gets every prefill that begins, for the engine thread to take its steps; ``on_commit`` a video
        that has come into the store, and may raise StoreError to refuse it; ``on_end`` the result, or why there is
        none, unless it was cancelled."""
        self._model = model
        self._videos = VideoStore(store)
        self._contents = ContentStore(store)
        self._writers = writers
        self._spool = options.spool
        self._limits = options.limits_for(model.spec)
        self._on_ingest, self._on_commit, self._on_end, self._wake = on_ingest, on_commit, on_end, wake
        self._threads = ThreadPoolExecutor(options.max_concurrent_prefills, "x2l-ingest")

    def close(self) -> None:
        """Waits for the threads; their jobs must have been stopped."""
        self._threads.shutdown()

    def start(self, video: Video, path: Path | None, info: VideoInfo | None) -> None:
        """Queues a prefill as the video's job. The temporary file ``path`` is removed in the end, whatever happens;
        None takes the kept bytes. ``info`` is what is known of the video already."""
        ingest = Ingest(video.key, video.fingerprint, self._model, self._videos, self._writers, self._wake)
        ingest.info = info
        job = Job(ingest, path)
        video.error, video.job = None, job
        job.future = self._threads.submit(self._run, video, job)

    def _run(self, video: Video, job: Job) -> None:
        result: Prefilled | str
        try:
            result = self._prefill(video, job)
        except VideoCancelled:  # deleted, or the server is closing
            return
        except (VideoError, PositionLimitError, StoreError) as error:
            result = str(error)
        except Exception:
            _log.exception("a prefill has failed")
            result = "an internal error, which the server has logged"
        self._on_end(video, job, result)

    def _prefill(self, video: Video, job: Job) -> Prefilled:
        try:
            path = job.path or self._restore(video.content)
        except BaseException:
            job.ingest.abandon()
            raise
        try:
            self._on_ingest(job.ingest)
            manifest, high = job.ingest.run(path, video.sampling, self._limits)
        finally:
            path.unlink(missing_ok=True)
        self._on_commit(video)
        return Prefilled(manifest, high)

    def _restore(self, key: ContentKey) -> Path:
        """The kept bytes as a temporary file. Raises StoreError."""
        content = self._contents.get(key)
        if content is None:
            raise DamagedVideo("its bytes are no longer kept: upload it again")
        with tempfile.NamedTemporaryFile(dir=self._spool, delete=False) as file:
            path = Path(file.name)
            try:
                file.writelines(content.read())
            except BaseException:
                path.unlink()
                raise
        return path
