"""A decoder process as the reader sees it: what it says is not trusted, and it can be killed at any time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.video import errors, worker
from server.video.errors import DecoderCrashed, VideoCancelled, VideoError, VideoTimeout, VideoTooLarge

_log = logging.getLogger(__name__)

DECODER_COMMAND = (sys.executable, "-I", str(Path(worker.__file__).resolve()))
MAX_JSON_NBYTES = 4096
PIPE_NBYTES = 1 << 20


class Patience:
    """How long a reader waits for its decoders: ``stall_s`` without a sign of life, ``wall_clock_s`` in all."""

    def __init__(self, stall_s: float, wall_clock_s: float) -> None:
        self.stall_s = stall_s
        self.wall_clock_s = wall_clock_s
        self._waited_s = 0.0

    def wait(self, fd: int, event: int = select.POLLIN) -> None:
        """Wait for bytes, or for room. Only this counts as the decoder's time: what is done with frames may be slow.

        Raises VideoTimeout.
        """
        poller = select.poll()
        poller.register(fd, event)
        patience_s = min(self.stall_s, self.wall_clock_s - self._waited_s)
        begin_s = time.monotonic()
        ready = poller.poll(max(0.0, patience_s) * 1000)
        self._waited_s += time.monotonic() - begin_s
        if not ready:
            if self._waited_s >= self.wall_clock_s:
                raise VideoTimeout(f"Decoding the video took longer than {self.wall_clock_s:.0f} s.")
            raise VideoTimeout(f"The video decoder made no progress for {self.stall_s:.0f} s.")


class DecoderProcess:
    """Speaks the protocol of :mod:`server.video.worker` with a process of ``command``, to which ``job`` is appended.

    One thread receives; :meth:`close` may be called from another one, and ends a :meth:`receive` that waits. What is
    received raises any VideoError.
    """

    def __init__(self, command: Sequence[str], job: Mapping[str, object], patience: Patience) -> None:
        self._patience = patience
        self._closed = False
        self._kill_lock = threading.Lock()
        self._pipe_lock = threading.Lock()
        self._process = _start([*command, json.dumps(job)])

    def kill(self) -> None:
        """Kill the process and its children, without waiting for their end. Safe from any thread."""
        self._closed = True
        with self._kill_lock, contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the process and free everything. Safe from any thread, and more than once."""
        self.kill()
        with self._kill_lock:
            self._process.wait()
        with self._pipe_lock:  # the pipe has ended, so a thread that uses it lets go of the lock at once
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def send(self, values: Mapping[str, object]) -> None:
        line = memoryview(json.dumps(values).encode() + b"\n")
        with self._pipe_lock, contextlib.suppress(BrokenPipeError):  # reading will tell how the process ended
            while line and not self._closed:
                assert self._process.stdin is not None
                self._patience.wait(self._process.stdin.fileno(), select.POLLOUT)
                line = line[os.write(self._process.stdin.fileno(), line[: select.PIPE_BUF]) :]

    def receive(self, kind: bytes) -> int:
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

    def receive_json(self, kind: bytes) -> dict[str, object]:
        return self._read_json(self.receive(kind))

    def receive_bytes(self, kind: bytes, buffer: memoryview) -> None:
        """Fill ``buffer``, which is as large as the message must be."""
        if self.receive(kind) != buffer.nbytes:
            raise DecoderCrashed("The video decoder sent something of another size.")
        self._read_into(buffer)

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

    def _read_into(self, buffer: memoryview) -> None:
        with self._pipe_lock:
            while buffer:
                if self._closed:
                    raise VideoCancelled("Reading the video was cancelled.")
                assert self._process.stdout is not None
                self._patience.wait(self._process.stdout.fileno())
                nbytes = os.readv(self._process.stdout.fileno(), [buffer])
                if nbytes == 0:
                    raise self._ended()
                buffer = buffer[nbytes:]

    def _ended(self) -> VideoError:
        """Why the pipe ended before the last message."""
        if self._closed:
            return VideoCancelled("Reading the video was cancelled.")
        try:
            status = self._process.wait(timeout=self._patience.stall_s)
        except subprocess.TimeoutExpired:
            return VideoTimeout("The video decoder hung.")
        if -status in (signal.SIGXCPU, signal.SIGALRM):
            return VideoTimeout("Decoding the video took more time than allowed.")
        reason = f"signal {-status}" if status < 0 else f"status {status}"
        _log.warning("a video decoder ended with %s", reason)  # which need not be the video's fault
        return DecoderCrashed(f"The video decoder crashed on this file ({reason}).")


def number(values: Mapping[str, object], name: str) -> float:
    """A positive number out of a process's message."""
    value = values.get(name)
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise DecoderCrashed(f"The video decoder reported no valid {name}.")
    return value


def _start(argv: list[str]) -> subprocess.Popen[bytes]:
    # A bare environment: the decoder of a hostile file sees no secret. One thread for numpy, which has nothing to do.
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
    except OSError:
        raise DecoderCrashed("The video decoder could not be started.") from None
    assert process.stdout is not None
    with contextlib.suppress(OSError):  # a user may have only so many large pipes
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, PIPE_NBYTES)
    return process


def _reported(values: Mapping[str, object]) -> VideoError:
    """The error that the decoder reported."""
    kind = getattr(errors, str(values.get("error")), None)
    if kind is VideoTooLarge:
        return VideoTooLarge(str(values.get("message")), code="video_needs_too_much_memory")
    if isinstance(kind, type) and issubclass(kind, VideoError):
        return kind(str(values.get("message")))
    return DecoderCrashed("The video decoder failed.")
