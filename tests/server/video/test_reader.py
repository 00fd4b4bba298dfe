"""Decoding real clips: which moment each sampled frame really shows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from clips import CLIPS, SLOW_X264, Clip, Clips, read_time_s, remux, trim, write_clip

from server.video.process import DECODER_COMMAND
from server.video.reader import Sampling, VideoInfo, VideoLimits, VideoReader


def read(path: Path, sampling: Sampling, **arguments: object) -> tuple[VideoInfo, list[float], list[float]]:
    """The info, the grid's instants and the times that the decoded frames carry."""
    times_s: list[float] = []
    shown_s: list[float] = []
    with VideoReader(path, sampling, VideoLimits(), **arguments) as reader:
        for frames in reader:
            assert frames.pixels.dtype == np.uint8
            assert frames.pixels.shape == (len(frames), reader.info.height, reader.info.width, 3)
            times_s += frames.times_s.tolist()
            shown_s += [read_time_s(pixels) for pixels in frames.pixels]
        return reader.info, times_s, shown_s


def check(clip: Clip, sampling: Sampling, **arguments: object) -> VideoInfo:
    info, times_s, shown_s = read(clip.path, sampling, **arguments)
    assert (info.width, info.height) == (clip.width, clip.height)
    assert info.duration_s == pytest.approx(clip.duration_s, abs=0.002)
    assert info.num_frames == len(times_s) == sampling.grid(info.duration_s)[0]
    assert times_s == pytest.approx([n * info.interval_s for n in range(len(times_s))])
    assert shown_s == pytest.approx([clip.time_on_screen_s(time_s) for time_s in times_s], abs=0.0006)
    return info


@pytest.mark.parametrize("name", CLIPS)
def test_each_sampled_frame_is_the_one_on_screen(clips: Clips, name: str) -> None:
    suffix, arguments = CLIPS[name]
    clip = clips(suffix, **arguments)
    check(clip, Sampling(7.3), num_threads=1)


@pytest.mark.parametrize(
    "name",
    ["h264-mp4", "open-gop-h264", "open-gop-hevc", "hidden-reference-frames", "gop-250", "vfr-mkv", "rotated-90"],
)
def test_reading_from_a_later_frame_gives_the_same_frames(clips: Clips, name: str) -> None:
    suffix, arguments = CLIPS[name]
    path, sampling = clips(suffix, **arguments).path, Sampling(3.0)
    with VideoReader(path, sampling, VideoLimits()) as reader:
        whole, info = list(reader), reader.info
    for first in (1, info.num_frames // 2, info.num_frames - 1):
        with VideoReader(path, sampling, VideoLimits(), first_frame=first) as reader:
            assert reader.info == info
            rest = list(reader)
        assert np.array_equal(
            np.concatenate([f.times_s for f in rest]), np.concatenate([f.times_s for f in whole])[first:]
        )
        assert np.array_equal(
            np.concatenate([f.pixels for f in rest]), np.concatenate([f.pixels for f in whole])[first:]
        )


@pytest.mark.parametrize(("start_s", "end_s"), [(1.5, 4.0), (0.0, 2.0), (1.3, 2.6)])
@pytest.mark.parametrize(
    "arguments", [{}, {"bframes": 2, "options": SLOW_X264}, {"codec": "hevc", "bframes": 3}], ids=str
)
def test_an_edit_list_hides_what_was_cut_away(
    tmp_path: Path, arguments: dict[str, object], start_s: float, end_s: float
) -> None:
    clip = write_clip(tmp_path / "clip.mp4", **arguments)
    trim(clip.path, start_s, end_s)
    info, times_s, shown_s = read(clip.path, Sampling(4.0))
    assert info.duration_s == pytest.approx(end_s - start_s, abs=0.11)
    first_s = clip.time_on_screen_s(start_s)
    assert shown_s == pytest.approx([clip.time_on_screen_s(first_s + time_s) for time_s in times_s])


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_honoured_beside_an_edit_list(tmp_path: Path, rotation: int) -> None:
    clip = write_clip(tmp_path / "clip.mp4", rotation=rotation, width=240, height=320)
    trim(clip.path, 1.0, 3.0)
    info, _, shown_s = read(clip.path, Sampling(2.0))
    assert (info.width, info.height) == (240, 320)
    assert shown_s == [1.0, 1.5, 2.0, 2.5]


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "h264"), ("webm", "vp9")])
@pytest.mark.parametrize("max_frames", [None, 5])
def test_a_recording_without_duration_or_index(
    clips: Clips, tmp_path: Path, suffix: str, codec: str, max_frames: int | None
) -> None:
    clip = clips(suffix, codec=codec, gop=7)
    remux(clip.path, tmp_path / f"live.{suffix}", live="1")
    check(replace(clip, path=tmp_path / f"live.{suffix}"), Sampling(3.0, max_frames))


@pytest.mark.parametrize(
    "flags", ["frag_keyframe+empty_moov", "frag_keyframe+empty_moov+default_base_moof+global_sidx"]
)
def test_fragmented_mp4(clips: Clips, tmp_path: Path, flags: str) -> None:
    clip = clips("mp4")
    remux(clip.path, tmp_path / "fragmented.mp4", movflags=flags)
    check(replace(clip, path=tmp_path / "fragmented.mp4"), Sampling(5.0))


def test_a_video_shorter_than_one_interval_gives_one_frame(clips: Clips) -> None:
    info = check(clips("mp4", duration_s=2.0), Sampling(0.1))
    assert info.num_frames == 1


def test_batches_are_bounded_in_bytes(clips: Clips) -> None:
    clip = clips("mp4")
    frame_nbytes = clip.width * clip.height * 3
    with VideoReader(clip.path, Sampling(10), VideoLimits(), batch_nbytes=7 * frame_nbytes + 1) as reader:
        assert [len(frames) for frames in reader] == [7, 7, 7, 7, 7, 5]
    with VideoReader(clip.path, Sampling(1), VideoLimits(), batch_nbytes=1) as reader:
        assert [len(frames) for frames in reader] == [1, 1, 1, 1]


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "av1"])
def test_4k(clips: Clips, codec: str) -> None:
    options = {"svtav1-params": "lp=1", "preset": "12", "crf": "25"} if codec == "av1" else None
    clip = clips("mp4", codec=codec, width=3840, height=2160, fps=2.0, duration_s=2.0, options=options)
    check(clip, Sampling(1.0))


def test_one_hour_holds_a_few_frames_only(clips: Clips) -> None:
    clip = clips.hour()
    process = psutil.Process()
    before_nbytes, peak_nbytes = process.memory_info().rss, 0
    with VideoReader(clip.path, Sampling(1.0), VideoLimits(), batch_nbytes=4 << 20) as reader:
        assert reader.info.num_frames == 3600
        number = 0
        for frames in reader:
            for pixels in frames.pixels[::7]:
                read_time_s(pixels)
            assert read_time_s(frames.pixels[-1]) == frames.times_s[-1]
            number += len(frames)
            peak_nbytes = max(peak_nbytes, process.memory_info().rss)
    assert number == 3600
    assert peak_nbytes - before_nbytes < 64 << 20  # the whole hour is 622 MB of pixels


def test_few_frames_of_an_hour(clips: Clips) -> None:
    info = check(clips.hour(), Sampling(1.0, max_frames=16))
    assert info.interval_s == pytest.approx(225.0)


def test_the_decoder_process_imports_neither_torch_nor_this_project() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(sorted(sys.modules))"
    worker = DECODER_COMMAND[-1]
    modules = subprocess.run(
        [sys.executable, "-I", "-c", code, worker], capture_output=True, text=True, check=True
    ).stdout
    assert "'torch'" not in modules
    assert "'server'" not in modules
    assert "'av'" not in modules  # loaded only under the limits
