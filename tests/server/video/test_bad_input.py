"""Files that are no videos, damaged videos, and videos over the limits: each a clear error, nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import psutil
import pytest
from clips import Clips, blank_media, draw_time, stretch_duration, truncate, write_clip, write_tone
from PIL import Image

from server.video.errors import NotAVideo, VideoDamaged, VideoError, VideoTooLarge, VideoUnsupported
from server.video.reader import Sampling, VideoLimits, VideoReader


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    process = psutil.Process()
    before, others = process.num_fds(), process.children()  # what other tests share
    yield
    assert [child for child in process.children() if child not in others] == []
    assert process.num_fds() <= before


def read_all(path: Path, sampling: Sampling | None = None, **limits: float) -> int:
    with VideoReader(path, sampling or Sampling(2.0), VideoLimits(**{"stall_s": 20.0, **limits})) as reader:
        return sum(len(frames) for frames in reader)


def refused(kind: type[VideoError], path: Path, match: str, **limits: float) -> VideoError:
    with pytest.raises(kind, match=match) as refusal:
        read_all(path, **limits)
    error = refusal.value
    assert type(error) is kind
    assert error.message == str(error)
    assert str(path.parent) not in error.message
    assert path.name not in error.message
    return error


def test_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"")
    refused(NotAVideo, path, "empty")
    path.write_text("once upon a time\n" * 100)
    refused(NotAVideo, path, "text")
    picture = Image.fromarray(draw_time(320, 180, 1.0))
    for image_format in ("JPEG", "PNG", "GIF", "WEBP"):
        with path.open("wb") as file:
            picture.save(file, image_format)
        refused(NotAVideo, path, "image")


@pytest.mark.parametrize("suffix", ["mp4", "m4a", "mkv", "wav"])
def test_sound_alone_is_no_video(tmp_path: Path, suffix: str) -> None:
    error = refused(NotAVideo, write_tone(tmp_path / f"tone.{suffix}"), "sound")
    assert error.code == "invalid_video"


def test_a_playlist_opens_no_other_file(clips: Clips, tmp_path: Path) -> None:
    shutil.copy(clips("mp4").path, tmp_path / "secret.mp4")
    for text in ("ffconcat version 1.0\nfile secret.mp4\n", "#EXTM3U\n#EXTINF:4,\nsecret.mp4\n#EXT-X-ENDLIST\n"):
        (tmp_path / "list.mp4").write_text(text)
        refused(NotAVideo, tmp_path / "list.mp4", "playlist")


def test_other_codecs_are_named(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuvj420p"
        for time_s in (0.0, 0.1):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_time(320, 180, time_s), format="rgb24")))
        container.mux(stream.encode(None))
    assert refused(VideoUnsupported, path, "mjpeg.*H.264, HEVC, VP8, VP9, AV1").code == "unsupported_video"


def damaged(path: Path, arguments: dict[str, object], damage: Callable[[Path], None]) -> Path:
    write_clip(path, duration_s=10.0, **arguments)
    damage(path)
    return path


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    ("suffix", "arguments"),
    [
        ("mp4", {}),
        ("mp4", {"faststart": True}),
        ("mp4", {"faststart": True, "audio": True}),
        ("mkv", {}),
        ("webm", {"codec": "vp9"}),
    ],
    ids=str,
)
def test_a_truncated_video_is_damaged(
    tmp_path: Path, suffix: str, arguments: dict[str, object], fraction: float
) -> None:
    path = damaged(tmp_path / f"clip.{suffix}", arguments, lambda path: truncate(path, fraction))
    assert refused(VideoDamaged, path, "cut off|damaged").code == "video_damaged"


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "av1"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9])
def test_promised_frames_that_nobody_can_decode(tmp_path: Path, codec: str, fraction: float) -> None:
    path = damaged(tmp_path / "clip.mp4", {"codec": codec}, lambda path: blank_media(path, fraction))
    refused(VideoDamaged, path, "damaged")


def test_a_header_that_claims_more_than_its_tables_is_not_believed(tmp_path: Path) -> None:
    path = damaged(tmp_path / "clip.mp4", {}, lambda path: stretch_duration(path, 1000))
    with VideoReader(path, Sampling(1.0), VideoLimits()) as reader:
        assert reader.info.duration_s == pytest.approx(10.0)
        assert sum(len(frames) for frames in reader) == 10


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"max_nbytes": 1000}, "video_too_many_bytes"),
        ({"max_duration_s": 3.9}, "video_too_long"),
        ({"max_pixels": 320 * 180 - 1}, "video_too_many_pixels"),
        ({"max_frames": 7}, "video_too_many_frames"),
    ],
)
def test_over_a_limit(clips: Clips, limits: dict[str, float], code: str) -> None:
    assert refused(VideoTooLarge, clips("mp4").path, "at most|needs more", **limits).code == code


def test_at_the_limits(clips: Clips) -> None:
    path = clips("mp4").path
    limits = {"max_nbytes": path.stat().st_size, "max_duration_s": 4.0, "max_pixels": 320 * 180, "max_frames": 8}
    assert read_all(path, **limits) == 8


def test_memory_is_limited(clips: Clips) -> None:
    clip = clips("mp4", codec="h264", width=3840, height=2160, fps=2.0, duration_s=2.0, options=None)
    error = refused(VideoTooLarge, clip.path, "memory", memory_nbytes=128 << 20)
    assert error.code == "video_needs_too_much_memory"


def test_a_missing_file_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_all(tmp_path / "none.mp4")
