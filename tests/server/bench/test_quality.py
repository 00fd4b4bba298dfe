"""The whole harness on a tiny video, in this process and as a command that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from compression.select import Dial
from server.bench.grade import named_objects
from server.bench.local import LocalBench, LocalVideo
from server.bench.methods import METHODS
from server.bench.plot import PlotUnavailable, draw
from server.bench.quality import Target, num_errors, run_quality
from server.bench.records import Record, open_folder
from server.bench.rows import choose_methods
from server.bench.run import jobs_left
from server.bench.synthetic import choose_videos
from server.bench.workers import run_jobs
from server.models.registry import load_model
from server.models.tiny.make_video import make_video

SEED, CHUNKS = 77, 2
SOME = ("low", "high", "uniform-*", "attention-[12]", "cosine-6", "oracle", "random", "stride")


@pytest.fixture(scope="module")
def videos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for video in choose_videos(SEED, {CHUNKS: 2}):
        make_video(folder / video.filename, video.seed, video.chunks)
    return folder


def run(
    out: Path, videos_folder: Path, *patterns: str, count: int = 1, plot: bool = False, workers: int = 1
) -> tuple[dict[str, Any], str]:
    """The result, and what was printed."""
    printed = StringIO()
    result = run_quality(
        {CHUNKS: count},
        patterns,
        Target(device="cpu", workers=workers),
        seed=SEED,
        out=out,
        videos_folder=videos_folder,
        plot=plot,
        console=Console(file=printed, width=190),
    )
    return result, printed.getvalue()


def records_of(out: Path) -> list[Record]:
    with open_folder(out, json.loads((out / "run.json").read_text())) as folder:
        return folder.records


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, videos_folder: Path) -> tuple[Path, dict[str, Any], str]:
    out = tmp_path_factory.mktemp("quality") / "run"
    return out, *run(out, videos_folder, *SOME, plot=True)


def test_table_json_and_plot(whole: tuple[Path, dict[str, Any], str]) -> None:
    out, result, printed = whole
    (length,) = result["lengths"]
    (video,) = choose_videos(SEED, {CHUNKS: 1})
    assert (length["chunks"], length["videos"], num_errors(result)) == (CHUNKS, 1, 0)
    assert set(length["methods"]) == {method.name for method in choose_methods(SOME, METHODS)}
    assert {row["accuracy"]["asked"] for row in length["methods"].values()} == {len(video.questions)}
    assert json.loads((out / "quality.json").read_text())["lengths"] == result["lengths"]
    assert all(name in printed for name in length["methods"])
    with Image.open(out / "quality.png") as picture:
        assert picture.width > 800 and picture.height > 500


def test_rows_that_must_agree_do(whole: tuple[Path, dict[str, Any], str]) -> None:
    replies: dict[str, list[str]] = {}
    for record in records_of(whole[0]):
        replies.setdefault(record.method, []).append(record.reply)
    # With all of two chunks re-loaded, whoever chose them.
    assert replies["low"] == replies["attention-2"] == replies["cosine-6"] == replies["oracle"] == replies["random"]
    methods = whole[1]["lengths"][0]["methods"]
    assert methods["low"]["kv_tokens"] == methods["attention-2"]["kv_tokens"] > methods["attention-1"]["kv_tokens"]
    assert methods["high"]["kv_tokens"] < methods["uniform-16"]["kv_tokens"] < methods["uniform-4"]["kv_tokens"]
    assert methods["attention-2"]["span_recall"] == 1.0
    assert methods["attention-2"]["contained"]["share"] == 1.0
    assert methods["stride"]["kv_tokens"] == methods["attention-2"]["kv_tokens"]  # the same budget


def test_a_second_run_asks_nothing_and_says_the_same(
    whole: tuple[Path, dict[str, Any], str], videos_folder: Path
) -> None:
    out, result, _ = whole
    before = (out / "records.jsonl").read_bytes()
    again, _ = run(out, videos_folder, *SOME)
    assert again["lengths"] == result["lengths"]
    assert (out / "records.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def opened(videos_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalVideo]:
    (video,) = choose_videos(SEED, {CHUNKS: 1})
    load, work = partial(load_model, device="cpu"), tmp_path_factory.mktemp("bench") / "work"
    with LocalBench(load, load(), work) as bench, bench.open(videos_folder / video.filename) as local:
        yield local
    assert not work.exists()


def test_direct_decoding_says_what_the_engine_says(opened: LocalVideo) -> None:
    texts = [question.text for question in choose_videos(SEED, {CHUNKS: 1})[0].questions]
    for mode, ratio in (("low", opened.model.spec.low_ratio), ("high", opened.model.spec.high_ratio)):
        through_engine = opened.ask([(text, Dial(mode=mode)) for text in texts])
        cache = opened.decoder.cache(opened.uniform(ratio))
        directly = opened.decoder.decode(texts, [cache] * len(texts))
        assert [reply.text for reply in directly] == [reply.text for reply in through_engine]
        assert {reply.kv_tokens for reply in directly} == {reply.kv_tokens for reply in through_engine}
        assert {reply.kv_nbytes for reply in directly} == {reply.kv_nbytes for reply in through_engine}
    assert len(opened.low) == len(opened.high) == len(opened.raw) == CHUNKS


def test_every_method_answers(opened: LocalVideo) -> None:
    questions = choose_videos(SEED, {CHUNKS: 1})[0].questions[:2]
    for method in METHODS:
        replies = method.answer(opened, questions)
        assert [reply.error for reply in replies] == [None, None], method.name
        assert all(reply.kv_tokens and reply.kv_nbytes for reply in replies), method.name
        if method.at_default and method.name not in ("oracle", "int8", "high-memory"):
            budget = opened.default_tokens + opened.model.prefix().num_tokens
            assert all(reply.kv_tokens <= budget for reply in replies), method.name


def test_scores_are_the_engines_own(opened: LocalVideo) -> None:
    text = "What code is on the red star?"
    assert opened.scores([text]) == [opened.ask([(text, Dial())])[0].scores]
    own = opened.score_over(text, opened.high, opened.model.scorer)
    assert own == pytest.approx(opened.scores([text])[0], abs=1e-5)


def test_a_union_begins_with_the_chunk_of_the_first_object(opened: LocalVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "default_reload", 1)
    order = next(one for one in choose_videos(SEED, {CHUNKS: 1})[0].questions if one.type == "order")
    (union,) = choose_methods(["union"], METHODS)
    names = named_objects(order.text)
    for one, two in (names, names[::-1]):
        (scores,) = opened.scores([f"When does the {one} first appear?"])
        (reply,) = union.answer(opened, [replace(order, text=f"Which came first, the {one} or the {two}?")])
        assert reply.reloaded == (scores.index(max(scores)),)
        assert reply.scores == () and reply.times_ms["score"] > 0


def test_an_error_is_asked_again_and_nothing_else(
    whole: tuple[Path, dict[str, Any], str], tmp_path: Path, videos_folder: Path
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "run")
    with open_folder(out, json.loads((out / "run.json").read_text())) as folder:
        lost = next(record for record in folder.records if record.method == "high")
        folder.add([replace(lost, error="APIError: lost", right=False)])
    before = records_of(out)
    result, printed = run(out, videos_folder, *SOME)
    assert "100%" in printed
    assert num_errors(result) == 0
    after = {record.key: record for record in records_of(out)}
    assert after[lost.key].reply == lost.reply and after[lost.key].error is None
    assert all(after[record.key] == record for record in before if record.key != lost.key)


def test_a_video_that_cannot_be_used_is_an_error_of_its_questions(tmp_path: Path, videos_folder: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for file in videos_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    bad, good = choose_videos(SEED, {CHUNKS: 2})
    (folder / bad.filename).write_bytes(b"no video at all")
    result, _ = run(tmp_path / "run", folder, "high", count=2)
    assert num_errors(result) == len(bad.questions)
    assert result["lengths"][0]["methods"]["high"]["accuracy"]["asked"] == len(bad.questions) + len(good.questions)
    (error,) = {record.error for record in records_of(tmp_path / "run") if record.seed == bad.seed}
    assert error is not None and "video" in error


def test_killed_and_run_again(tmp_path: Path, videos_folder: Path, whole: tuple[Path, dict[str, Any], str]) -> None:
    out, methods = tmp_path / "run", ("high", "low")
    command = [sys.executable, "-m", "server", "bench", "quality", "--seed", str(SEED), "--chunks", str(CHUNKS)]
    command += ["--videos", "2", "--methods", ",".join(methods), "--no-plot", "--device", "cpu"]
    command += ["--out", str(out), "--videos-dir", str(videos_folder)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("X2L_")}
    records = out / "records.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=kept) as process:
        end_s = time.monotonic() + 120
        while not (records.exists() and records.stat().st_size) and time.monotonic() < end_s:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    first = records.read_bytes()
    num_questions = sum(len(video.questions) for video in choose_videos(SEED, {CHUNKS: 2}))
    assert 0 < len(first.splitlines()) < num_questions * len(methods)
    assert not (out / "quality.json").exists()
    result, _ = run(out, videos_folder, *methods, count=2)
    assert num_errors(result) == 0
    assert not (out / "work").exists()  # what the killed one had left is gone as well
    assert records.read_bytes().startswith(first[: first.rfind(b"\n") + 1])
    assert len(records.read_bytes().splitlines()) == num_questions * len(methods)
    # The first video is that of the run that nothing has interrupted.
    uninterrupted = {record.key: record.reply for record in records_of(whole[0]) if record.method in methods}
    resumed = {record.key: record.reply for record in records_of(out)}
    assert uninterrupted.items() <= resumed.items()


def test_workers_share_the_videos_and_say_the_same(
    whole: tuple[Path, dict[str, Any], str], tmp_path: Path, videos_folder: Path
) -> None:
    missing = tmp_path / "videos"  # so that they make the videos themselves
    result, printed = run(tmp_path / "run", missing, "high", "attention-1", count=2, workers=2)
    assert num_errors(result) == 0 and "100%" in printed
    replies = {record.key: record.reply for record in records_of(tmp_path / "run")}
    assert {seed for _, _, seed, _ in replies} == {video.seed for video in choose_videos(SEED, {CHUNKS: 2})}
    alone = {record.key: record.reply for record in records_of(whole[0]) if record.method in ("high", "attention-1")}
    assert alone.items() <= replies.items()
    assert not (tmp_path / "run" / "work").exists()
    assert {file.name for file in missing.iterdir()} == {file.name for file in videos_folder.iterdir()}


def test_stopping_workers_keeps_what_they_said(tmp_path: Path, videos_folder: Path) -> None:
    load = partial(load_model, device="cpu")
    videos = choose_videos(SEED, {CHUNKS: 2})
    with open_folder(tmp_path / "run", {}) as folder:
        jobs = jobs_left(folder, videos, choose_methods(["high", "low", "random"], METHODS))
        answered = run_jobs(load, 2, videos_folder, tmp_path / "work", jobs)
        job, name, records = next(answered)
        folder.add(records)
        answered.close()
        assert not (tmp_path / "work").exists()
        left = {
            one.video: one.left for one in jobs_left(folder, videos, choose_methods(["high", "low", "random"], METHODS))
        }
    assert name in job.left and name not in left[job.video]
    assert sum(map(len, left.values())) == 5


def test_bad_requests_are_one_line(tmp_path: Path, videos_folder: Path) -> None:
    with pytest.raises(ValueError, match="no method is called 'nothing'"):
        run(tmp_path / "run", videos_folder, "nothing")
    with pytest.raises(ValueError, match="no videos"):
        run_quality(
            {}, (), Target(), seed=0, out=tmp_path, videos_folder=tmp_path, plot=False, console=Console(quiet=True)
        )
    assert not (tmp_path / "run").exists()


def test_without_matplotlib_the_run_does_not_begin(
    tmp_path: Path, videos_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotUnavailable, match=r"video-x2l-server\[bench\]"):
        run(tmp_path / "run", videos_folder, plot=True)
    assert not (tmp_path / "run").exists()


def test_the_plot_bears_missing_rows(whole: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    (length,) = whole[1]["lengths"]
    only = {name: length["methods"][name] for name in ("low", "cosine-6")}
    draw([length, {"chunks": 9, "videos": 1, "methods": only}], "attention-2", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
