"""Real small video clips for tests, encoded with PyAV, whose every frame carries its own time.

A frame is a 4 x 8 grid of blocks: 24 bits of time in ms and an 8-bit checksum, most significant bit first. A one is
orange and a zero is navy, so swapped colour channels, wrong rotation or a torn frame fail the checksum in
:func:`read_time_s`. The blocks are large, so any codec at any quality keeps them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

ROWS, COLUMNS = 4, 8
ONE_RGB = np.array([240, 160, 40], np.uint8)
ZERO_RGB = np.array([10, 20, 90], np.uint8)
TIME_BASE = Fraction(1, 90_000)

ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp8": "libvpx", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
FAST_OPTIONS = {
    "h264": {"preset": "ultrafast", "crf": "23"},
    "hevc": {"preset": "ultrafast", "crf": "28", "x265-params": "log-level=none"},
    "vp8": {"deadline": "realtime", "cpu-used": "8", "b": "800k"},
    "vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "35", "b": "0"},
    "av1": {"preset": "8", "crf": "20", "svtav1-params": "lp=1:enable-tf=0"},
}

VFR_S = (0, 0.1, 0.2, 0.25, 1.7, 1.75, 1.8, 3.4)
SLOW_X264 = {"preset": "medium"}
OPEN_GOP_X264 = {"preset": "medium", "x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}
INTRA_REFRESH_X264 = {"preset": "medium", "x264-params": "intra-refresh=1"}
INTERLACED_X264 = {"preset": "medium", "x264-params": "tff=1"}
LAYERS_X265 = {"x265-params": "log-level=none:temporal-layers=3:bframes=3:b-adapt=0:b-pyramid=1"}
ALTREF_VP9 = {"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"}
ALTREF_VP8 = {**ALTREF_VP9, "b": "800k"}

CLIPS: dict[str, tuple[str, dict[str, object]]] = {
    "h264-mp4": ("mp4", {}),
    "h264-mkv": ("mkv", {}),
    "h264-mov": ("mov", {}),
    "hevc-mp4": ("mp4", {"codec": "hevc"}),
    "hevc-mkv": ("mkv", {"codec": "hevc"}),
    "vp8-webm": ("webm", {"codec": "vp8", "options": ALTREF_VP8}),
    "vp9-webm": ("webm", {"codec": "vp9"}),
    "vp9-mp4": ("mp4", {"codec": "vp9"}),
    "av1-mp4": ("mp4", {"codec": "av1"}),
    "av1-webm": ("webm", {"codec": "av1"}),
    "hidden-reference-frames": ("webm", {"codec": "vp9", "options": ALTREF_VP9}),
    "b-frames": ("mp4", {"bframes": 3, "options": SLOW_X264}),
    "open-gop-h264": ("mp4", {"gop": 12, "bframes": 3, "options": OPEN_GOP_X264}),
    "open-gop-hevc": ("mp4", {"codec": "hevc", "bframes": 3, "gop": 12}),
    "short-gop-b-frames": ("mp4", {"gop": 3, "bframes": 2, "options": SLOW_X264}),
    "short-gop-b-frames-mkv": ("mkv", {"gop": 3, "bframes": 2, "options": SLOW_X264}),
    "temporal-layers-hevc": ("mp4", {"codec": "hevc", "gop": 15, "options": LAYERS_X265}),
    "intra-refresh": ("mp4", {"gop": 10, "options": INTRA_REFRESH_X264}),
    "intra-refresh-mkv": ("mkv", {"gop": 10, "bframes": 2, "options": INTRA_REFRESH_X264}),
    "interlaced": ("mp4", {"bframes": 2, "options": INTERLACED_X264}),
    "only-keyframes": ("mp4", {"gop": 1}),
    "gop-250": ("mkv", {"gop": 250, "fps": 25.0, "duration_s": 11.0}),
    "ntsc": ("mp4", {"fps": 30000 / 1001, "duration_s": 3.003}),
    "vfr-mp4": ("mp4", {"times_s": VFR_S, "duration_s": 5.0}),
    "vfr-mkv": ("mkv", {"times_s": VFR_S, "duration_s": 5.0}),
    "with-sound": ("mp4", {"audio": True}),
    "with-sound-webm": ("webm", {"codec": "vp9", "audio": True}),
    "starts-late-mp4": ("mp4", {"start_s": 3.3, "audio": True}),
    "starts-late-mkv": ("mkv", {"start_s": 3.3}),
    "10-bit-h264": ("mp4", {"pix_fmt": "yuv420p10le"}),
    "10-bit-hevc": ("mkv", {"codec": "hevc", "pix_fmt": "yuv420p10le"}),
    "4:4:4": ("mp4", {"pix_fmt": "yuv444p"}),
    "odd-size": ("webm", {"codec": "vp9", "width": 321, "height": 181}),
    "rotated-90": ("mp4", {"rotation": 90, "width": 180, "height": 320}),
    "rotated-180": ("mp4", {"rotation": 180}),
    "rotated-270": ("mov", {"rotation": 270, "width": 180, "height": 320}),
    "two-seconds": ("mp4", {"duration_s": 2.0}),
    "single-frame": ("mp4", {"duration_s": 0.1}),
}
"""Clips of many kinds by name: a suffix and arguments of :func:`write_clip`."""


@dataclass(frozen=True)
class Clip:
    """A written clip: its file, upright size, and the presentation times [s] from the first frame it was given."""

    path: Path
    width: int
    height: int
    times_s: tuple[float, ...]
    duration_s: float

    def time_on_screen_s(self, at_s: float) -> float:
        """The time of the frame shown at ``at_s``: the last that began by then, to half a tick of the container."""
        tick_s = 0.001 if self.path.suffix in (".mkv", ".webm") else float(TIME_BASE)
        return max(time_s for time_s in self.times_s if round(time_s / tick_s) * tick_s <= at_s + tick_s / 2)


def draw_time(width: int, height: int, time_s: float) -> NDArray[np.uint8]:
    """Draw the frame uint8 [height, width, 3] that carries ``time_s`` (rounded to ms, below 4.6 h)."""
    time_ms = round(time_s * 1000)
    code = time_ms << 8 | _checksum(time_ms)
    bits = np.array([code >> shift & 1 for shift in range(ROWS * COLUMNS - 1, -1, -1)]).reshape(ROWS, COLUMNS)
    blocks = np.where(bits[..., None], ONE_RGB, ZERO_RGB).astype(np.uint8)
    rows = np.arange(height) * ROWS // height
    columns = np.arange(width) * COLUMNS // width
    return np.ascontiguousarray(blocks[rows][:, columns])


def read_time_s(pixels: NDArray[np.uint8]) -> float:
    """Read the time a decoded frame uint8 [H, W, 3] carries; ValueError if it carries none."""
    height, width = pixels.shape[:2]
    code = 0
    for row in range(ROWS):
        for column in range(COLUMNS):
            top, left = (2 * row + 1) * height // (2 * ROWS), (2 * column + 1) * width // (2 * COLUMNS)
            block = pixels[top - 4 : top + 5, left - 4 : left + 5].astype(np.float64).mean(axis=(0, 1))
            distances = [np.abs(block - colour).max() for colour in (ZERO_RGB, ONE_RGB)]
            if min(distances) > 60:
                raise ValueError(f"block ({row}, {column}) has colour {block.round()}, neither a one nor a zero")
            code = code << 1 | int(distances[1] < distances[0])
    time_ms, checksum = code >> 8, code & 0xFF
    if checksum != _checksum(time_ms):
        raise ValueError("the checksum of the frame's time does not match: wrong orientation or a damaged frame")
    return time_ms / 1000


def write_clip(
    path: Path,
    *,
    codec: str = "h264",
    width: int = 320,
    height: int = 180,
    fps: float = 10.0,
    duration_s: float = 4.0,
    times_s: Sequence[float] | None = None,
    start_s: float = 0.0,
    gop: int = 20,
    bframes: int = 0,
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    audio: bool = False,
    faststart: bool = False,
    options: dict[str, str] | None = None,
) -> Clip:
    """Encode a clip; the container follows from the suffix (mp4, mov, m4v, mkv, webm, avi, ts).

    ``times_s`` (variable frame rate) replaces ``fps``; the last frame ends at ``duration_s``. ``start_s`` moves every
    timestamp. ``width`` and ``height`` are upright; with ``rotation`` (90, 180 or 270 clockwise, mp4 and mov only) the
    coded picture lies on its side and the container's display matrix turns it upright.
    """
    times = tuple(times_s) if times_s is not None else tuple(n / fps for n in range(round(duration_s * fps)))
    ends = (*times[1:], duration_s)
    quarter_turns = rotation // 90  # np.rot90 turns counter-clockwise, undoing the clockwise turn at display
    sideways = quarter_turns % 2 == 1
    container_options = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(ENCODERS[codec], rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = (height, width) if sideways else (width, height)
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = TIME_BASE
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if codec in ("h264", "hevc"):
            stream.codec_context.max_b_frames = bframes
        if bframes and codec == "hevc":
            options = {"x265-params": f"log-level=none:bframes={bframes}:b-adapt=0", **(options or {})}
        stream.codec_context.options = {**FAST_OPTIONS[codec], **(options or {})}
        if audio:
            _write_tone(container, "libopus" if path.suffix == ".webm" else "aac", start_s, duration_s)
        durations = {
            _ticks(time_s + start_s): _ticks(end_s) - _ticks(time_s) for time_s, end_s in zip(times, ends, strict=True)
        }
        for time_s in times:
            picture = np.rot90(draw_time(width, height, time_s), quarter_turns)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = _ticks(time_s + start_s), TIME_BASE
            _mux(container, stream.encode(frame), durations)
        _mux(container, stream.encode(None), durations)
    if rotation:
        set_rotation(path, rotation)
    return Clip(path, width, height, times, duration_s)


def write_tone(path: Path, *, duration_s: float = 2.0) -> Path:
    """Write an audio-only file (wav, mp4, m4a, mkv ...)."""
    codec = "pcm_s16le" if path.suffix == ".wav" else "aac"
    with av.open(str(path), "w") as container:
        _write_tone(container, codec, 0.0, duration_s)
    return path


def set_rotation(path: Path, degrees: int) -> None:
    """Turn the display matrix of every track of an mp4 or mov file to ``degrees`` clockwise, in place."""
    one = 1 << 16
    a, b = {0: (one, 0), 90: (0, one), 180: (-one, 0), 270: (0, -one)}[degrees]
    matrix = struct.pack(">9i", a, b, 0, -b, a, 0, 0, 0, 1 << 30)

    def patch(data: bytearray, payload: int) -> None:
        start = payload + (40 if data[payload] == 0 else 52)  # version 0 holds 32-bit times, version 1 64-bit ones
        data[start : start + 36] = matrix

    _patch_boxes(path, b"tkhd", patch)


def stretch_duration(path: Path, factor: int) -> None:
    """Make an mp4's header claim ``factor`` times its duration; the sample tables stay as they are."""

    def patch_at(offset: int) -> Callable[[bytearray, int], None]:
        def patch(data: bytearray, payload: int) -> None:
            (units,) = struct.unpack_from(">I", data, payload + offset)
            struct.pack_into(">I", data, payload + offset, min(units * factor, 0xFFFF_FFFE))

        return patch

    for box, offset in ((b"mvhd", 16), (b"mdhd", 16), (b"tkhd", 20)):
        _patch_boxes(path, box, patch_at(offset))


def trim(path: Path, start_s: float, end_s: float) -> None:
    """Make an mp4's edit list present only ``start_s`` to ``end_s`` of the media, in place; the rest stays hidden."""
    data = path.read_bytes()
    movie_ticks_per_s, media_ticks_per_s = (
        struct.unpack_from(">I", data, data.index(box) + 4 + 12)[0] for box in (b"mvhd", b"mdhd")
    )

    def patch(data: bytearray, payload: int) -> None:
        _, media_time = struct.unpack_from(">Ii", data, payload + 8)
        length = round((end_s - start_s) * movie_ticks_per_s)
        struct.pack_into(">Ii", data, payload + 8, length, media_time + round(start_s * media_ticks_per_s))

    _patch_boxes(path, b"elst", patch)


def remux(source: Path, path: Path, **options: str) -> None:
    """Copy the streams of ``source`` into another container, with options of FFmpeg's muxer."""
    with av.open(str(source)) as reader, av.open(str(path), "w", options=options) as writer:
        streams = {stream.index: writer.add_stream_from_template(stream) for stream in reader.streams}
        for packet in reader.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                writer.mux(packet)


def blank_media(path: Path, from_fraction: float) -> None:
    """Overwrite an mp4's media data from ``from_fraction`` on with zeros: its frames cannot be decoded."""
    data = bytearray(path.read_bytes())
    payload = data.index(b"mdat") + 4
    (nbytes,) = struct.unpack_from(">I", data, payload - 8)
    end = payload - 8 + nbytes
    begin = payload + int((end - payload) * from_fraction)
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)


def truncate(path: Path, fraction: float) -> None:
    """Keep only the first ``fraction`` of the file's bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])


@dataclass
class Clips:
    """Clips by their arguments, each encoded once a session (the ``clips`` fixture)."""

    folder: Path
    _written: dict[str, Clip] = field(default_factory=dict)

    def __call__(self, suffix: str = "mp4", **arguments: object) -> Clip:
        """The clip :func:`write_clip` makes of these arguments. The file is shared: tests must not change it."""
        key = f"{suffix} {sorted(arguments.items())}"
        if key not in self._written:
            path = self.folder / f"clip{len(self._written):03d}.{suffix}"
            self._written[key] = write_clip(path, **arguments)  # type: ignore[arg-type]
        return self._written[key]

    def hour(self) -> Clip:
        """One hour of 320 x 180 H.264 at 2 frames per second."""
        return self("mp4", fps=2.0, duration_s=3600.0, gop=20)


def _ticks(time_s: float) -> int:
    return round(time_s / TIME_BASE)


def _checksum(time_ms: int) -> int:
    return (time_ms * 167 + 91 ^ time_ms >> 11) & 0xFF


def _mux(container: av.container.OutputContainer, packets: Sequence[av.Packet], durations: dict[int, int]) -> None:
    for packet in packets:
        # Without this the muxer guesses the last frame's duration, which for a variable frame rate is wrong.
        packet.duration = durations.get(packet.pts, packet.duration)
        container.mux(packet)


def _write_tone(container: av.container.OutputContainer, codec: str, start_s: float, duration_s: float) -> None:
    rate = 48_000
    stream = container.add_stream(codec, rate=rate)
    stream.layout = "mono"
    samples = (np.sin(np.arange(int(duration_s * rate)) * (2 * np.pi * 440 / rate)) * 8000).astype(np.int16)
    for begin in range(0, len(samples), 960):
        frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + 960], format="s16", layout="mono")
        frame.rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = begin + round(start_s * rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _patch_boxes(path: Path, box: bytes, patch: Callable[[bytearray, int], None]) -> None:
    data = bytearray(path.read_bytes())
    position = data.find(box)
    if position < 0:
        raise ValueError(f"no {box.decode()} box in {path.name}")
    while position >= 0:
        patch(data, position + 4)
        position = data.find(box, position + 4)
    path.write_bytes(data)
