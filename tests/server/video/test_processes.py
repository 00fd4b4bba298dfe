"""Several processes that decode one video: the frames are those of plain decoding, whatever is skipped."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from clips import CLIPS, SLOW_X264, Clips, blank_media, remux, trim, write_clip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.video.errors import DecoderCrashed, VideoCancelled, VideoDamaged, VideoError, VideoTimeout, VideoTooLarge
from server.video.process import DECODER_COMMAND
from server.video.reader import Sampling, VideoLimits, VideoReader


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    process = psutil.Process()
    num_fds, num_threads, others = process.num_fds(), threading.active_count(), process.children(recursive=True)
    yield
    assert [child for child in process.children(recursive=True) if child not in others] == []
    # A live server of other tests may close a connection in the meantime.
    assert process.num_fds() <= num_fds and threading.active_count() <= num_threads


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
    check(path, Sampling(40.0, max_frames=23), 3)


MANY = {"gop": 6, "bframes": 3, "duration_s": 8.0, "options": SLOW_X264}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0.3, 12), st.none() | st.integers(1, 30), st.floats(0, 0.99), st.integers(1, 4))
def test_any_sampling(clips: Clips, fps: float, max_frames: int | None, start: float, max_processes: int) -> None:
    path, sampling = clips("mp4", **MANY).path, Sampling(fps, max_frames)
    first_frame = int(start * sampling.grid(8.0)[0])
    check(path, sampling, max_processes, first_frame=first_frame)


@pytest.mark.parametrize("arguments", [{"gop": 5}, {"gop": 8, "bframes": 2, "options": SLOW_X264}], ids=str)
def test_beside_an_edit_list(tmp_path: Path, arguments: dict[str, object]) -> None:
    path = write_clip(tmp_path / "clip.mp4", **arguments).path
    trim(path, 1.3, 3.6)
    assert check(path, Sampling(8.0), 3) == 3


def test_a_recording_without_an_index(clips: Clips, tmp_path: Path) -> None:
    remux(clips("mkv", gop=6).path, tmp_path / "live.mkv", live="1")
    assert check(tmp_path / "live.mkv", Sampling(5.0), 3) == 3


@pytest.mark.parametrize(("name", "expected"), [("h264-mp4", 2), ("gop-250", 2), ("single-frame", 1), ("vfr-mp4", 1)])
def test_as_many_processes_as_there_are_keyframes(clips: Clips, name: str, expected: int) -> None:
    suffix, arguments = CLIPS[name]
    assert check(clips(suffix, **arguments).path, Sampling(4.0), 4) == expected


def test_a_small_video_takes_one_process(clips: Clips) -> None:
    assert check(clips("mp4", **MANY).path, Sampling(4.0), None) == 1


# The real decoder process, of which all but the first misbehave at their frame number 3.
MISBEHAVE = """
import importlib.util, json, os, sys, time
spec = importlib.util.spec_from_file_location("worker", sys.argv.pop(1))
worker = sys.modules["worker"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
real, count = worker.Decoder.decode, 0
def decode(self, *arguments):
    global count
    count += 1
    if count > 3 and not json.loads(sys.argv[1])["is_first"]:
        {deed}
    return real(self, *arguments)
worker.Decoder.decode = decode
worker.main()
"""


def misbehaving(deed: str) -> list[str]:
    return [sys.executable, "-c", MISBEHAVE.format(deed=deed), DECODER_COMMAND[-1]]


def read_all(path: Path, *, command: list[str] | None = None, **limits: float) -> int:
    limits = {"max_processes": 3, "stall_s": 20.0, **limits}
    arguments = {"command": command} if command else {}
    with VideoReader(path, Sampling(10.0), VideoLimits(**limits), batch_nbytes=1, **arguments) as reader:
        return sum(len(frames) for frames in reader)


@pytest.mark.parametrize(
    ("deed", "limits", "error"),
    [
        ("time.sleep(600)", {"stall_s": 1.5}, VideoTimeout),
        ("time.sleep(0.4)", {"wall_clock_s": 1.5}, VideoTimeout),
        ("os.abort()", {}, DecoderCrashed),
        ("raise worker.Refused('VideoDamaged', 'damaged')", {}, VideoDamaged),
    ],
)
def test_one_process_among_others_fails(
    clips: Clips, deed: str, limits: dict[str, float], error: type[VideoError]
) -> None:
    with pytest.raises(error) as refusal:
        read_all(clips("mp4", **MANY).path, command=misbehaving(deed), **limits)
    assert type(refusal.value) is error


def test_a_process_whose_part_of_the_memory_is_too_small_makes_way_for_one_with_all_of_it(clips: Clips) -> None:
    assert read_all(clips("mp4", **MANY).path, command=misbehaving("raise MemoryError")) == 80


def test_memory_is_limited_for_all_together(clips: Clips) -> None:
    path = clips("mp4", codec="hevc", width=1920, height=1080, fps=5.0, duration_s=4.0, gop=5).path
    with pytest.raises(VideoTooLarge, match="memory"):
        read_all(path, memory_nbytes=96 << 20)


# As if there were many cores: threads that a library starts by itself take more than a part of the memory.
LARGE_STACKS = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_STACK, (1 << 30, resource.getrlimit(resource.RLIMIT_STACK)[1]))
os.execv(sys.executable, [sys.executable, "-I", *sys.argv[1:]])
"""


def test_one_of_several_starts_no_threads(clips: Clips) -> None:
    command = [sys.executable, "-c", LARGE_STACKS, DECODER_COMMAND[-1]]
    assert read_all(clips("mp4", **MANY).path, command=command, memory_nbytes=1 << 30) == 80


def test_no_room_for_a_thread_is_no_damage(clips: Clips) -> None:
    command = [sys.executable, "-c", LARGE_STACKS, DECODER_COMMAND[-1]]
    with pytest.raises(VideoTooLarge, match="memory"):
        read_all(clips("mp4", **MANY).path, command=command, memory_nbytes=1 << 30, max_processes=1)


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_damage_is_reported_where_it_is(tmp_path: Path, fraction: float) -> None:
    path = write_clip(tmp_path / "clip.mp4", gop=5, duration_s=8.0).path
    blank_media(path, fraction)
    messages = []
    for max_processes in (1, 3):
        with pytest.raises(VideoDamaged) as refusal:
            read_all(path, max_processes=max_processes)
        messages.append(refusal.value.message)
    assert messages[0] == messages[1]


def test_closing_ends_all_processes(clips: Clips) -> None:
    others = psutil.Process().children()
    limits = VideoLimits(max_processes=4)
    path = clips("mp4", **MANY).path
    with VideoReader(path, Sampling(10.0), limits, command=misbehaving("time.sleep(600)"), batch_nbytes=1) as reader:
        frames = iter(reader)
        next(frames)
        children = [child for child in psutil.Process().children() if child not in others]
        assert len(children) == 4
        timer = threading.Timer(0.3, reader.close)
        timer.start()
        with pytest.raises(VideoCancelled):
            list(frames)
        timer.join()
    assert not any(child.is_running() for child in children)
