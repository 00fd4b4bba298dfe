"""The trained tiny Qwen2.5-VL: served through the adapter as it is, it answers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from server.bench.grade import is_right
from server.bench.local import LocalBench
from server.bench.rows import choose_methods, methods_here
from server.bench.synthetic import SyntheticVideo
from server.models.registry import load_model
from server.models.tiny.make_video import make_video

ASSET = Path(__file__).parent.parent / "assets" / "tiny-qwen2_5-vl"


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in ASSET.iterdir()) < 25e6


def test_it_answers_from_uncompressed_kvs(tmp_path: Path) -> None:
    video = SyntheticVideo(4, 1234)
    make_video(tmp_path / video.filename, video.seed, video.chunks)
    load = partial(load_model, str(ASSET), device="cpu")
    model = load()
    (raw,) = choose_methods(["raw"], methods_here(model))
    with LocalBench(load, model, tmp_path / "work") as bench, bench.open(tmp_path / video.filename) as opened:
        replies = raw.answer(opened, video.questions)
    right = [is_right(one.type, one.answer, reply.text) for one, reply in zip(video.questions, replies, strict=True)]
    assert sum(right) >= 0.8 * len(right)
