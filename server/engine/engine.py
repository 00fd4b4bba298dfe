"""The engine: one thread that owns torch, and the answers that come out of it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from compression.score import QueryTrace
from kvstore.base import Store, Tier
from kvstore.errors import StoreError
from kvstore.key import KVKey
from kvstore.resident import ResidentPool
from kvstore.video import VideoStore
from server.engine.batch import draw, trace
from server.engine.caches import Caches, Copies, Shares
from server.engine.errors import Cancelled, FileNotFound, QueueFull, ShuttingDown, reply_to
from server.engine.fit import free_nbytes
from server.engine.lane import Lane
from server.engine.library import Library
from server.engine.metrics import EngineMetrics, PassKind
from server.engine.options import EngineOptions
from server.engine.question import Phase, Question
from server.engine.reads import Reads
from server.engine.reloads import Outcome, Reloads, Wanted
from server.engine.request import Delta, Request
from server.engine.residency import Residency
from server.engine.scheduler import Plan, Scheduler
from server.engine.steps import Steps
from server.engine.transfer import Arrival
from server.models.base import VideoModel
from server.video.frames import Frames

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
        share = model.device.type == "cuda" if options.share_kvs is None else options.share_kvs
        share = share and not model.scorer.reads_chunks  # which the shared ones are not
        self._caches: Caches = Shares(model, options.shared_low_nbytes) if share else Copies(model)
        decoder = model.step_decoder(options.max_batch)
        if options.prefill_nbytes is None:
            options = self._options = replace(options, prefill_nbytes=free_nbytes(model.device, options))
        self._pool = ResidentPool(options.resident_nbytes, self._caches.resident)
        self._writers = ThreadPoolExecutor(options.writer_threads, "x2l-write")
        self._scheduler = Scheduler(
            max_batch=options.max_batch,
            prefill_share=options.prefill_share,
            # Without, a pass over several prompts takes as long as one pass after the other.
            prompt_tokens=options.prompt_step if decoder is not None else 0,
        )
        self._lap_s = 0.0
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._reads = Reads(options.reader_threads, self._inbox.put)
        self._thread = threading.Thread(target=self._run, name="x2l-engine", daemon=True)
        self._lock = threading.Lock()  # guards the two below
        self._in_flight: dict[str, Question] = {}
        self._open = False
        self._idle = threading.Event()  # nothing in flight
        self._idle.set()
        self._stopped = False
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
        self._residency = Residency(
            self.library,
            self._videos,
            self._pool,
            self._reads,
            options,
            model.device,
            attempt=self._attempt,
            is_open=lambda: self._open,
        )
        self.metrics = EngineMetrics(
            in_flight=lambda: self.num_in_flight,
            running=lambda: self._scheduler.num_running,
            resident_nbytes=lambda: self._pool.nbytes,
            resident_videos=lambda: len(self._pool),
            shared_low_nbytes=lambda: self._caches.nbytes,
            prefetched_nbytes=lambda: self._reloads.nbytes,
            options=options,
            device=model.device,
        )
        self._reloads = Reloads(
            model,
            self._videos,
            self._caches,
            self._reads,
            options,
            self.metrics,
            prefetch_nbytes=options.prefetch_nbytes if share else 0,
            repair=self.library.repair,
        )
        self._lane = Lane(model.device, self.metrics.prefilled)
        self._steps = None if decoder is None else Steps(decoder, partial(self.metrics.passed, "decode"))

    @property
    def options(self) -> EngineOptions:
        """With what was left to the engine filled in."""
        return self._options

    @property
    def ready(self) -> bool:
        """Whether questions are taken."""
        return self._open and self._thread.is_alive()

    @property
    def num_in_flight(self) -> int:
        """Requests that are being answered or wait to be."""
        return len(self._in_flight)

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

    def preprocess_image(self, frame: Frames, *, alone: bool) -> Any:
        """An image, given as a single frame, as a Request takes it; ``alone`` tells that it has no other. From any
        thread."""
        return self._model.preprocess_image(frame, alone=alone)

    def submit(self, request: Request, on_delta: Callable[[Delta], None]) -> None:
        """Takes a request. ``on_delta`` is called from the engine thread and must not block; its last call gets a final
        Delta, and there is one whatever happens.

        Raises QueueFull, ContextLengthExceeded, FileNotFound, VideoFailed, SelectionError (the latter two as far as
        they can be known now), StoreError and ShuttingDown; then ``on_delta`` is never called.
        """
        options = self._options
        question = Question(request, on_delta, self._model, self._caches, options)
        for file_id in request.file_ids:
            video = self.library.video(file_id, request.tenant)
            if video is None:
                raise FileNotFound(file_id)
            question.videos[file_id] = video
        self._residency.find(question)
        manifests = [video.manifest for video in question.videos.values() if video.manifest is not None]
        if manifests and len(manifests) == len(question.videos):
            question.check(manifests)
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
        """One round: a token for whoever decodes, then scores and prompts, then slices of an upload's prefill; whether
        there was anything to do."""
        plan = self._plan()
        if self._steps is not None:
            for question, outcome in self._steps.turn(plan.decoding):
                self._drawn(question, outcome)
        if plan.scored:
            self._score(plan.scored)
        rows = plan.prompts if self._steps is not None else plan.prompts + plan.decoding
        if rows:
            self._forward(rows)
        self._account(plan)
        ingest, room = self._scheduler.prefill(plan)
        if ingest:
            self._lane.run(ingest, room)
        return bool(plan or ingest)

    # On the engine thread from here on, unless said otherwise.

    def _run(self) -> None:
        error: Exception = ShuttingDown("the server is shutting down")
        try:
            with torch.inference_mode():
                while not self._stopped:
                    busy = self.step()
                    if not busy:
                        self._residency.check_pool()
                    with suppress(queue.Empty):
                        self._inbox.get(block=not busy, timeout=self._reads.time_left_s())()
                        if not busy:
                            self._lap_s = time.perf_counter()
                        while not self._stopped:
                            self._inbox.get_nowait()()
                    self._reads.expire()
                    self._reloads.read_ahead()
        except Exception:
            _log.exception("the engine has failed")
            error = ShuttingDown("the engine has failed")
        with self._lock:
            self._open = False
            left = list(self._in_flight.values())
        for question in left:
            self._fail(question, error)
        self.library.close()  # if not closed before: other replicas may go on with its prefills

    def _enter(self, question: Question) -> None:
        if question.phase is not Phase.ENDED:  # cancelled before it came in
            self._scheduler.add(question)

    def _plan(self) -> Plan:
        while question := self._scheduler.next_for_slot():
            self._attempt(question, self._begin)
        return self._scheduler.plan()

    def _begin(self, question: Question) -> None:
        """Gives a question a slot, or lets it wait for its videos without one."""
        if question.videos:
            self._residency.begin(question)
            self._reloads.expect(question)
            self._reloads.read_ahead()  # while it is scored
        else:
            question.read_text_only(self._model.prefix())
            question.phase = Phase.PREFILL
        if question.phase.running and not question.had_slot:
            question.had_slot = True
            self.metrics.queue_seconds.observe(time.perf_counter() - question.submitted_s)

    def _video_changed(self, key: KVKey) -> None:
        self._residency.video_changed(key, self._scheduler)

    def _file_deleted(self, file_id: str) -> None:
        for question in self._scheduler:
            if file_id in question.videos:
                self._fail(question, FileNotFound(file_id))

    def _end_waiting(self) -> None:
        for question in self._scheduler:
            if question.phase is Phase.WAITING:
                self._fail(question, ShuttingDown("the server is shutting down"))

    def _score(self, questions: list[Question]) -> None:
        at_last: list[Question] = []
        for question in questions:
            self._attempt(question, partial(self._read_on, at_last))
        for question, outcome in zip(at_last, trace(self._model, at_last), strict=True):
            if isinstance(outcome, Exception):
                self._fail(question, reply_to(outcome))
            else:
                self._attempt(question, partial(self._scored, outcome))

    def _read_on(self, at_last: list[Question], question: Question) -> None:
        if question.read_on():
            at_last.append(question)
        else:
            self._scheduler.postpone(question)

    def _scored(self, traced: QueryTrace, question: Question) -> None:
        question.score(traced)
        if not question.request.generate:
            self._emit(question, question.finish("stop"))
        elif question.cache is not None:
            question.phase = Phase.PREFILL
        else:
            question.phase = Phase.RELOADING
            wanted = question.wanted()
            tiers = self._videos.low_tiers([(video.key, index) for _, video, index in wanted])
            self._reloads.expect(question)
            self._reloads.reload(
                wanted, lambda outcomes: self._attempt(question, partial(self._reloaded, wanted, tiers, outcomes))
            )

    def _reloaded(
        self, wanted: Sequence[Wanted], tiers: Sequence[Tier], outcomes: Sequence[Outcome], question: Question
    ) -> None:
        """An L-KV that cannot be read is no reason to fail: the H-KV is there."""
        low: dict[int, Arrival] = {}
        nbytes: Counter[Tier] = Counter({"device": question.held_nbytes})
        for (place, video, _), tier, outcome in zip(wanted, tiers, outcomes, strict=True):
            try:
                found = outcome.result()
            except StoreError as error:
                _log.warning("an H-KV stands in: %s", error)
                continue
            if isinstance(found, Arrival):
                low[place] = found
                nbytes[tier if found.nbytes else "device"] += found.nbytes or found.kv.nbytes
            else:
                _log.warning("an H-KV stands in: %s", found)
                self.library.repair(video)
        question.reload(low)
        question.phase = Phase.PREFILL
        self.metrics.reloaded(nbytes, question.reload_s)

    def _account(self, plan: Plan) -> None:
        """All the time since the last step's questions that no slice has taken is the questions'."""
        last_s, self._lap_s = self._lap_s, time.perf_counter()
        prefill_s = self._lane.collect()
        self._scheduler.account(plan, max(0.0, self._lap_s - last_s - prefill_s), prefill_s)

    def _forward(self, questions: list[Question]) -> None:
        kind: PassKind = "decode" if all(question.phase is Phase.DECODE for question in questions) else "prompt"
        begin_s = time.perf_counter()
        drawn = draw(self._model, questions)
        self.metrics.passed(kind, len(questions), time.perf_counter() - begin_s)
        for question, outcome in zip(questions, drawn, strict=True):
            self._drawn(question, outcome)

    def _drawn(self, question: Question, outcome: int | Exception) -> None:
        if isinstance(outcome, Exception):
            self._fail(question, reply_to(outcome))
        else:
            self._attempt(question, partial(self._accept, outcome))

    def _accept(self, token: int, question: Question) -> None:
        before = question.num_tokens
        delta = question.accept(token)
        if question.num_tokens > before == 0:
            self.metrics.first_token_seconds.observe(time.perf_counter() - question.submitted_s)
        self.metrics.tokens.inc(question.num_tokens - before)
        self._emit(question, delta)
        if question.phase is Phase.PREFILL:  # a piece of a long prompt
            self._scheduler.postpone(question)

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
        self._residency.retry()
