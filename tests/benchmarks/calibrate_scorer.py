"""Chooses a model's scoring heads: ``python tests/benchmarks/calibrate_scorer.py [--model M] [--out RESULT.json]``.

For every question about videos of seeds that no other benchmark uses, measures how much of each head's attention over
prefix and H-KVs lies on the chunks that hold the answer. Heads are added greedily, from the first ``--layers`` layers,
as long as the mean over question types of (recall@1 + recall@3) / 2 grows. The result goes into ``scorer_heads`` of
the model's config.json by hand. Compared: all heads, and the cosine of mean query and mean key.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import Video, circumstances, make_videos, parse_seeds, parser, to_json, write
from torch import Tensor

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from compression.score import AttentionScorer, CosineScorer
from server.bench.local import encode_video
from server.models.base import Row, Turn, VideoModel
from server.models.registry import load_model

MIN_GAIN = 1e-3


@dataclass(frozen=True)
class Sample:
    """One question with an answer in the video: the scores of every single head [layers, heads, chunks], and others."""

    type: str
    chunks: frozenset[int]
    heads: Tensor
    cosine: Tensor


def prefill(model: VideoModel, path: Path) -> list[ChunkKV]:
    """The H-KVs of a video file."""
    run, features = model.prefill(), encode_video(model, path)
    return [run.append(part, last=index == len(features) - 1)[1] for index, part in enumerate(features)]


def samples(model: VideoModel, videos: Sequence[Video]) -> list[Sample]:
    spec = model.spec
    single = [AttentionScorer(((layer, head),)) for layer in range(spec.num_layers) for head in range(spec.num_heads)]
    model.scorer = AttentionScorer()  # so that queries of all layers are traced
    found = []
    for video in videos:
        high = prefill(model, video.path)
        for question in video.questions:
            if not question["chunks"]:
                continue
            ids = torch.tensor(model.tokenize([Turn("user", question["question"])]))
            cache = MixedCache(model.prefix(), high, model.rope, room=len(ids))
            trace = model.trace([Row(ids, cache)])[0]
            scores = torch.stack([one.score(trace, cache, high, model.rope) for one in single])
            cosine = CosineScorer().score(trace, cache, high, model.rope)
            heads = scores.view(spec.num_layers, spec.num_heads, -1)
            found.append(Sample(question["type"], frozenset(question["chunks"]), heads, cosine))
    return found


def recall(found: Sequence[Sample], score: Callable[[Sample], Tensor]) -> dict[str, list[float]]:
    """Type -> recall@1, @2, @3: the share of the true chunks among the best."""
    per_type: dict[str, list[list[float]]] = defaultdict(list)
    for sample in found:
        order = score(sample).argsort(descending=True).tolist()
        shares = [len(sample.chunks & set(order[:k])) / min(k, len(sample.chunks)) for k in (1, 2, 3)]
        per_type[sample.type].append(shares)
    return {name: [round(fmean(column), 3) for column in zip(*rows, strict=True)] for name, rows in per_type.items()}


def value(table: dict[str, list[float]]) -> float:
    return fmean((first + third) / 2 for first, _, third in table.values())


def choose(found: Sequence[Sample], num_layers: int) -> list[dict[str, Any]]:
    """The greedy choice, a step an entry."""
    heads: list[tuple[int, int]] = []
    steps: list[dict[str, Any]] = []

    def mean_of(chosen: Sequence[tuple[int, int]]) -> Callable[[Sample], Tensor]:
        return lambda sample: torch.stack([sample.heads[layer, head] for layer, head in chosen]).mean(0)

    while True:
        left = [(layer, head) for layer in range(num_layers) for head in range(found[0].heads.shape[1])]
        tried = [(value(recall(found, mean_of([*heads, one]))), one) for one in left if one not in heads]
        best, one = max(tried)
        if steps and best < steps[-1]["value"] + MIN_GAIN:
            return steps
        heads.append(one)
        steps.append({"heads": list(heads), "value": round(best, 4), "recall": recall(found, mean_of(heads))})


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__, seeds="100-105")
    options.add_argument("--chunks", type=parse_seeds, default=[16, 64], help="of every seed, a video of each [16,64]")
    options.add_argument("--videos-dir", type=Path, help="keeps the videos, for another run")
    options.add_argument("--model", default="tiny", help="or a folder")
    options.add_argument("--layers", type=int, default=4, help="fewer layers make scoring cheaper [4]")
    given = options.parse_args()
    model = load_model(given.model, device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder = given.videos_dir or Path(temporary)
        videos = [video for chunks in given.chunks for video in make_videos(folder, given.seeds, chunks)]
        found = samples(model, videos)
    every, cosine = recall(found, lambda sample: sample.heads.mean((0, 1))), recall(found, lambda sample: sample.cosine)
    result = {
        **circumstances(given),
        "num_questions": len(found),
        "steps": choose(found, given.layers),
        "all heads": {"value": round(value(every), 4), "recall": every},
        "cosine": {"value": round(value(cosine), 4), "recall": cosine},
    }
    print(to_json(result))
    write(result, given.out)


if __name__ == "__main__":
    main()
