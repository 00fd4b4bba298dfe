"""The harness over a model that leaves compression to this server."""

from __future__ import annotations

import json
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_transformers import save_qwen2_5_vl

from server.bench.local import LocalBench
from server.bench.quality import Target, num_errors, run_quality
from server.bench.rows import EVERY_METHOD, methods_here
from server.bench.synthetic import choose_videos
from server.models.registry import load_model
from server.models.tiny.make_video import make_video

SEED, CHUNKS = 78, 2


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights never end an answer."""
    for module in ("decoder", "local"):
        monkeypatch.setattr(f"server.bench.{module}.MAX_TOKENS", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL with chunks of 32 s and 6 visual tokens for two frames."""
    folder = tmp_path_factory.mktemp("qwen")
    save_qwen2_5_vl(folder)
    config = json.loads((folder / "config.json").read_text())
    config["x2l"] = {"frames_per_chunk": 32, "frame_size": [24, 16], "low_ratio": 2, "high_ratio": 16}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def videos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for video in choose_videos(SEED, {CHUNKS: 1}):
        make_video(folder / video.filename, video.seed, video.chunks)
    return folder


def test_every_row_is_answered(folder: Path, videos_folder: Path, tmp_path: Path) -> None:
    (video,) = choose_videos(SEED, {CHUNKS: 1})
    load = partial(load_model, str(folder), device="cpu")
    model = load()
    tokens: dict[str, int] = {}
    with LocalBench(load, model, tmp_path / "work") as bench, bench.open(videos_folder / video.filename) as local:
        for method in methods_here(model):
            (reply,) = method.answer(local, video.questions[:1])
            assert reply.error is None, method.name
            tokens[method.name] = reply.kv_tokens
        raw = torch.cat([chunk.with_others(chunk.kv).keys for chunk in local.raw], dim=2)
        low = torch.cat([chunk.keys for chunk in local.prefilled(1, 1)[0]], dim=2)
        torch.testing.assert_close(raw, low)
    uncompressed = len(model.prompt.prefix_ids) + 2  # and what stands before and behind the video
    chunk = 16 * 6
    assert set(tokens) == {method.name for method in EVERY_METHOD} - {"plain"}
    assert tokens["raw"] == uncompressed + 2 * chunk
    for compressor in ("stride", "pool", "snap", "value-norm", "keydiff", "infinipot"):
        assert tokens[f"{compressor}-low"] == tokens["low"] == uncompressed + chunk
        assert tokens[f"{compressor}-high"] == tokens["high"] == uncompressed + 2 * chunk // 16
        assert tokens[f"{compressor}-uniform-4"] == uncompressed + 2 * chunk // 4
        assert tokens[f"{compressor}-bilevel-1"] == tokens["attention-1"] == uncompressed + chunk // 2 + chunk // 16
        assert tokens[f"{compressor}-bilevel"] == tokens[compressor] == tokens["attention-3"]


def test_a_run_with_a_table(folder: Path, videos_folder: Path, tmp_path: Path) -> None:
    def run(*patterns: str) -> tuple[dict[str, object], str]:
        printed = StringIO()
        result = run_quality(
            {CHUNKS: 1},
            patterns,
            Target(str(folder), device="cpu"),
            seed=SEED,
            out=tmp_path / "run",
            videos_folder=videos_folder,
            plot=True,
            console=Console(file=printed, width=190),
        )
        return result, printed.getvalue()

    result, printed = run("attention-1", "keydiff-bilevel-1", "keydiff-uniform-8", "keydiff-high")
    assert num_errors(result) == 0
    assert "keydiff-bilevel-1" in printed
    rows = result["lengths"][0]["methods"]  # type: ignore[index]
    assert [row["family"] for row in rows.values()] == [
        "attention",
        "keydiff-uniform",
        "keydiff-uniform",
        "keydiff-bilevel",
    ]
    assert rows["keydiff-bilevel-1"]["recall"]["1"] is not None


def test_chunks_of_another_length_are_refused(videos_folder: Path, tmp_path: Path) -> None:
    save_qwen2_5_vl(tmp_path / "model")
    target = Target(str(tmp_path / "model"), device="cpu")
    where = {"seed": SEED, "out": tmp_path / "run", "videos_folder": videos_folder, "plot": False}
    with pytest.raises(ValueError, match="chunks of the synthetic videos are 32 s long, those of model 16 s"):
        run_quality({CHUNKS: 1}, ["low"], target, console=Console(file=StringIO()), **where)
