"""The engine: one thread that owns torch, and the answers that come out of it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch

from compression.kv import ChunkKV
from kvstore.base import Store
from kvstore.errors import CorruptBlob, DamagedVideo, MissingBlob, PoolError, PoolFull, StoreError, StoreUnavailable
from kvstore.key import KVKey
from kvstore.manifest import Manifest
from kvstore.resident import HighKV, ResidentPool
from kvstore.video import VideoStore
from server.engine.batch import draw
from server.engine.errors import Cancelled, FileNotFound, QueueFull, ShuttingDown, VideoFailed, reply_to
from server.engine.ingest import Ingest
from server.engine.library import Library
from server.engine.metrics import EngineMetrics
from server.engine.options import EngineOptions
from server.engine.question import Phase, Question
from server.engine.reads import Reads, Result
from server.engine.request import Delta, Request
from server.engine.scheduler import Scheduler
from server.engine.video import Video
from server.models.base import VideoModel

_log = logging.getLogger(__name__)


class Engine:
    """Answers questions about videos and prefills them, many at a time.

    ``submit``, ``cancel`` and all of ``library`` may be called from any thread. What they cause happens on the engine
    thread, which takes it from an inbox between two steps. Slow work (decoding, the store) happens on other threads,
    and what comes of it lands in the same inbox.
    """

    def __init__(self, model: VideoModel, store: Store, options: EngineOptions | None = None) -> None:
        """Takes the model for itself; the store stays the caller's, to be closed after the engine."""
        self._options = options = options or EngineOptions()
        self._model = model
        self._videos = VideoStore(store, options.low_precision)
        self._pool = ResidentPool(options.resident_nbytes)
        self._writers = ThreadPoolExecutor(options.writer_threads, "x2l-write")
        self._scheduler = Scheduler(max_batch=options.max_batch, prefill_share=options.prefill_share)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._reads = Reads(options.reader_threads, self._inbox.put)
        self._thread = threading.Thread(target=self._run, name="x2l-engine", daemon=True)
        self._lock = threading.Lock()  # guards the two below
        self._in_flight: dict[str, Question] = {}
        self._open = False
        self._idle = threading.Event()  # nothing in flight
        self._idle.set()
        self._stopped = False
        self._pool_queue: list[tuple[Question, Callable[[Question], None]]] = []
        """Questions whose H-KVs have no room in the pool before a lease ends."""
        self.library = Library(
            model,
            store,
            self._videos,
            self._pool,
            self._writers,
            options,
            on_ingest=lambda ingest: self._inbox.put(partial(self._scheduler.add_ingest, ingest)),
            on_change=lambda key: self._inbox.put(partial(self._video_changed, key)),
            on_delete=lambda file_id: self._inbox.put(partial(self._file_deleted, file_id)),
            wake=lambda: self._inbox.put(lambda: None),
        )
        self.metrics = EngineMetrics(
            in_flight=lambda: len(self._in_flight),
            running=lambda: self._scheduler.num_running,
            resident_nbytes=lambda: self._pool.nbytes,
            resident_videos=lambda: len(self._pool),
        )

    @property
    def ready(self) -> bool:
        """Whether questions are taken."""
        return self._open and self._thread.is_alive()

    def start(self) -> None:
        """Starts the engine thread and goes on with what a restart has cut off. Raises StoreError."""
        self._thread.start()
        try:
            self.library.start()
        except BaseException:
            self.close()
            raise
        self._open = True

    def close(self, drain_s: float = 0.0) -> None:
        """Takes nothing new, lets running requests finish for at most ``drain_s``, then stops all threads and decoders.

        Uploads that are not yet processed resume at the next start.
        """
        with self._lock:
            self._open = False
        if self._thread.is_alive():
            self._inbox.put(self._end_waiting)
            self._idle.wait(drain_s)
        self.library.close()
        if self._thread.is_alive():
            self._inbox.put(partial(setattr, self, "_stopped", True))
            self._thread.join()
        self._reads.close()
        self._writers.shutdown()

    def submit(self, request: Request, on_delta: Callable[[Delta], None]) -> None:
        """Takes a request. ``on_delta`` is called from the engine thread and must not block; its last call gets a final
        Delta, and there is one whatever happens.

        Raises QueueFull, ContextLengthExceeded, FileNotFound, VideoFailed, SelectionError (the latter two as far as
        they can be known now), StoreError and ShuttingDown; then ``on_delta`` is never called.
        """
        options = self._options
        question = Question(request, on_delta, self._model, options)
        if request.file_id is not None:
            question.video = self.library.video(request.file_id, request.tenant)
        video = self._find_video(question)
        manifest = None if video is None else video.manifest
        if manifest is not None:
            question.check(manifest)
        with self._lock:
            if not self.ready:
                raise ShuttingDown("the server is shutting down")
            if len(self._in_flight) >= options.max_batch + options.max_queue:
                raise QueueFull(f"{len(self._in_flight)} requests are being served or waiting: try again later")
            if request.id in self._in_flight:
                raise ValueError(f"a request {request.id} is in flight")
            self._in_flight[request.id] = question
            self._idle.clear()
        self._inbox.put(partial(self._enter, question))

    def cancel(self, request_id: str) -> None:
        """Ends a request with Cancelled and frees its slot before the next step; nothing happens if it has ended."""
        with self._lock:
            question = self._in_flight.get(request_id)
        if question is not None:
            self._inbox.put(partial(self._fail, question, Cancelled("the request was cancelled")))

    def step(self) -> bool:
        """One round: questions, all in one forward pass, and a chunk of an upload; whether there was anything to do."""
        self._fill_slots()
        plan = self._scheduler.plan()
        begin_s = time.perf_counter()
        if plan.score:
            self._attempt(plan.score, self._score)
        if plan.rows:
            self._forward(plan.rows)
        self._scheduler.account_questions(time.perf_counter() - begin_s)
        if plan.ingest:
            self._prefill(plan.ingest)
        return bool(plan)

    # On the engine thread from here on, unless said otherwise.

    def _run(self) -> None:
        error: Exception = ShuttingDown("the server is shutting down")
        try:
            with torch.inference_mode():
                while not self._stopped:
                    busy = self.step()
                    if not busy:
                        self._check_pool()
                    with suppress(queue.Empty):
                        self._inbox.get(block=not busy, timeout=self._reads.time_left_s())()
                        while not self._stopped:
                            self._inbox.get_nowait()()
                    self._reads.expire()
        except Exception:
            _log.exception("the engine has failed")
            error = ShuttingDown("the engine has failed")
        with self._lock:
            self._open = False
            left = list(self._in_flight.values())
        for question in left:
            self._fail(question, error)
        self.library.close()  # if not closed before: other replicas may go on with its prefills

    def _check_pool(self) -> None:
        """Whether the books balance, in an idle moment."""
        try:
            self._pool.check_integrity()
        except PoolError as error:
            _log.error("the device pool: %s", error)

    def _find_video(self, question: Question) -> Video | None:
        """From any thread: the video that is asked about, if any, as far as is known without asking the store.

        Raises FileNotFound, VideoFailed.
        """
        file_id, video = question.request.file_id, question.video
        if file_id is None:
            return None
        if video is None or not self.library.seen(file_id):
            raise FileNotFound(file_id)
        if video.error is not None and video.manifest is None:
            raise VideoFailed(file_id, video.error)
        return video

    def _enter(self, question: Question) -> None:
        if question.phase is not Phase.ENDED:  # cancelled before it came in
            self._scheduler.add(question)

    def _fill_slots(self) -> None:
        while question := self._scheduler.next_for_slot():
            self._attempt(question, self._begin)

    def _begin(self, question: Question) -> None:
        """Gives a question a slot, or lets it wait for its video without one."""
        video = self._find_video(question)
        if video is None:
            question.read_text_only(self._model.prefix())
            question.phase = Phase.PREFILL
            return
        job, manifest = video.job, video.manifest  # in this order: a manifest is set before its job goes
        if manifest is not None:
            question.check(manifest)
            self._lease(question, video, manifest)
        elif not self._open:
            raise ShuttingDown("the server is shutting down")
        elif job is not None:
            if job.failing_s > self._options.load_timeout_s:
                raise StoreUnavailable("the prefill that was asked about waits for the store")
            question.phase = Phase.WAITING
        else:
            self._heal(question, video, manifest)

    def _lease(self, question: Question, video: Video, manifest: Manifest) -> None:
        question.lease = self._pool.lease(video.key)
        if question.lease is not None:
            question.phase = Phase.SCORE
        else:
            question.phase = Phase.LOADING
            work = partial(self._videos.read_high, video.key)
            self._read(question, work, partial(self._loaded, video, manifest), self._options.load_timeout_s)
        self.library.note_use(str(question.request.file_id))

    def _read(
        self,
        question: Question,
        work: Callable[[], Result],
        then: Callable[[Question, Future[Result]], None],
        timeout_s: float,
    ) -> None:
        """Has ``work`` done on another thread, then ``then`` on this one unless the question has ended."""

        def done(future: Future[Result]) -> None:
            self._attempt(question, lambda question: then(question, future))

        self._reads.submit(work, done, timeout_s)

    def _loaded(self, video: Video, manifest: Manifest, question: Question, future: Future[HighKV | None]) -> None:
        try:
            high = future.result()
        except DamagedVideo as error:
            _log.warning("a video is damaged: %s", error)
            high = None
        if high is None:
            self._heal(question, video, manifest)
        else:
            self._reside(video.key, high, question)

    def _reside(self, key: KVKey, high: HighKV, question: Question) -> None:
        """Puts H-KVs read from the store into the pool, now or when there is room."""
        self._find_video(question)  # it may have been deleted while it was read
        try:
            question.lease = self._pool.put(key, high.to(self._model.device))
        except PoolFull:
            self._pool_queue.append((question, partial(self._reside, key, high)))
        else:
            question.phase = Phase.SCORE

    def _heal(self, question: Question, video: Video, manifest: Manifest | None) -> None:
        """What ``manifest`` promises is gone or damaged: has the video prefilled again, if that is possible."""
        if question.healed:
            raise VideoFailed(str(question.request.file_id), "its KVs cannot be read from the store")
        question.healed = True
        self.library.heal(video, manifest)
        question.phase = Phase.QUEUED  # to look again

    def _video_changed(self, key: KVKey) -> None:
        for question in self._scheduler:
            if question.phase is Phase.WAITING and question.video is not None and question.video.key == key:
                question.phase = Phase.QUEUED
        self._retry_pool()  # the prefill has let go of its own lease

    def _file_deleted(self, file_id: str) -> None:
        for question in self._scheduler:
            if question.request.file_id == file_id:
                self._fail(question, FileNotFound(file_id))

    def _end_waiting(self) -> None:
        for question in self._scheduler:
            if question.phase is Phase.WAITING:
                self._fail(question, ShuttingDown("the server is shutting down"))

    def _score(self, question: Question) -> None:
        assert question.lease is not None and question.video is not None
        if not question.score(question.lease.kv):
            self._scheduler.postpone(question)
        elif not question.request.generate:
            self._emit(question, question.finish("stop"))
        elif question.cache is not None:
            question.phase = Phase.PREFILL
        else:
            question.phase = Phase.RELOADING
            indices = sorted(question.selection.chunks)
            work = partial(self._videos.read_low, question.video.key, indices)
            self._read(question, work, partial(self._reloaded, indices), self._options.reload_timeout_s)

    def _reloaded(
        self, indices: list[int], question: Question, future: Future[list[ChunkKV | MissingBlob | CorruptBlob]]
    ) -> None:
        """An L-KV that cannot be read is no reason to fail: the H-KV is there."""
        assert question.lease is not None and question.video is not None
        low: dict[int, ChunkKV] = {}
        try:
            for index, kv in zip(indices, future.result(), strict=True):
                if isinstance(kv, ChunkKV):
                    low[index] = kv
                else:
                    _log.warning("an H-KV stands in: %s", kv)
                    self.library.repair(question.video)
        except StoreError as error:
            _log.warning("H-KVs stand in: %s", error)
        question.reload(question.lease.kv, low)
        question.phase = Phase.PREFILL

    def _prefill(self, ingest: Ingest) -> None:
        begin_s = time.perf_counter()
        computed = ingest.step()
        took_s = time.perf_counter() - begin_s
        self._scheduler.account_prefill(took_s)
        if computed:
            self.metrics.chunks.inc()
            self.metrics.chunk_seconds.observe(took_s)

    def _forward(self, questions: list[Question]) -> None:
        self.metrics.batch.observe(len(questions))
        for question, outcome in zip(questions, draw(self._model, questions), strict=True):
            if isinstance(outcome, Exception):
                self._fail(question, reply_to(outcome))
            else:
                self._attempt(question, partial(self._accept, outcome))

    def _accept(self, token: int, question: Question) -> None:
        self._emit(question, question.accept(token))

    def _attempt(self, question: Question, work: Callable[[Question], None]) -> None:
        """Does one question's work, and lets its errors end that question alone."""
        if question.phase is Phase.ENDED:
            return
        try:
            work(question)
        except Exception as error:
            self._fail(question, reply_to(error))

    def _emit(self, question: Question, delta: Delta) -> None:
        if delta.outcome is not None:
            self.metrics.answered(delta.outcome)
            self._end(question)
        if delta.text or delta.final:
            question.on_delta(delta)

    def _fail(self, question: Question, error: Exception) -> None:
        if question.phase is Phase.ENDED:
            return
        self.metrics.failed(error)
        self._end(question)
        try:
            question.on_delta(Delta(error=error))
        except Exception:
            _log.exception("a client's callback has failed")

    def _end(self, question: Question) -> None:
        """Frees the question's slot and memory, and lets those in that waited for them."""
        question.release()
        self._scheduler.remove(question)
        with self._lock:
            self._in_flight.pop(question.id, None)
            if not self._in_flight:
                self._idle.set()
        self._retry_pool()

    def _retry_pool(self) -> None:
        waiting, self._pool_queue = self._pool_queue, []
        for other, retry in waiting:
            self._attempt(other, retry)
