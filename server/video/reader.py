"""Reads a video as sampled frames, decoded in processes of their own that can be killed."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from server.video.errors import VideoCancelled, VideoTooLarge
from server.video.frames import Frames
from server.video.process import DECODER_COMMAND, DecoderProcess, Patience, number
from server.video.shares import Split
from server.video.sniff import SNIFF_NBYTES, check_container


@dataclass(frozen=True, slots=True)
class Sampling:
    """The instants at which a video is looked at: ``n / fps`` for n = 0, 1, ... while the video lasts.

    Where these are more than ``max_frames``, that many instants spread evenly over the duration instead.
    """

    fps: float = 1.0
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be a positive number, not {self.fps}")
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"max_frames must be at least 1, not {self.max_frames}")

    def grid(self, duration_s: float) -> tuple[int, float]:
        """``(num_frames, interval_s)`` for a video of ``duration_s``; at least one frame."""
        # An instant that float rounding puts a hair before the end is no instant of its own.
        num_frames = max(1, math.ceil(duration_s * self.fps - 1e-6))
        if self.max_frames is not None and num_frames > self.max_frames:
            return self.max_frames, duration_s / self.max_frames
        return num_frames, 1 / self.fps


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """What a video may be and what decoding it may take. ``max_duration_of`` tells senders whose limit that is.

    ``max_pixels`` is width times height, ``max_frames`` counts sampled frames. ``wall_clock_s`` bounds the time spent
    waiting for the decoder (None: a minute and twice the duration); ``stall_s`` the time without a sign of life from
    it; ``memory_nbytes`` the decoder's writable memory, which is shared by ``max_processes`` at most (None: one a core,
    where there is enough to decode).
    """

    max_nbytes: int = 8 << 30
    max_duration_s: float = 4 * 3600.0
    max_duration_of: str = "the server's --max-duration-s"
    max_pixels: int = 4096 * 2304
    max_frames: int = 20_000
    wall_clock_s: float | None = None
    stall_s: float = 60.0
    memory_nbytes: int = 3 << 30
    max_processes: int | None = None

    def wall_clock_for(self, duration_s: float) -> float:
        """The wall-clock limit [s] for a video of ``duration_s``."""
        return self.wall_clock_s if self.wall_clock_s is not None else 60.0 + 2.0 * duration_s


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """A video as its container describes it and as it will be sampled.

    ``duration_s`` runs from the first presented frame to the end of the last; ``width`` and ``height`` are upright;
    ``num_frames`` frames will come, ``interval_s`` apart from 0 on.
    """

    duration_s: float
    width: int
    height: int
    num_frames: int
    interval_s: float


class VideoReader:
    """Iterates over the sampled frames of a video from number ``first_frame`` on, once, in batches in time order.

    A frame is the one on screen at its instant: the last whose presentation time is not later. Opening waits until the
    first frame is decoded. A batch holds at most ``batch_nbytes`` of pixels (or one frame), the decoder processes a few
    frames more, so memory does not grow with the duration.

    Several processes decode a video at once, each from other keyframes on, where :class:`~server.video.shares.Split`
    says so; the frames are the same. One alone uses ``num_threads``.

    Use it as a context manager. :meth:`close` may be called from another thread and makes a waiting reader raise
    VideoCancelled. However reading ends, the decoder processes are gone afterwards.

    ``command`` is a decoder process's argv, to which a job (JSON) is appended; its protocol is described in
    :mod:`server.video.worker`.

    Raises any VideoError of :mod:`server.video.errors`, on opening or while iterating.
    """

    info: VideoInfo

    def __init__(
        self,
        path: str | os.PathLike[str],
        sampling: Sampling,
        limits: VideoLimits,
        *,
        first_frame: int = 0,
        num_threads: int = 2,
        batch_nbytes: int = 16 << 20,
        command: Sequence[str] = DECODER_COMMAND,
    ) -> None:
        file = Path(path).resolve()
        nbytes = file.stat().st_size
        if nbytes > limits.max_nbytes:
            raise VideoTooLarge(
                f"The file has {nbytes} bytes; at most {limits.max_nbytes} are allowed.", code="video_too_many_bytes"
            )
        with file.open("rb") as head:
            check_container(head.read(SNIFF_NBYTES))
        self._file = file
        self._sampling = sampling
        self._limits = limits
        self._first_frame = first_frame
        self._num_threads = num_threads
        self._batch_nbytes = batch_nbytes
        self._command = command
        self._patience = Patience(limits.stall_s, limits.wall_clock_for(limits.max_duration_s))
        self._closed = False
        self._lock = threading.Lock()  # no process may be started while all are ended
        self._processes: list[DecoderProcess] = []
        try:
            self._open(limits.max_processes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frames]:
        try:
            yield from self._batches()
        finally:
            self.close()

    def close(self) -> None:
        """Kill the decoders at once and free everything. Safe from any thread, and more than once."""
        self._closed = True
        self._end_processes()

    def _end_processes(self) -> None:
        with self._lock:
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.close()

    def _start(self, *, is_first: bool) -> DecoderProcess:
        job = {
            "path": str(self._file),
            "is_first": is_first,
            "memory_nbytes": self._limits.memory_nbytes,
            "cpu_s": math.ceil(self._patience.wall_clock_s * (self._num_threads + 1)),
            "stall_s": self._limits.stall_s,
        }
        with self._lock:
            if self._closed:
                raise VideoCancelled("Reading the video was cancelled.")
            process = DecoderProcess(self._command, job, self._patience)
            self._processes.append(process)
        return process

    def _open(self, max_processes: int | None) -> None:
        """Start the first process, learn from it what the video is, share the frames out and wait for the first."""
        first = self._start(is_first=True)
        found = first.receive_json(b"I")
        duration_s = number(found, "duration_s")
        self._patience.wall_clock_s = self._limits.wall_clock_for(duration_s)
        width, height = number(found, "width"), number(found, "height")
        self._check_size(duration_s, width, height)
        num_frames, interval_s = self._sampling.grid(duration_s)
        if num_frames > self._limits.max_frames:
            raise VideoTooLarge(
                f"Sampling this video gives {num_frames} frames; at most {self._limits.max_frames} are allowed. "
                "Lower fps or set max_frames.",
                code="video_too_many_frames",
            )
        first.send({"interval_s": interval_s, "first_frame": self._first_frame, "num_frames": num_frames})
        places = np.empty((3, num_frames - self._first_frame), np.int64)
        first.receive_bytes(b"P", places.data.cast("B"))
        self._split = Split(places, int(width * height) * 3, self._limits.memory_nbytes, max_processes)
        self._shares = self._share_out(places, interval_s, found)
        first.send(self._shares[0])
        try:
            opened = first.receive_json(b"O")
        except VideoTooLarge as error:
            self._start_over(self._first_frame, error)
        else:
            width, height = number(opened, "width"), number(opened, "height")
            self._check_size(duration_s, width, height)
            self.info = VideoInfo(duration_s, int(width), int(height), num_frames, interval_s)

    def _share_out(
        self, places: NDArray[np.int64], interval_s: float, found: dict[str, object]
    ) -> list[dict[str, object]]:
        """What each process is told, as :class:`server.video.worker.Share` takes it."""
        split, shares = self._split, []
        for turn in range(split.num_processes):
            (mine,) = np.nonzero(split.turns == turn)
            pts, key_pts, _ = places[:, mine].tolist()
            shares.append(
                {
                    "times_s": ((mine + self._first_frame) * interval_s).tolist(),
                    "pts": pts,
                    "key_pts": key_pts,
                    "tick_s": number(found, "tick_s"),
                    "width": int(number(found, "width")),
                    "height": int(number(found, "height")),
                    "num_threads": self._num_threads if split.num_processes == 1 else 1,
                    "memory_nbytes": split.memory_nbytes,
                    "ahead_nbytes": split.ahead_nbytes,
                }
            )
        return shares

    def _check_size(self, duration_s: float, width: float, height: float) -> None:
        if duration_s > self._limits.max_duration_s:
            raise VideoTooLarge(
                f"The video lasts {_in_words(duration_s)}; at most {_in_words(self._limits.max_duration_s)} are "
                f"allowed ({self._limits.max_duration_of}).",
                code="video_too_long",
            )
        if width * height > self._limits.max_pixels:
            raise VideoTooLarge(
                f"The video has {width:.0f} x {height:.0f} pixels; at most {self._limits.max_pixels} are allowed.",
                code="video_too_many_pixels",
            )

    def _batches(self) -> Iterator[Frames]:
        for share in self._shares[1:]:
            self._start(is_first=False).send(share)
        info = self.info
        shape = (info.height, info.width, 3)
        max_batch = max(1, self._batch_nbytes // math.prod(shape))
        for first in range(self._first_frame, info.num_frames, max_batch):
            pixels = np.empty((min(max_batch, info.num_frames - first), *shape), np.uint8)
            for index, frame in enumerate(pixels, first):
                self._receive_frame(index, frame.data.cast("B"))
            yield Frames(pixels, np.arange(first, first + len(pixels), dtype=np.float64) * info.interval_s)
        for process in self._processes:
            process.receive(b"E")

    def _receive_frame(self, index: int, frame: memoryview) -> None:
        turn = self._split.turns[index - self._first_frame]
        try:
            self._processes[turn].receive_bytes(b"F", frame)
        except VideoTooLarge as error:
            self._start_over(index, error)
            self._processes[0].receive_bytes(b"F", frame)

    def _start_over(self, first_frame: int, error: VideoTooLarge) -> None:
        """Where a process's part of the memory does not suffice, one gets all of it; raises ``error`` if one had."""
        if self._split.num_processes == 1:
            raise error
        self._end_processes()
        self._processes = []
        self._first_frame = first_frame
        self._open(max_processes=1)


def _in_words(duration_s: float) -> str:
    return f"{duration_s:.1f} s" if duration_s < 60 else f"{duration_s:.1f} s ({timedelta(seconds=int(duration_s))})"
