"""The decoder process: a script that decodes one video and nothing else.

:class:`server.video.reader.VideoReader` runs it in a fresh isolated interpreter, because a hostile or broken file can
make the native decoder hang, crash or eat memory, and only a process can be killed and limited. It imports nothing of
this project, opens only the one file and writes only to its standard output.

The library is PyAV, whose every frame carries its presentation time. decord2 3.4.0 cannot sample by time: it does not
tell which frame it returned, returns others when it is slow, and miscounts beside edit lists and in open GOPs.

Several such processes may decode one file. The first reads the index and sends I, P and O; each gets its share.

Protocol, on pipes: each message out is a kind (one byte), a length (uint32, big-endian) and as many bytes; each message
in is a line of JSON.

====  =================================================================================================
I     JSON ``{"duration_s", "width", "height", "tick_s"}``; then awaits ``{"interval_s", "first_frame",
      "num_frames"}``
P     int64 [3, frames]: each wanted frame's presentation time, that of the keyframe to decode it from (or
      START_PTS), and how many frames to decode on top of those before it; then :class:`Share` is awaited
O     JSON ``{"width", "height"}``, upright: the first frame was decoded
F     one frame, raw RGB [height, width, 3], for the next instant of the share
T     nothing: a sign of life while frames between two instants are decoded or the index is read
E     nothing: all frames were sent
X     JSON ``{"error", "message"}``: no more will come
====  =================================================================================================
"""

from __future__ import annotations

import json
import math
import mmap
import os
import resource
import signal
import struct
import sys
import threading
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HEADER = struct.Struct(">cI")
CODECS = {"h264": "H.264", "hevc": "HEVC", "vp8": "VP8", "vp9": "VP9", "av1": "AV1"}
FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
OPEN_OPTIONS: dict[str, Any] = {"options": {"protocol_whitelist": "file"}, "metadata_errors": "replace"}
SPARE_NBYTES, SPARE_FRAMES = 32 << 20, 16
TICK_FRAMES = 64
TICK_PACKETS = 20_000
MAX_CLOCK_SKEW_S = 0.0005  # Matroska rounds times to ms
MAX_GAP_S = 1.0
START_PTS = -(1 << 63)
STACK_NBYTES = 256 << 10


class Refused(Exception):  # noqa: N818
    """The video cannot be decoded: the name of the reader's exception class, and the message."""


class Outbox:
    """Sends messages to the reader, from a thread: decoding runs ahead by ``ahead_nbytes``, or by one message.

    Between two messages the process may take ``stall_s``, then the kernel ends it, in case the reader is gone.
    """

    def __init__(self, fd: int, stall_s: float) -> None:
        self.ahead_nbytes = 0
        self._fd = fd
        self._grace_s = math.ceil(stall_s) + 5
        self._waiting: deque[tuple[bytes, bytes | memoryview]] = deque()
        self._nbytes = 0
        self._changed = threading.Condition()
        threading.stack_size(STACK_NBYTES)
        threading.Thread(target=self._write, daemon=True).start()
        signal.alarm(self._grace_s)

    def send(self, kind: bytes, payload: bytes | memoryview = b"") -> None:
        """Post a message, whose payload must not change any more. Waits while too much is on its way."""
        if kind == b"T" and self._waiting:
            return  # what is on its way is a sign of life
        signal.alarm(0)  # a slow reader is no stall
        with self._changed:
            self._changed.wait_for(lambda: self._nbytes == 0 or self._nbytes + len(payload) <= self.ahead_nbytes)
            self._waiting.append((HEADER.pack(kind, len(payload)), payload))
            self._nbytes += len(payload)
            self._changed.notify_all()
        signal.alarm(self._grace_s)

    def flush(self) -> None:
        """Wait until all is sent."""
        signal.alarm(0)
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)

    def send_json(self, kind: bytes, **values: object) -> None:
        self.send(kind, json.dumps(values).encode())

    def _write(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting)
                for part in self._waiting[0]:
                    view = memoryview(part)
                    while view:
                        view = view[os.write(self._fd, view) :]
                with self._changed:
                    self._nbytes -= len(self._waiting.popleft()[1])
                    self._changed.notify_all()
        except OSError:
            os._exit(0)  # the reader is gone


@dataclass(frozen=True)
class Index:
    """What the container says of its video stream, read packet by packet without decoding.

    ``pts`` [presented frames] int64, ascending, in units of ``tick_s``; ``key_pts`` the keyframes, ascending,
    with those that an edit list hides.
    """

    pts: NDArray[np.int64]
    key_pts: NDArray[np.int64]
    tick_s: float
    duration_s: float
    width: int
    height: int

    def locate(self, times_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """Where the frames on screen at ``times_s`` [n], ascending, from the first frame lie: message P. Such a frame
        is the last that began by then, as exact as the clock is."""
        import numpy as np

        tolerance = min(0.5, MAX_CLOCK_SKEW_S / self.tick_s)
        instants = self.pts[0] + times_s / self.tick_s + tolerance
        positions = np.maximum(self.pts.searchsorted(instants, side="right") - 1, 0)
        wanted = self.pts[positions]
        keys = self.key_pts.searchsorted(wanted, side="right") - 1
        key_pts = self.key_pts[keys]
        key_pts[(keys <= 0) | (key_pts < self.pts[0])] = START_PTS
        begins = np.maximum(self.pts.searchsorted(key_pts), np.append(0, positions[:-1] + 1))
        return np.stack([wanted, key_pts, positions + 1 - begins])


@dataclass(frozen=True)
class Share:
    """What one process is to decode: the frames on screen at ``times_s``, which lie as message P tells.
    ``memory_nbytes`` is this process's part of the limit, ``ahead_nbytes`` how far it may run ahead of the reader."""

    times_s: list[float]
    pts: list[int]
    key_pts: list[int]
    tick_s: float
    width: int
    height: int
    num_threads: int
    memory_nbytes: int
    ahead_nbytes: int


def read_index(path: str, outbox: Outbox) -> Index:
    """Read the index of the file's video stream; Refused if there is none or the file ends before its claimed end."""
    import av

    try:
        with av.open(path, **OPEN_OPTIONS) as container:
            if container.format.name not in FORMATS:
                raise Refused("VideoUnsupported", "The container is not supported: MP4, MOV, MKV and WebM are read.")
            return _read_index(container, outbox)
    except av.error.MemoryError:
        raise MemoryError from None
    except av.error.FFmpegError:
        raise Refused("VideoDamaged", "The container cannot be read: the file is damaged or cut off.") from None


def _read_index(container: Any, outbox: Outbox) -> Index:
    import numpy as np
    from av.stream import Disposition

    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:  # a cover picture is no video
        sound = " but sound" if container.streams.audio else ""
        raise Refused("NotAVideo", f"The file holds nothing{sound}: there is no video in it.")
    codec = stream.codec_context.codec.canonical_name if stream.codec_context else "of this file"
    if codec not in CODECS:
        names = ", ".join(CODECS.values())
        raise Refused("VideoUnsupported", f"The video codec {codec} is not supported: {names} are.")

    starts, durations, hidden, keys = array("q"), array("q"), array("b"), array("q")
    first_s, last_s = math.inf, -math.inf
    for number, packet in enumerate(container.demux()):
        if number % TICK_PACKETS == TICK_PACKETS - 1:
            outbox.send(b"T")
        if packet.pts is None:
            if packet.stream is stream and packet.size:
                raise Refused("VideoDamaged", "The video's frames carry no presentation times.")
            continue
        duration = packet.duration or 0
        first_s = min(first_s, float(packet.pts * packet.time_base))
        last_s = max(last_s, float((packet.pts + duration) * packet.time_base))
        if packet.stream is stream:
            starts.append(packet.pts)
            durations.append(duration)
            hidden.append(packet.is_discard)
            if packet.is_keyframe:
                keys.append(packet.pts)

    presented = np.frombuffer(hidden, np.int8) == 0 if hidden else np.zeros(0, bool)
    if not presented.any():
        raise Refused("VideoDamaged", "The video has no frames: it is damaged or cut off.")
    # Matroska counts its duration from time 0, MP4 from the first frame.
    _check_complete(container, stream, len(starts), last_s - min(first_s, 0.0))

    all_pts = np.frombuffer(starts, np.int64)
    order = np.argsort(all_pts[presented], kind="stable")
    pts = all_pts[presented][order]
    last_duration = int(np.frombuffer(durations, np.int64)[presented][order][-1])
    if last_duration <= 0:  # unknown: the last frame stays as long as the one before it
        last_duration = int(pts[-1] - pts[-2]) if len(pts) > 1 else round(1 / 25 / stream.time_base)
    return Index(
        pts=pts,
        key_pts=np.sort(np.frombuffer(keys, np.int64) if keys else pts[:1]),
        tick_s=float(stream.time_base),
        duration_s=float((int(pts[-1] - pts[0]) + last_duration) * stream.time_base),
        width=stream.width,
        height=stream.height,
    )


def _check_complete(container: Any, stream: Any, num_packets: int, present_s: float) -> None:
    """Refused if the file ends clearly before what its header claims; half a second or 2 % may be missing."""
    claimed_s = (container.duration or 0) / 1_000_000
    if claimed_s - present_s > max(0.5, 0.02 * claimed_s):
        message = f"The file claims {claimed_s:.1f} s but ends after {present_s:.1f} s: it is cut off or damaged."
        raise Refused("VideoDamaged", message)
    num_claimed = len(stream.index_entries)  # MP4: the sample table, after edit lists; Matroska: a few keyframes
    if num_claimed - num_packets > max(1, 0.02 * num_claimed):
        message = f"The file claims {num_claimed} frames but holds {num_packets}: it is cut off or damaged."
        raise Refused("VideoDamaged", message)


class Decoder:
    """Decodes presented frames by their presentation times, forward only.

    It seeks to keyframes, and in H.264 it skips frames that are neither wanted nor referred to by others (in HEVC those
    of a higher temporal layer may still refer to them). A ``careful`` one does neither.
    """

    def __init__(self, path: str, share: Share, outbox: Outbox, *, careful: bool = False) -> None:
        import av

        self.share = share
        self.outbox = outbox
        self.careful = careful
        self.wanted = {*share.pts, *share.key_pts}
        self.container = av.open(path, **OPEN_OPTIONS)
        self.stream: Any = self.container.streams.best("video")
        self.stream.thread_type = "AUTO"
        self.stream.codec_context.thread_count = share.num_threads
        self.skips = not careful and self.stream.codec_context.codec.canonical_name == "h264"
        self.frames = self._frames()
        self.frame: Any = None

    def decode(self, wanted: int, key: int) -> Any:
        """The frame at ``wanted``, decoded from ``key`` at the latest, uint8 [H, W, 3] RGB, upright.

        In place of a frame that the decoder drops, the next one, if that comes soon; else StopIteration. None if only
        a careful decoder can tell.
        """
        import numpy as np

        found = True
        if key > self._reached() and not self.careful:
            # Frames shown before a keyframe may be lost by seeking to it (open GOPs); none of them is wanted.
            self.container.seek(key, stream=self.stream)
            self.frames = self._frames()
            self.frame = None
            found = self._advance(key)  # some begin a gradual refresh, and no picture is whole for a while
        found = self._advance(wanted) and found
        if not found and not self.careful:
            return None
        if self.frame is None or (self._reached() - wanted) * self.share.tick_s > MAX_GAP_S:
            raise StopIteration
        size = {"width": self.share.width, "height": self.share.height}
        # By itself it takes a thread a core, whose stacks alone are more memory than a share may have.
        pixels = self.frame.to_ndarray(**size, format="rgb24", threads=self.share.num_threads)
        return np.ascontiguousarray(np.rot90(pixels, round(self.frame.rotation / 90)))

    def _advance(self, pts: int) -> bool:
        """Decode until the frame at ``pts`` is reached; False if another one is."""
        num_passed = 0
        while self._reached() < pts:
            self.frame = next(self.frames, None)
            if self.frame is None:
                break
            num_passed += 1
            if num_passed % TICK_FRAMES == 0:
                self.outbox.send(b"T")
        return self._reached() == pts

    def _frames(self) -> Iterator[Any]:
        for packet in self.container.demux(self.stream):
            skips = self.skips and packet.pts not in self.wanted
            self.stream.codec_context.skip_frame = "NONREF" if skips else "DEFAULT"
            yield from packet.decode()

    def _reached(self) -> int:
        return START_PTS if self.frame is None or self.frame.pts is None else int(self.frame.pts)


def send_frames(path: str, share: Share, is_first: bool, outbox: Outbox) -> None:
    """Decode and send the frames of a share; Refused if one cannot be decoded."""
    import av

    num_sent, last = 0, None
    try:
        decoder = Decoder(path, share, outbox)
        for wanted, key in zip(share.pts, share.key_pts, strict=True):
            if wanted != last:
                pixels = decoder.decode(wanted, key)
            if pixels is None:
                decoder = Decoder(path, share, outbox, careful=True)
                pixels = decoder.decode(wanted, key)
            if is_first and last is None:
                outbox.send_json(b"O", width=pixels.shape[1], height=pixels.shape[0])
            outbox.send(b"F", pixels.data.cast("B"))
            num_sent, last = num_sent + 1, wanted
    except (av.error.FFmpegError, StopIteration) as error:
        raise _failure(error, share, share.times_s[num_sent]) from error


def _failure(error: Exception, share: Share, time_s: float) -> Exception:
    """What stopped the decoder: not every codec tells a refused allocation from damaged data."""
    if isinstance(error, MemoryError | BlockingIOError):  # the latter: no room for the stack of another thread
        return MemoryError()
    try:
        spare_nbytes = SPARE_NBYTES + SPARE_FRAMES * share.width * share.height * 3
        mmap.mmap(-1, spare_nbytes, flags=mmap.MAP_PRIVATE).close()  # shared memory would not count
    except (OSError, MemoryError):
        return MemoryError()
    return Refused("VideoDamaged", f"The video cannot be decoded at about {time_s:.1f} s: it is damaged or cut off.")


def limit_process(memory_nbytes: int, cpu_s: int) -> None:
    """Limit what this process may take; it also writes no files and leaves no core."""
    for name, value in (("DATA", memory_nbytes), ("CPU", cpu_s), ("FSIZE", 0), ("CORE", 0)):
        limit = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def main() -> None:
    job = json.loads(sys.argv[1])
    os.nice(10)  # questions that are being answered come first
    limit_process(job["memory_nbytes"], job["cpu_s"])
    outbox = Outbox(os.dup(1), job["stall_s"])
    os.dup2(2, 1)  # whatever a library prints must not reach the protocol
    try:
        if job["is_first"]:
            send_index(job["path"], outbox)
        share = Share(**receive())
        limit_process(share.memory_nbytes, job["cpu_s"])
        outbox.ahead_nbytes = share.ahead_nbytes
        send_frames(job["path"], share, job["is_first"], outbox)
        outbox.send(b"E")
    except Refused as error:
        name, message = error.args
        outbox.send_json(b"X", error=name, message=message)
    except MemoryError:
        message = "Decoding this video needs more memory than the server allows."
        outbox.send_json(b"X", error="VideoTooLarge", message=message)
    outbox.flush()


def send_index(path: str, outbox: Outbox) -> None:
    """Send the index, await the plan, send where the frames lie."""
    import numpy as np

    index = read_index(path, outbox)
    outbox.send_json(b"I", duration_s=index.duration_s, width=index.width, height=index.height, tick_s=index.tick_s)
    plan = receive()
    numbers = np.arange(plan["first_frame"], plan["num_frames"])
    outbox.send(b"P", index.locate(numbers * plan["interval_s"]).tobytes())


def receive() -> Any:
    line = sys.stdin.buffer.readline()
    if not line:
        os._exit(0)  # the reader is gone
    return json.loads(line)


if __name__ == "__main__":
    main()
