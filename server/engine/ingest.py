"""One upload's way from a file to KVs in the store."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from compression.chunk import Chunk
from compression.kv import ChunkKV
from kvstore.key import Fingerprint, KVKey
from kvstore.manifest import ChunkRecord, Manifest
from kvstore.resident import HighKV
from kvstore.video import VideoStore
from server.engine.decoded import Decoded, collect
from server.engine.fit import check_resident, choose_mode, least_resident_nbytes, plan_chunks
from server.models.base import Prefill, VideoModel
from server.models.device import asked_so_far, pinned, to_device, to_host
from server.models.slices import Slices
from server.video.errors import VideoCancelled
from server.video.reader import Sampling, VideoInfo, VideoLimits, VideoReader

_CHUNKS_AHEAD = 2
_WRITES_AHEAD = 4


@dataclass(frozen=True, slots=True)
class _Stored:
    """One chunk that an earlier prefill has left in the store, whole."""

    chunk: Chunk
    low: ChunkKV
    high: ChunkKV


class Ingest:
    """The prefill of one video: :meth:`run` on a thread of its own decodes, waits and commits, :meth:`step` on the
    engine thread encodes and prefills the chunks slice by slice, and ``writers`` put what that makes into the store.

    What lies in the store already is not computed again. A prefill that was cut off goes on at the first chunk that is
    missing; one that is to ``verify`` reads every chunk, and computes those that are damaged or gone.

    Frames run at most a few chunks ahead of the model, and KVs a few ahead of the store. ``wake`` is called whenever
    the engine thread may have something to do.
    """

    def __init__(
        self,
        key: KVKey,
        fingerprint: Fingerprint,
        model: VideoModel,
        videos: VideoStore,
        writers: Executor,
        wake: Callable[[], None],
        *,
        verify: bool = False,
        resident_nbytes: int | None = None,
        prefill_nbytes: int | None = None,
    ) -> None:
        """``resident_nbytes`` bound the prefix and the H-KVs of a video that is to stay on the device,
        ``prefill_nbytes`` what its prefill remembers there."""
        self.key = key
        self.info: VideoInfo | None = None
        """Known once the file was opened, here or before."""
        self.records: list[ChunkRecord] = []
        """The chunks that are done."""
        self.num_written = 0
        """Those of them that were computed and have come into the store."""
        self._fingerprint = fingerprint
        self._model = model
        self._videos = videos
        self._writers = writers
        self._wake = wake
        self._verify = verify
        self._resident_nbytes = resident_nbytes
        self._prefill_nbytes = prefill_nbytes
        self._queue: queue.Queue[Decoded | _Stored] = queue.Queue(_CHUNKS_AHEAD)
        self._num_chunks = 0
        self._mode = model.prefill_mode
        self._prefix: ChunkKV | None = None
        self._prefill: Prefill | None = None
        self._slices: Slices[bool] | None = None
        self._high: list[ChunkKV] = []
        self._prefilled = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.Lock()  # guards what an abort must see whole: the four below
        self._failure: BaseException | None = None
        self._reader: VideoReader | None = None
        self._writes: list[Future[None]] = []
        self._num_pending_writes = 0

    @property
    def ended(self) -> bool:
        """No step may follow, and nothing more will be written."""
        return self._ended.is_set()

    @property
    def within_chunk(self) -> bool:
        """Whether a chunk is begun and not ended. On the engine thread."""
        return self._slices is not None

    @property
    def has_slice(self) -> bool:
        """Whether :meth:`step` has something to do, if only to let go of what it holds. On the engine thread."""
        if self._failure is not None:
            return self._prefill is not None
        return self.within_chunk or (not self._queue.empty() and self._num_pending_writes < _WRITES_AHEAD)

    def run(self, path: Path, sampling: Sampling, limits: VideoLimits) -> tuple[Manifest, HighKV]:
        """Prefills and commits the video in the file ``path``; its table of contents and what stays on the device.

        Raises VideoError (VideoCancelled after :meth:`cancel`), PositionLimitError, StoreError and what else goes
        wrong. Then the chunks that were done stay in the store for another try.
        """
        begin_s = time.monotonic()
        try:
            self._feed(path, sampling, limits)
            self._prefilled.wait()
            self._check()
            for write in self._writes:
                write.result()
            manifest = self._commit(time.monotonic() - begin_s)
            assert self._prefix is not None
            return manifest, HighKV(self._prefix, tuple(self._high))
        except BaseException as error:
            cause = self._abort(error)
            wait(self._writes)
            if cause is error:
                raise
            raise cause from error
        finally:
            self._ended.set()

    def step(self) -> bool:
        """Runs the next slice; whether that ended a chunk that had to be computed.

        A failure ends this ingest, and is raised by :meth:`run`. Once it was stopped, here or elsewhere, a step lets go
        of what it holds on the device.
        """
        if self._slices is None:
            with suppress(queue.Empty):  # stopped this very moment
                self._slices = self._append(self._queue.get_nowait())
        if self._failure is not None or self._slices is None:
            self._let_go()
            return False
        try:
            next(self._slices)
        except StopIteration as end:
            self._slices = None
            return bool(end.value)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # which hold what the slice has made
            self._abort(error)
            self._let_go()
        return False

    def cancel(self) -> None:
        """Stops decoding and prefilling at once. From any thread."""
        self._abort(VideoCancelled("The upload was cancelled."))

    def abandon(self) -> None:
        """Tells that :meth:`run` will never be called."""
        self._ended.set()

    def wait_ended(self, timeout_s: float) -> bool:
        """Waits for :meth:`run` to end; whether it did in time."""
        return self._ended.wait(timeout_s)

    def _feed(self, path: Path, sampling: Sampling, limits: VideoLimits) -> None:
        """Queues every chunk in order, from the store or from the file."""
        if self.info is None:
            with self._open(path, sampling, limits) as reader:
                self.info = reader.info
        self._mode = choose_mode(self._model, self.info, sampling, self._prefill_nbytes)
        check_resident(least_resident_nbytes(self._model, self.info), self._resident_nbytes)
        plan = plan_chunks(self.info, self._model.spec.frames_per_chunk)
        self._num_chunks = len(plan)
        index, stored = 0, self._find(plan, 0)
        while index < len(plan):
            if stored is not None:
                self._put(stored)
                index += 1
                stored = self._find(plan, index)
                continue
            first_frame = sum(chunk.num_frames for chunk in plan[:index])
            with self._open(path, sampling, limits, first_frame) as reader:
                for decoded in collect(reader, plan[index:], self._model):
                    self._put(decoded)
                    index += 1
                    stored = self._find(plan, index) if self._verify else None
                    if stored is not None:
                        break

    def _open(self, path: Path, sampling: Sampling, limits: VideoLimits, first_frame: int = 0) -> VideoReader:
        self._check()
        reader = VideoReader(path, sampling, limits, first_frame=first_frame)
        with self._lock:
            self._reader = reader
            cancelled = self._failure is not None
        if cancelled:
            reader.close()
        return reader

    def _find(self, plan: Sequence[Chunk], index: int) -> _Stored | None:
        pair = self._videos.read_chunk(self.key, index) if index < len(plan) else None
        pin = partial(pinned, device=self._model.device)
        return None if pair is None else _Stored(plan[index], *(kv.brought(pin) for kv in pair))

    def _put(self, item: Decoded | _Stored) -> None:
        self._queue.put(item)
        self._wake()
        self._check()

    def _append(self, item: Decoded | _Stored) -> Slices[bool]:
        """Prefills the next chunk, or takes it as it was stored; whether it had to be computed."""
        if self._prefill is None:
            self._prefix, self._prefill = self._model.prefix(), self._model.prefill(self._mode, self._num_chunks)
        last = item.chunk.index == self._num_chunks - 1
        if isinstance(item, _Stored):
            self._restore(item, self._prefill)
        else:
            features = yield from self._model.encoding(item.pixels.take(), item.times_s)
            yield
            low, high = yield from self._prefill.appending(features, last=last)
            self._write(item, low, high)
        assert self._prefix is not None
        check_resident(self._prefix.nbytes + sum(kv.nbytes for kv in self._high), self._resident_nbytes)
        if last:
            self._prefill = None  # what it remembers is not needed any more
            self._prefilled.set()
        return isinstance(item, Decoded)

    def _let_go(self) -> None:
        self._slices = self._prefill = None
        self._high.clear()

    def _restore(self, stored: _Stored, prefill: Prefill) -> None:
        bring = partial(to_device, device=self._model.device)
        low, high = stored.low.brought(bring), stored.high.brought(bring)
        num_visual_tokens = self._num_visual_tokens(stored.chunk)
        prefill.restore(num_visual_tokens, low, high)
        self._note(stored.chunk, num_visual_tokens, low, high)

    def _num_visual_tokens(self, chunk: Chunk) -> int:
        assert self.info is not None
        return self._model.num_visual_tokens(chunk.num_frames, self.info.width, self.info.height)

    def _note(self, chunk: Chunk, num_visual_tokens: int, low: ChunkKV, high: ChunkKV) -> None:
        self._high.append(high)
        self.records.append(
            ChunkRecord(
                chunk, num_visual_tokens, low.num_tokens, high.num_tokens, self._videos.low_nbytes(low), high.nbytes
            )
        )

    def _write(self, decoded: Decoded, low: ChunkKV, high: ChunkKV) -> None:
        """Starts writing a chunk, unless the ingest was stopped meanwhile."""
        chunk = decoded.chunk
        with self._lock:
            if self._failure is not None:
                return
            self._note(chunk, self._num_visual_tokens(chunk), low, high)
            self._num_pending_writes += 1
            made = asked_so_far(self._model.device)
            write = self._writers.submit(self._store, chunk.index, (low, high), made, decoded.thumbnail)
            self._writes.append(write)
        write.add_done_callback(self._written)

    def _store(
        self, index: int, levels: tuple[ChunkKV, ChunkKV], made: torch.cuda.Event | None, thumbnail: bytes
    ) -> None:
        """On a writer's thread, which may wait for what is to be written."""
        low, high = (kv.brought(partial(to_host, made=made)) for kv in levels)
        self._videos.write_chunk(self.key, index, low, high, thumbnail)

    def _written(self, write: Future[None]) -> None:
        error = write.exception()
        with self._lock:
            self._num_pending_writes -= 1
            self.num_written += error is None
        if error is not None:
            self._abort(error)
        self._wake()

    def _commit(self, prefill_s: float) -> Manifest:
        info, prefix = self.info, self._prefix
        assert info is not None and prefix is not None
        self._videos.write_prefix(self.key, prefix)
        manifest = Manifest(
            fingerprint=self._fingerprint,
            duration_s=info.duration_s,
            width=info.width,
            height=info.height,
            num_frames=info.num_frames,
            records=tuple(self.records),
            num_prefix_tokens=prefix.num_tokens,
            prefix_nbytes=prefix.nbytes,
            prefill_s=prefill_s,
            prefill_mode=self._mode,
            next_position=self._high[-1].next_position,
        )
        self._check()
        self._videos.commit(self.key, manifest)
        return manifest

    def _check(self) -> None:
        with self._lock:
            if self._failure is not None:
                raise self._failure

    def _abort(self, error: BaseException) -> BaseException:
        """Stops everything; the first error, which is the cause of those that follow from stopping."""
        with self._lock:
            cause = self._failure = self._failure or error
            reader = self._reader
        if reader is not None:
            reader.close()
        while not self._queue.empty():  # a put that waits for room goes on, and finds the failure
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._prefilled.set()
        self._wake()
        return cause
