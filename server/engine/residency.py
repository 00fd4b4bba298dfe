"""From a question to the H-KVs of its videos on the device: waiting, loading, healing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import torch

from kvstore.errors import DamagedVideo, PoolError, PoolFull, StoreUnavailable
from kvstore.key import KVKey
from kvstore.manifest import Manifest
from kvstore.resident import HighKV, ResidentPool
from kvstore.video import VideoStore
from server.engine.errors import FileNotFound, ShuttingDown, VideoFailed
from server.engine.library import Library
from server.engine.options import EngineOptions
from server.engine.question import Phase, Question
from server.engine.reads import Reads
from server.engine.video import Video
from server.models.device import pinned, to_device

_log = logging.getLogger(__name__)
_Ready = tuple[str, Video, Manifest]  # a file's id, what it holds, and what was promised of that


class Residency:
    """Takes a question with videos from QUEUED to SCORE, where it has a lease on all of them, or lets it wait.

    Used by the engine thread alone, but for :meth:`find`.
    """

    def __init__(
        self,
        library: Library,
        kvs: VideoStore,
        pool: ResidentPool,
        reads: Reads,
        options: EngineOptions,
        device: torch.device,
        *,
        attempt: Callable[[Question, Callable[[Question], None]], None],
        is_open: Callable[[], bool],
    ) -> None:
        """``attempt`` does a question's work and lets its errors end that question alone; ``is_open`` tells whether
        anything new may begin."""
        self._library = library
        self._kvs = kvs
        self._pool = pool
        self._reads = reads
        self._options = options
        self._device = device
        self._attempt = attempt
        self._is_open = is_open
        self._queue: list[tuple[Question, Callable[[Question], None]]] = []
        """Questions whose H-KVs have no room in the pool before a lease ends."""

    def find(self, question: Question) -> None:
        """From any thread: whether all files that are asked about still exist and have not failed, as far as is known
        without asking the store.

        Raises FileNotFound, VideoFailed.
        """
        for file_id, video in question.videos.items():
            if not self._library.seen(file_id):
                raise FileNotFound(file_id)
            if video.error is not None and video.manifest is None:
                raise VideoFailed(file_id, video.error)

    def begin(self, question: Question) -> None:
        """Gives a question a slot, or lets it wait for its videos without one."""
        self.find(question)
        ready: list[_Ready] = []
        missing: dict[KVKey, tuple[str, Video]] = {}
        for file_id, video in question.videos.items():
            job, manifest = video.job, video.manifest  # in this order: a manifest is set before its job goes
            if manifest is not None:
                ready.append((file_id, video, manifest))
            elif not self._is_open():
                raise ShuttingDown("the server is shutting down")
            elif job is None:
                missing[video.key] = (file_id, video)
            elif job.failing_s > self._options.load_timeout_s:
                raise StoreUnavailable("the prefill that was asked about waits for the store")
        for file_id, video in missing.values():
            self._heal(question, file_id, video, None)
        if not missing and len(ready) < len(question.videos):
            question.phase = Phase.WAITING
        elif not missing:
            question.check([manifest for *_, manifest in ready])
            self._lease(question, ready)

    def video_changed(self, key: KVKey, questions: Iterable[Question]) -> None:
        """A prefill has ended, or is held up: those that wait for it look again."""
        for question in questions:
            if question.phase is Phase.WAITING and any(video.key == key for video in question.videos.values()):
                question.phase = Phase.QUEUED
        self.retry()  # the prefill has let go of its own lease

    def retry(self) -> None:
        """A lease has ended: lets those in that waited for room."""
        waiting, self._queue = self._queue, []
        for question, work in waiting:
            self._attempt(question, work)

    def check_pool(self) -> None:
        """Whether the books balance, in an idle moment."""
        try:
            self._pool.check_integrity()
        except PoolError as error:
            _log.error("the device pool: %s", error)

    def _lease(self, question: Question, ready: Sequence[_Ready]) -> None:
        leases = self._pool.lease_all([video.key for _, video, _ in ready], {})
        if leases is not None:
            question.leases, question.phase = leases, Phase.SCORE
        else:
            question.phase = Phase.LOADING
            absent = [entry for entry in ready if entry[1].key not in self._pool]
            self._reads.submit(
                partial(self._read_high, [video.key for _, video, _ in absent]),
                lambda future: self._attempt(question, partial(self._loaded, absent, future)),
                self._options.load_timeout_s,
            )
        for file_id in question.videos:
            self._library.note_use(file_id)

    def _read_high(self, keys: Sequence[KVKey]) -> list[HighKV | None]:
        """On a reading thread, into memory that a GPU copies from by itself: None in the place of what is gone or
        damaged."""
        found: list[HighKV | None] = []
        for key in keys:
            try:
                high = self._kvs.read_high(key)
                found.append(high and high.brought(partial(pinned, device=self._device)))
            except DamagedVideo as error:
                _log.warning("a video is damaged: %s", error)
                found.append(None)
        return found

    def _loaded(self, absent: Sequence[_Ready], future: Future[list[HighKV | None]], question: Question) -> None:
        loaded: dict[KVKey, HighKV] = {}
        damaged: dict[KVKey, _Ready] = {}
        for entry, high in zip(absent, future.result(), strict=True):
            if high is None:
                damaged[entry[1].key] = entry
            else:
                loaded[entry[1].key] = high
        for file_id, video, manifest in damaged.values():
            self._heal(question, file_id, video, manifest)
        if not damaged:
            self._reside(loaded, question)

    def _reside(self, loaded: Mapping[KVKey, HighKV], question: Question) -> None:
        """Puts H-KVs read from the store into the pool, beside the question's others, now or when there is room."""
        self.find(question)  # they may have been deleted while they were read
        keys = [video.key for video in question.videos.values()]
        try:
            bring = partial(to_device, device=self._device)
            on_device = {key: high.brought(bring) for key, high in loaded.items()}
            leases = self._pool.lease_all(keys, on_device)
        except PoolFull:
            self._queue.append((question, partial(self._reside, loaded)))
            return
        if leases is None:  # one that was resident before has gone meanwhile
            question.phase = Phase.QUEUED
        else:
            question.leases, question.phase = leases, Phase.SCORE

    def _heal(self, question: Question, file_id: str, video: Video, manifest: Manifest | None) -> None:
        """What ``manifest`` promises is gone or damaged: has the video prefilled again, if that is possible."""
        if video.key in question.healed:
            raise VideoFailed(file_id, "its KVs cannot be read from the store")
        question.healed.add(video.key)
        self._library.heal(video, manifest)
        question.phase = Phase.QUEUED  # to look again
