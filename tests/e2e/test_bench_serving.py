"""``x2l bench serving`` at its smallest, against servers of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from server.bench.serving import run
from server.cli import app as x2l


def test_it_measures_every_row_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_FPS", 5)  # quicker to make
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the servers: tests share the cores
    arguments = ["--minutes", "2", "--load-minutes", "1", "--videos", "1", "--concurrency", "2", "--repeats", "1"]
    arguments += [
        "--batches",
        "1,2",
        "--kv-tokens",
        "100,2000,3000",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out.json"),
    ]
    ran = CliRunner().invoke(x2l, ["bench", "serving", *arguments])
    assert ran.exit_code == 0, ran.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert not list(tmp_path.glob("x2l-*"))
    assert {"command", "cpu", "versions", "model_sha256", "paces", "disk_gb_s", "sizes", "plan"} <= set(result)
    follow_up = {row["tier"]: row for row in result["follow_up"]}
    assert set(follow_up) == {"memory", "disk"}
    for tier, row in follow_up.items():
        assert row["from_tier"] == 1.0, tier  # each question has read its L-KVs from there
        assert row["reload_bytes"] > 0 and row["whole_low_chunks"] == [4, 4]
    few, whole = result["decode"][:2], result["decode"][2:]  # nothing has 2,000 KV tokens, and still less 3,000
    assert [(row["batch"], row["full"]) for row in few] == [(row["batch"], row["full"]) for row in whole]
    assert [(row["batch"], row["full"]) for row in few] == [(1, True), (2, True)]
    assert all(100 >= row["kv_tokens"] > 50 for row in few)
    assert {(row["asked_kv_tokens"], row["all_kv_tokens"]) for row in whole} == {(2000, True)}
    assert ran.stdout.count("2000 were asked for") == 2 and "no video has more than" in ran.stderr
    assert result["load"]["failures"] == 0
    assert 0.9 < result["resident"]["over_floor"] < 3  # the prefix of so short a video counts
    assert "full-KV prefix caching" in ran.stdout and len(ran.stdout.splitlines()) == len(result["table"]) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "x"], "not a list of numbers"),
        (["--batches", ""], "numbers from 1 on"),
        (["--videos", "99"], "at most 29 videos"),
        (["--minutes", "0"], "minutes"),
    ],
)
def test_bad_sizes_are_one_line(arguments: list[str], message: str) -> None:
    ran = CliRunner().invoke(x2l, ["bench", "serving", *arguments])
    assert ran.exit_code in (1, 2)
    assert message in " ".join(ran.stderr.split())


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("missing", None, "there is no folder of this name"),
        ("empty", "", "there is no config.json"),
        ("other", '{"model_type": "bert"}', "has the architecture bert"),
    ],
)
def test_a_model_that_cannot_be_had_is_told_before_videos_are_made(
    tmp_path: Path, name: str, config: str | None, message: str
) -> None:
    folder = tmp_path / name
    if config is not None:
        folder.mkdir()
    if config:
        (folder / "config.json").write_text(config)
    ran = CliRunner().invoke(x2l, ["bench", "serving", "--model", str(folder)])
    assert ran.exit_code == 1
    assert ran.stderr.startswith("x2l: ") and ran.stderr.count("\n") == 1 and message in ran.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_told_before_videos_are_made() -> None:
    ran = CliRunner().invoke(x2l, ["bench", "serving", "--device", "cuda"])
    assert (ran.exit_code, ran.stderr) == (1, "x2l: device 'cuda' was asked for, but no CUDA device is available\n")
