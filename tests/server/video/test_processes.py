"""Several processes that decode one video: the frames are those of plain decoding, whatever is skipped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from clips import CLIPS, SLOW_X264, Clips, blank_media, remux, trim, write_clip
from numpy.typing import NDArray

from server.video.errors import VideoCancelled, VideoDamaged, VideoTimeout, VideoTooLarge
from server.video.process import DECODER_COMMAND
from server.video.reader import Sampling, VideoLimits, VideoReader


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    process = psutil.Process()
    before, others = (process.num_fds(), threading.active_count()), process.children(recursive=True)
    yield
    assert [child for child in process.children(recursive=True) if child not in others] == []
    assert (process.num_fds(), threading.active_count()) == before


@lru_cache(maxsize=1)
def decode_all(path: Path) -> tuple[NDArray[np.float64], list[NDArray[np.uint8]], float]:
    """Times [s] from the first presented frame and pixels of all frames, decoded one after the other; half a tick."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        size = {"width": stream.width, "height": stream.height}
        frames = list(container.decode(stream))
        times = np.array([frame.pts for frame in frames]) * float(stream.time_base)
        pixels = [np.rot90(f.to_ndarray(format="rgb24", **size), round(f.rotation / 90)) for f in frames]
    return times - times[0], pixels, float(stream.time_base) / 2


def check(path: Path, sampling: Sampling, max_processes: int | None, **arguments: int) -> int:
    """Compare all sampled frames; the number of processes that were there."""
    times_s, pixels, tolerance_s = decode_all(path)
    before = psutil.Process().children()
    with VideoReader(path, sampling, VideoLimits(max_processes=max_processes), **arguments) as reader:
        number = arguments.get("first_frame", 0)
        most = 0
        for frames in reader:
            most = max(most, len([child for child in psutil.Process().children() if child not in before]))
            for time_s, frame in zip(frames.times_s, frames.pixels, strict=True):
                assert time_s == number * reader.info.interval_s
                shown = np.searchsorted(times_s, time_s + tolerance_s, side="right") - 1
                assert np.array_equal(frame, pixels[shown]), (number, time_s)
                number += 1
        assert number == reader.info.num_frames
    return most


@pytest.mark.parametrize("name", CLIPS)
def test_all_frames_are_those_of_plain_decoding(clips: Clips, name: str) -> None:
    suffix, arguments = CLIPS[name]
    path = clips(suffix, **arguments).path
    check(path, Sampling(3.0), 1)
    check(path, Sampling(7.3), 3)
    check(path, Sampling(1.0, max_frames=3), 2)
