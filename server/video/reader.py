"""Reads a video as sampled frames, decoded in a process of its own that can be killed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from server.video import errors, worker
from server.video.errors import DecoderCrashed, VideoCancelled, VideoError, VideoTimeout, VideoTooLarge
from server.video.frames import Frames
from server.video.sniff import SNIFF_NBYTES, check_container

DECODER_COMMAND = (sys.executable, "-I", str(Path(worker.__file__).resolve()))
MAX_JSON_NBYTES = 4096
PIPE_NBYTES = 1 << 20


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
    """What a video may be and what decoding it may take.

    ``max_pixels`` is width times height, ``max_frames`` counts sampled frames. ``wall_clock_s`` bounds the time spent
    waiting for the decoder (None: a minute and twice the duration); ``stall_s`` the time without a sign of life from
    it; ``memory_nbytes`` the decoder's writable memory.
    """

    max_nbytes: int = 8 << 30
    max_duration_s: float = 4 * 3600.0
    max_pixels: int = 4096 * 2304
    max_frames: int = 20_000
    wall_clock_s: float | None = None
    stall_s: float = 60.0
    memory_nbytes: int = 3 << 30

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
    first frame is decoded. A batch holds at most ``batch_nbytes`` of pixels (or one frame), the decoder process one
    frame more, so memory does not grow with the duration.

    Use it as a context manager. :meth:`close` may be called from another thread and makes a waiting reader raise
    VideoCancelled. However reading ends, the decoder process is gone afterwards.

    ``command`` is the decoder process's argv, to which a job (JSON) is appended; its protocol is described in
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
        self._limits = limits
        self._first_frame = first_frame
        self._batch_nbytes = batch_nbytes
        self._waited_s = 0.0
        self._wall_clock_s = limits.wall_clock_for(limits.max_duration_s)
        self._closed = False
        self._kill_lock = threading.Lock()
        self._read_lock = threading.Lock()
        job = {
            "path": str(file),
            "num_threads": num_threads,
            "memory_nbytes": limits.memory_nbytes,
            "cpu_s": math.ceil(self._wall_clock_s * (num_threads + 1)),
            "stall_s": limits.stall_s,
        }
        self._process = _start([*command, json.dumps(job)])
        try:
            self.info = self._open(sampling)
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
        """Kill the decoder at once and free everything. Safe from any thread, and more than once."""
        self._closed = True
        with self._kill_lock:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        with self._read_lock:  # the pipe has ended, so a reading thread lets go of the lock at once
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _open(self, sampling: Sampling) -> VideoInfo:
        found = self._receive_json(b"I")
        duration_s = self._number(found, "duration_s")
        self._wall_clock_s = self._limits.wall_clock_for(duration_s)
        self._check_size(duration_s, self._number(found, "width"), self._number(found, "height"))
        num_frames, interval_s = sampling.grid(duration_s)
        if num_frames > self._limits.max_frames:
            raise VideoTooLarge(
                f"Sampling this video gives {num_frames} frames; at most {self._limits.max_frames} are allowed. "
                "Lower fps or set max_frames.",
                code="video_too_many_frames",
            )
        self._send({"interval_s": interval_s, "first_frame": self._first_frame, "num_frames": num_frames})
        opened = self._receive_json(b"O")
        width, height = int(self._number(opened, "width")), int(self._number(opened, "height"))
        self._check_size(duration_s, width, height)
        return VideoInfo(duration_s, width, height, num_frames, interval_s)

    def _check_size(self, duration_s: float, width: float, height: float) -> None:
        if duration_s > self._limits.max_duration_s:
            raise VideoTooLarge(
                f"The video lasts {duration_s:.1f} s; at most {self._limits.max_duration_s:.1f} s are allowed.",
                code="video_too_long",
            )
        if width * height > self._limits.max_pixels:
            raise VideoTooLarge(
                f"The video has {width:.0f} x {height:.0f} pixels; at most {self._limits.max_pixels} are allowed.",
                code="video_too_many_pixels",
            )

    def _batches(self) -> Iterator[Frames]:
        info = self.info
        shape = (info.height, info.width, 3)
        max_batch = max(1, self._batch_nbytes // math.prod(shape))
        for first in range(self._first_frame, info.num_frames, max_batch):
            pixels = np.empty((min(max_batch, info.num_frames - first), *shape), np.uint8)
            for frame in pixels:
                self._receive_frame(frame)
            yield Frames(pixels, np.arange(first, first + len(pixels), dtype=np.float64) * info.interval_s)
        self._receive(b"E")

    def _receive_frame(self, frame: NDArray[np.uint8]) -> None:
        if self._receive(b"F") != frame.nbytes:
            raise DecoderCrashed("The video decoder sent a frame of another size.")
        self._read_into(frame.data.cast("B"))

    def _receive_json(self, kind: bytes) -> dict[str, object]:
        return self._read_json(self._receive(kind))

    def _receive(self, kind: bytes) -> int:
        """Wait for the next message, which must be of ``kind``; its length. An error message is raised."""
        header = bytearray(worker.HEADER.size)
        while True:
            self._read_into(memoryview(header))
            received, nbytes = worker.HEADER.unpack(header)
            if received == b"X":
                raise _reported(self._read_json(nbytes))
            if received == kind:
                return int(nbytes)
            if received != b"T":
                raise DecoderCrashed("The video decoder sent something unexpected.")

    def _read_json(self, nbytes: int) -> dict[str, object]:
        # A hostile video may have taken the decoder over, so nothing it says is trusted.
        text = bytearray(min(nbytes, MAX_JSON_NBYTES))
        self._read_into(memoryview(text))
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise DecoderCrashed("The video decoder sent something unexpected.")
        return values

    def _number(self, values: dict[str, object], name: str) -> float:
        value = values.get(name)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise DecoderCrashed(f"The video decoder reported no valid {name}.")
        return value

    def _read_into(self, buffer: memoryview) -> None:
        with self._read_lock:
            while buffer:
                if self._closed:
                    raise VideoCancelled("Reading the video was cancelled.")
                assert self._process.stdout is not None
                self._await(self._process.stdout.fileno())
                nbytes = os.readv(self._process.stdout.fileno(), [buffer])
                if nbytes == 0:
                    raise self._ended()
                buffer = buffer[nbytes:]

    def _await(self, fd: int) -> None:
        """Wait for bytes. Only this waiting counts as the decoder's time: what is done with the frames may be slow."""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        patience_s = min(self._limits.stall_s, self._wall_clock_s - self._waited_s)
        begin_s = time.monotonic()
        ready = poller.poll(max(0.0, patience_s) * 1000)
        self._waited_s += time.monotonic() - begin_s
        if not ready:
            if self._waited_s >= self._wall_clock_s:
                raise VideoTimeout(f"Decoding the video took longer than {self._wall_clock_s:.0f} s.")
            raise VideoTimeout(f"The video decoder made no progress for {self._limits.stall_s:.0f} s.")

    def _send(self, values: dict[str, float]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading will tell how the decoder ended
            self._process.stdin.write(json.dumps(values).encode() + b"\n")
            self._process.stdin.flush()

    def _ended(self) -> VideoError:
        """Why the decoder's pipe ended before its last message."""
        if self._closed:
            return VideoCancelled("Reading the video was cancelled.")
        try:
            status = self._process.wait(timeout=self._limits.stall_s)
        except subprocess.TimeoutExpired:
            return VideoTimeout("The video decoder hung.")
        if -status in (signal.SIGXCPU, signal.SIGALRM):
            return VideoTimeout("Decoding the video took more time than allowed.")
        reason = f"signal {-status}" if status < 0 else f"status {status}"
        return DecoderCrashed(f"The video decoder crashed on this file ({reason}).")


def _start(argv: list[str]) -> subprocess.Popen[bytes]:
    # A bare environment: the decoder of a hostile file sees no secret. One thread for numpy, which has nothing to do.
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
            bufsize=0,
            pipesize=PIPE_NBYTES,
        )
    except OSError:
        raise DecoderCrashed("The video decoder could not be started.") from None


def _reported(values: dict[str, object]) -> VideoError:
    """The error that the decoder reported."""
    kind = getattr(errors, str(values.get("error")), None)
    if kind is VideoTooLarge:
        return VideoTooLarge(str(values.get("message")), code="video_needs_too_much_memory")
    if isinstance(kind, type) and issubclass(kind, VideoError):
        return kind(str(values.get("message")))
    return DecoderCrashed("The video decoder failed.")
