"""H.264 videos of any length within seconds: a minute of moving texture, encoded once and repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_GOP_S = 2
MOST_FILES = 60 // _GOP_S


@dataclass(frozen=True, slots=True)
class _Packet:
    data: bytes
    pts: int
    dts: int
    is_keyframe: bool


def write_long_videos(files: Mapping[Path, int], width: int, height: int, fps: int) -> None:
    """Writes mp4 files of so many minutes each, with B-frames and a keyframe every 2 s; no file holds what another
    holds, as each begins at another keyframe. Raises ValueError for more than MOST_FILES."""
    if len(files) > MOST_FILES:
        raise ValueError(f"at most {MOST_FILES} different videos can be made, not {len(files)}")
    minute: list[_Packet] = []
    for number, (path, minutes) in enumerate(files.items()):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.gop_size = _GOP_S * fps
            stream.codec_context.max_b_frames = 2
            # A cut that is taken for a scene would put keyframes where none are expected.
            stream.codec_context.options = {"preset": "veryfast", "crf": "26", "sc_threshold": "0"}
            minute = minute or _encode(stream, width, height, fps)
            first = number * _GOP_S * fps
            for turn in range(minutes):
                for packet in _from(minute, first, 60 * fps):
                    _mux(container, stream, packet, turn * 60 * fps)


def _encode(stream: av.VideoStream, width: int, height: int, fps: int) -> list[_Packet]:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (2 * height // 8, 2 * width // 8, 3), np.uint8)
    texture = coarse.repeat(8, 0).repeat(8, 1) // 2
    texture += generator.integers(0, 64, texture.shape, np.uint8)
    packets: list[av.Packet] = []
    for number in range(60 * fps):
        top, left = (2 * number) % height, (3 * number) % width
        picture = np.ascontiguousarray(texture[top : top + height, left : left + width])
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, fps)
        packets += stream.encode(frame)
    packets += stream.encode(None)
    return [_Packet(bytes(packet), packet.pts, packet.dts, packet.is_keyframe) for packet in packets]


def _from(minute: list[_Packet], first: int, length: int) -> list[_Packet]:
    """The minute as it is when it begins with the frame ``first``, a keyframe, and what was before comes last."""
    start = next(place for place, packet in enumerate(minute) if packet.is_keyframe and packet.pts == first)
    turned = [*minute[start:], *minute[:start]]
    shifts = [-first] * (len(minute) - start) + [length - first] * start
    return [
        _Packet(packet.data, packet.pts + shift, packet.dts + shift, packet.is_keyframe)
        for packet, shift in zip(turned, shifts, strict=True)
    ]


def _mux(container: av.container.OutputContainer, stream: av.VideoStream, made: _Packet, shift: int) -> None:
    packet = av.Packet(made.data)
    packet.stream, packet.time_base = stream, Fraction(1, int(stream.codec_context.framerate))
    packet.pts, packet.dts = made.pts + shift, made.dts + shift
    packet.duration, packet.is_keyframe = 1, made.is_keyframe
    container.mux(packet)
