from __future__ import annotations

import hashlib

import av
import pytest

from server.bench.long_video import MOST_FILES, write_long_videos


def test_every_file_is_as_long_as_asked_and_holds_something_else(tmp_path):
    files = {tmp_path / "long.mp4": 2, tmp_path / "a.mp4": 1, tmp_path / "b.mp4": 1}
    write_long_videos(files, 64, 48, 5)
    digests = set()
    for path, minutes in files.items():
        digest = hashlib.sha256()
        with av.open(str(path)) as container:
            frames = [(frame.pts * frame.time_base, frame) for frame in container.decode(video=0)]
        times_s = [float(time_s) for time_s, _ in frames]
        assert times_s == pytest.approx([number / 5 for number in range(300 * minutes)])
        digest.update(b"".join(frame.to_ndarray().tobytes() for _, frame in frames[:300]))
        digests.add(digest.digest())
    assert len(digests) == 3


def test_no_more_files_than_differ(tmp_path):
    files = {tmp_path / f"{number}.mp4": 1 for number in range(MOST_FILES + 1)}
    with pytest.raises(ValueError, match="at most 30 different videos"):
        write_long_videos(files, 64, 48, 5)
    assert list(tmp_path.iterdir()) == []
