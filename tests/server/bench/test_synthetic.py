"""Which videos a run takes, and how their files come about."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest

from server.bench.synthetic import FIRST_SEED, SyntheticVideo, choose_videos, making
from server.models.tiny.world import FIRST_TRAINING_SEED


def test_a_seed_names_the_videos() -> None:
    chosen = choose_videos(3, {16: 20, 8: 5})
    assert chosen == choose_videos(3, {8: 5, 16: 20})
    assert [video.chunks for video in chosen] == [8] * 5 + [16] * 20
    assert len(set(chosen)) == 25
    assert all(FIRST_SEED <= video.seed < FIRST_TRAINING_SEED for video in chosen)
    assert not set(chosen) & set(choose_videos(4, {16: 20, 8: 5}))
    assert choose_videos(3, {8: 9})[:5] == chosen[:5]  # a larger run begins with the smaller one's
    assert choose_videos(3, {}) == []


def test_missing_videos_are_made_and_kept(tmp_path: Path) -> None:
    video, impossible = SyntheticVideo(chunks=1, seed=12345), SyntheticVideo(chunks=1, seed=-1)
    with making([impossible, video], tmp_path, 1) as path_of:
        path = path_of(video)
        with pytest.raises(ValueError, match="seed must lie in"):
            path_of(impossible)
    assert video.is_made(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([path, path.with_suffix(".json")])
    before = path.stat().st_mtime_ns
    with making([video], tmp_path) as path_of:
        assert path_of(video) == path
    assert path.stat().st_mtime_ns == before
    assert [question.index for question in video.questions] == list(range(len(video.questions)))
    exam = json.loads(path.with_suffix(".json").read_text())
    assert [question.text for question in video.questions] == [one["question"] for one in exam["questions"]]


@pytest.mark.parametrize("damage", ["other questions", "no JSON", "no video"])
def test_a_file_of_another_generator_does_not_count(tmp_path: Path, damage: str) -> None:
    video = SyntheticVideo(chunks=1, seed=12345)
    path = tmp_path / video.filename
    exam = {"questions": video.exam if damage != "other questions" else video.exam[1:]}
    path.with_suffix(".json").write_text("{" if damage == "no JSON" else json.dumps(exam))
    if damage != "no video":
        path.touch()
    assert not video.is_made(tmp_path)


def test_leaving_early_ends_the_making_and_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with making([SyntheticVideo(chunks=100, seed=1)], tmp_path):
        while not list(tmp_path.glob("*/*.part")):
            time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_a_maker_that_is_killed_is_told_of(tmp_path: Path) -> None:
    others = multiprocessing.active_children()
    video = SyntheticVideo(chunks=100, seed=1)
    with making([video], tmp_path) as path_of:
        while not list(tmp_path.glob("*/*.part")):
            time.sleep(0.01)
        (maker,) = [child for child in multiprocessing.active_children() if child not in others]
        maker.kill()
        with pytest.raises(BrokenProcessPool):
            path_of(video)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_was_at_goes_with_the_next(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from server.bench.synthetic import SyntheticVideo, making\n"
        "if __name__ == '__main__':\n"
        f"    with making([SyntheticVideo(chunks=100, seed=1)], Path({str(tmp_path)!r})):\n"
        "        input()\n"
    )
    script = tmp_path.with_suffix(".py")
    script.write_text(program)
    with subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("*/*.part")):
            time.sleep(0.01)
        makers = psutil.Process(process.pid).children()
        process.kill()
    assert makers and not psutil.wait_procs(makers, timeout=30)[1], "none lives on"
    video = SyntheticVideo(chunks=1, seed=2)
    with making([video], tmp_path, 1) as path_of:
        path = path_of(video)
    assert path.is_file()
    assert not [left for left in tmp_path.iterdir() if left.is_dir()]
