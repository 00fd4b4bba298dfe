"""The decoder process: a script that decodes one video and nothing else.

:class:`server.video.reader.VideoReader` runs it in a fresh isolated interpreter, because a hostile or broken file can
make the native decoder hang, crash or eat memory, and only a process can be killed and limited. It imports nothing of
this project, opens only the one file and writes only to its standard output.

PyAV reads the container (which frame is presented when) and decord decodes the pictures. decord alone cannot sample
by time: it tells neither which frame it returned nor exact times, counts frames that an edit list hides, and after
seeking in a stream of open GOPs returns a neighbour of the frame it was asked for. Knowing the index, :class:`Decoder`
moves it only in ways that keep its count right.

Protocol, on pipes: each message out is a kind (one byte), a length (uint32, big-endian) and as many bytes.

====  =================================================================================================
I     JSON ``{"duration_s", "width", "height"}``, as coded; then a line ``{"interval_s", "num_frames"}`` is awaited
O     JSON ``{"width", "height"}``, upright: the first frame was decoded
F     one frame, raw RGB [height, width, 3], for the next instant ``n * interval_s``
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
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HEADER = struct.Struct(">cI")
CODECS = {"h264": "H.264", "hevc": "HEVC", "vp9": "VP9", "av1": "AV1"}
FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
SPARE_NBYTES, SPARE_FRAMES = 32 << 20, 16
TICK_FRAMES = 64
TICK_PACKETS = 20_000
MAX_CLOCK_SKEW_S = 0.0005  # Matroska rounds times to ms


class Refused(Exception):  # noqa: N818
    """The video cannot be decoded; ``error`` names the reader's exception class."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error = error


class Outbox:
    """Writes messages to the reader. Between two of them the process may take ``stall_s``, then the kernel ends it:
    the reader would have killed it by then, so this only matters when the reader itself is gone."""

    def __init__(self, fd: int, stall_s: float) -> None:
        self.fd = fd
        self.grace_s = math.ceil(stall_s) + 5
        signal.alarm(self.grace_s)

    def send(self, kind: bytes, payload: bytes | memoryview = b"") -> None:
        signal.alarm(0)  # a slow reader is no stall
        for part in (HEADER.pack(kind, len(payload)), payload):
            view = memoryview(part)
            while view:
                view = view[os.write(self.fd, view) :]
        signal.alarm(self.grace_s)

    def send_json(self, kind: bytes, **values: object) -> None:
        self.send(kind, json.dumps(values).encode())


@dataclass(frozen=True)
class Index:
    """What the container says of its video stream, read packet by packet without decoding.

    ``starts_s`` [presented frames] float64, ascending from 0. ``num_packets`` counts hidden frames too. ``countable``
    is false where decord's count of frames differs from the presented ones, ``closed`` false where frames shown before
    a keyframe follow it in the file (open GOPs), so that seeking to it loses them.
    """

    starts_s: NDArray[np.float64]
    duration_s: float
    width: int
    height: int
    num_packets: int
    countable: bool
    closed: bool
    tolerance_s: float

    def position_at(self, time_s: float) -> int:
        """The frame on screen at ``time_s``: the last that began by then."""
        return max(0, int(self.starts_s.searchsorted(time_s + self.tolerance_s, side="right")) - 1)


def read_index(path: str, outbox: Outbox) -> Index:
    """Read the index of the file's video stream; Refused if there is none or the file ends before its claimed end."""
    import av

    try:
        with av.open(path, options={"protocol_whitelist": "file"}) as container:
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
    codec = stream.codec_context.codec.canonical_name
    if codec not in CODECS:
        names = ", ".join(CODECS.values())
        raise Refused("VideoUnsupported", f"The video codec {codec} is not supported: {names} are.")

    starts, durations, hidden = array("q"), array("q"), array("b")
    closed, key_pts = True, None
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
                key_pts = packet.pts
            elif key_pts is None or packet.pts < key_pts:
                closed = False

    presented = np.frombuffer(hidden, np.int8) == 0 if hidden else np.zeros(0, bool)
    if not presented.any():
        raise Refused("VideoDamaged", "The video has no frames: it is damaged or cut off.")
    # Matroska counts its duration from time 0, MP4 from the first frame.
    _check_complete(container, stream, len(starts), last_s - min(first_s, 0.0))

    all_starts = np.frombuffer(starts, np.int64)
    order = np.argsort(all_starts[presented], kind="stable")
    pts = all_starts[presented][order]
    last_duration = int(np.frombuffer(durations, np.int64)[presented][order][-1])
    if last_duration <= 0:  # unknown: the last frame stays as long as the one before it
        last_duration = int(pts[-1] - pts[-2]) if len(pts) > 1 else round(1 / 25 / stream.time_base)
    tick_s = float(stream.time_base)
    return Index(
        starts_s=(pts - pts[0]) * tick_s,
        duration_s=float((int(pts[-1] - pts[0]) + last_duration) * stream.time_base),
        width=stream.width,
        height=stream.height,
        num_packets=len(starts),
        countable=bool(presented.all()) and len(np.unique(pts)) == len(pts),
        closed=closed,
        tolerance_s=min(tick_s / 2, MAX_CLOCK_SKEW_S),
    )


def _check_complete(container: Any, stream: Any, num_packets: int, present_s: float) -> None:
    claimed_s = (container.duration or 0) / 1_000_000
    if claimed_s - present_s > max(0.5, 0.02 * claimed_s):
        message = f"The file claims {claimed_s:.1f} s but ends after {present_s:.1f} s: it is cut off or damaged."
        raise Refused("VideoDamaged", message)
    num_claimed = len(stream.index_entries)  # MP4: the sample table, after edit lists; Matroska: a few keyframes
    if num_claimed - num_packets > max(1, 0.02 * num_claimed):
        message = f"The file claims {num_claimed} frames but holds {num_packets}: it is cut off or damaged."
        raise Refused("VideoDamaged", message)


class Decoder:
    """Decodes presented frames by position, forward only."""

    def __init__(self, path: str, index: Index, num_threads: int, outbox: Outbox) -> None:
        import decord

        self.failures = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError, IndexError)
        self.index = index
        self.outbox = outbox
        self.next_position = 0
        try:
            # fault_tol: without it decord hides frames that it cannot decode behind copies of their neighbours.
            self.frames = decord.VideoReader(path, num_threads=num_threads, fault_tol=1)
            self.keys = self.frames.get_key_indices()
        except self.failures as error:
            raise self._failure() from error
        if len(self.frames) != index.num_packets:
            raise self._failure()

    def decode(self, position: int) -> NDArray[np.uint8]:
        """The presented frame at ``position``, uint8 [H, W, 3] RGB, upright (decord applies the display matrix)."""
        try:
            self._advance(position)
            return self._next()
        except (*self.failures, StopIteration) as error:
            raise self._failure() from error

    def _next(self) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = self.frames.next().asnumpy()
        self.next_position += 1
        return pixels

    def _advance(self, position: int) -> None:
        if not self.index.countable:
            # The only movement that counts presented frames alone is to take them one by one.
            while self.next_position < position:
                self._next()
                if self.next_position % TICK_FRAMES == 0:
                    self.outbox.send(b"T")
            return
        keys = [key for key in self.keys if self.next_position < key <= position]
        if self.index.closed and keys:
            # Never to the keyframe and then one further: decord would return the keyframe twice.
            self._seek(min(keys[-1] + TICK_FRAMES, position))
        else:
            for key in keys:  # decord seeks when it passes a keyframe by skipping, so step over it
                self._skip_to(key - 1)
                self._next()
        self._skip_to(position)

    def _skip_to(self, position: int) -> None:
        """Decode without converting up to ``position``, which no keyframe separates from here."""
        while self.next_position < position:
            self._seek(min(self.next_position + TICK_FRAMES, position))
            self.outbox.send(b"T")

    def _seek(self, position: int) -> None:
        self.frames.seek_accurate(position)
        self.next_position = position

    def _failure(self) -> Exception:
        """What made decord fail: it does not tell a refused allocation from damaged data."""
        try:
            mmap.mmap(-1, SPARE_NBYTES + SPARE_FRAMES * self.index.width * self.index.height * 3).close()
        except (OSError, MemoryError):
            return MemoryError()
        time_s = self.index.starts_s[min(self.next_position, len(self.index.starts_s) - 1)]
        return Refused("VideoDamaged", f"The video cannot be decoded from about {time_s:.1f} s on: it is damaged.")


def limit_process(memory_nbytes: int, cpu_s: int) -> None:
    """Limit what this process may take; it also writes no files and leaves no core."""
    for limit, value in (
        (resource.RLIMIT_DATA, memory_nbytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def main() -> None:
    job = json.loads(sys.argv[1])
    limit_process(job["memory_nbytes"], job["cpu_s"])
    outbox = Outbox(os.dup(1), job["stall_s"])
    os.dup2(2, 1)  # whatever a library prints must not reach the protocol
    try:
        decode_video(job["path"], job["num_threads"], outbox)
    except Refused as error:
        outbox.send_json(b"X", error=error.error, message=str(error))
    except MemoryError:
        message = "Decoding this video needs more memory than the server allows."
        outbox.send_json(b"X", error="VideoTooLarge", message=message)


def decode_video(path: str, num_threads: int, outbox: Outbox) -> None:
    """Send the index, await the plan, send the frames."""
    index = read_index(path, outbox)
    outbox.send_json(b"I", duration_s=index.duration_s, width=index.width, height=index.height)
    plan = json.loads(sys.stdin.buffer.readline() or "null")
    if plan is None:
        return
    decoder = Decoder(path, index, num_threads, outbox)
    last_position, pixels = -1, None
    for number in range(plan["num_frames"]):
        position = index.position_at(number * plan["interval_s"])
        if position != last_position:
            last_position, pixels = position, decoder.decode(position)
        assert pixels is not None
        if number == 0:
            outbox.send_json(b"O", width=pixels.shape[1], height=pixels.shape[0])
        outbox.send(b"F", pixels.data.cast("B"))
    outbox.send(b"E")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(0)  # the reader is gone
