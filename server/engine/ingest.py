"""One upload's way from a file to KVs in the store."""

from __future__ import annotations

import io
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from compression.chunk import Chunk
from compression.kv import ChunkKV
from kvstore.errors import StoreError
from kvstore.key import Fingerprint, KVKey
from kvstore.manifest import ChunkRecord, Manifest
from kvstore.resident import HighKV
from kvstore.video import VideoStore
from server.models.base import Prefill, VideoModel
from server.video.errors import VideoCancelled
from server.video.frames import Frames
from server.video.reader import Sampling, VideoInfo, VideoLimits, VideoReader

THUMBNAIL_WIDTH = 320
_CHUNKS_AHEAD = 2
_WRITES_AHEAD = 4


@dataclass(frozen=True, slots=True)
class _Decoded:
    """One chunk on its way to the model; ``pixels`` as :meth:`VideoModel.preprocess` makes them."""

    chunk: Chunk
    pixels: Tensor
    times_s: NDArray[np.float64]
    thumbnail: bytes
    last: bool


class Ingest:
    """The prefill of one video: :meth:`run` on a thread of its own decodes, waits and commits, :meth:`step` on the
    engine thread encodes and prefills one chunk, and ``writers`` put what that makes into the store.

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
    ) -> None:
        self.key = key
        self.info: VideoInfo | None = None
        """Known once the file is opened."""
        self.records: list[ChunkRecord] = []
        """The chunks prefilled so far."""
        self._fingerprint = fingerprint
        self._model = model
        self._videos = videos
        self._writers = writers
        self._wake = wake
        self._decoded: queue.Queue[_Decoded] = queue.Queue(_CHUNKS_AHEAD)
        self._prefix: ChunkKV | None = None
        self._prefill: Prefill | None = None
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
    def has_chunk(self) -> bool:
        """Whether :meth:`step` has something to do."""
        return not self._decoded.empty() and self._num_pending_writes < _WRITES_AHEAD

    def run(self, path: Path, sampling: Sampling, limits: VideoLimits) -> tuple[Manifest, HighKV]:
        """Prefills and commits the video in the file ``path``; its table of contents and what stays on the device.

        Raises VideoError (VideoCancelled after :meth:`cancel`), PositionLimitError, StoreError and what else goes
        wrong. Then nothing of the video is left in the store.
        """
        begin_s = time.monotonic()
        try:
            info = self._decode(path, sampling, limits)
            self._prefilled.wait()
            self._check()
            for write in self._writes:
                write.result()
            prefix = self._prefix
            assert prefix is not None  # made by the first step
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
                prefill_s=time.monotonic() - begin_s,
                prefill_mode=self._model.prefill_mode,
            )
            self._videos.commit(self.key, manifest)
            self._check()
            return manifest, HighKV(prefix, tuple(self._high))
        except BaseException as error:
            cause = self._abort(error)
            wait(self._writes)
            with suppress(StoreError):  # a store that fails now may be why we are here
                self._videos.delete(self.key)
            if cause is error:
                raise
            raise cause from error
        finally:
            self._ended.set()

    def step(self) -> None:
        """Encodes and prefills the next chunk. A failure ends this ingest, and is raised by :meth:`run`."""
        decoded = self._decoded.get_nowait()
        try:
            if self._prefill is None:
                self._prefix, self._prefill = self._model.prefix(), self._model.prefill()
            features = self._model.encode(decoded.pixels.to(self._model.device), decoded.times_s)
            low, high = self._prefill.append(features, last=decoded.last)
            self._keep(decoded, len(features), low, high)
        except Exception as error:
            self._abort(error)
        if decoded.last:
            self._prefilled.set()

    def cancel(self) -> None:
        """Stops decoding and prefilling at once. From any thread; what was written goes when :meth:`run` ends."""
        self._abort(VideoCancelled("The upload was cancelled."))

    def abandon(self) -> None:
        """Tells that :meth:`run` will never be called."""
        self._ended.set()

    def wait_ended(self, timeout_s: float) -> bool:
        """Waits for :meth:`run` to end; whether it did in time."""
        return self._ended.wait(timeout_s)

    def _decode(self, path: Path, sampling: Sampling, limits: VideoLimits) -> VideoInfo:
        self._check()
        with VideoReader(path, sampling, limits) as reader:
            with self._lock:
                self._reader = reader
            self.info = reader.info
            self._check()
            for decoded in _collect(reader, plan_chunks(reader.info, self._model.spec.frames_per_chunk), self._model):
                self._decoded.put(decoded)
                self._wake()
                self._check()
            return reader.info

    def _keep(self, decoded: _Decoded, num_visual_tokens: int, low: ChunkKV, high: ChunkKV) -> None:
        """Starts writing a chunk, unless the ingest was stopped meanwhile."""
        self._high.append(high)
        record = ChunkRecord(decoded.chunk, num_visual_tokens, low.num_tokens, high.num_tokens, low.nbytes, high.nbytes)
        with self._lock:
            if self._failure is not None:
                return
            self.records.append(record)
            self._num_pending_writes += 1
            write = self._writers.submit(
                self._videos.write_chunk, self.key, decoded.chunk.index, low, high, decoded.thumbnail
            )
            self._writes.append(write)
        write.add_done_callback(self._written)

    def _written(self, write: Future[None]) -> None:
        with self._lock:
            self._num_pending_writes -= 1
        error = write.exception()
        if error is not None:
            self._abort(error)
        self._wake()

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
        while not self._decoded.empty():  # a put that waits for room goes on, and finds the failure
            try:
                self._decoded.get_nowait()
            except queue.Empty:
                break
        self._prefilled.set()
        return cause


def plan_chunks(info: VideoInfo, frames_per_chunk: int) -> tuple[Chunk, ...]:
    """The chunks of a video: ``frames_per_chunk`` frames each, the last what remains; they cover it without a gap."""
    count = math.ceil(info.num_frames / frames_per_chunk)
    chunks = []
    for index in range(count):
        first = index * frames_per_chunk
        stop = min(first + frames_per_chunk, info.num_frames)
        end_s = info.duration_s if index == count - 1 else stop * info.interval_s
        chunks.append(Chunk(index, first * info.interval_s, end_s, stop - first))
    return tuple(chunks)


def _collect(batches: Iterable[Frames], plan: Sequence[Chunk], model: VideoModel) -> Iterator[_Decoded]:
    """Cuts the reader's batches into chunks, holding no more of the frames at full size than one batch."""
    waiting = iter(plan)
    chunk = next(waiting)
    parts: list[tuple[Tensor, NDArray[np.float64]]] = []
    num_frames = 0
    thumbnail = b""
    for batch in batches:
        start = 0
        while start < len(batch):
            stop = min(len(batch), start + chunk.num_frames - num_frames)
            part = Frames(batch.pixels[start:stop], batch.times_s[start:stop])
            middle = chunk.num_frames // 2 - num_frames
            if 0 <= middle < len(part):
                thumbnail = draw_thumbnail(part.pixels[middle])
            parts.append((model.preprocess(part), part.times_s))
            num_frames += len(part)
            start = stop
            if num_frames == chunk.num_frames:
                pixels, times_s = zip(*parts, strict=True)
                yield _Decoded(chunk, torch.cat(pixels), np.concatenate(times_s), thumbnail, chunk is plan[-1])
                parts, num_frames = [], 0
                chunk = next(waiting, chunk)


def draw_thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """A JPEG of one frame [H, W, 3], at most THUMBNAIL_WIDTH wide."""
    image = Image.fromarray(pixels)
    if image.width > THUMBNAIL_WIDTH:
        height = max(1, round(image.height * THUMBNAIL_WIDTH / image.width))
        image = image.resize((THUMBNAIL_WIDTH, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
