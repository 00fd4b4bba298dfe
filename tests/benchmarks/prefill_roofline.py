"""Where the time of prefill and of a first token goes: ``prefill_roofline.py --model FOLDER [--out RESULT.json]``.

The model alone, no server around it. Of the first chunks of a video of noise, and of chunks behind an hour's small
KVs: milliseconds of the vision tower and of the language model's passes, as a share of a plain matrix product's pace,
and what kinds of kernels the device ran meanwhile. Of questions of several lengths behind mixed caches: milliseconds of
the scoring pass and of the prompt's pass, read token by token as decoding does and in one piece.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_table, write
from decode_roofline import NUM_HIGH, NUM_LOW, NUM_PREFIX, gpu

from compression.segments import Part, RotatedKV, SharedCache
from server.bench.circumstances import circumstances
from server.bench.serving.hardware import measure_paces, synchronize
from server.bench.serving.model import counted
from server.models.base import Row
from server.models.lm.decoder_model import DecoderModel
from server.models.registry import load_model
from server.video.frames import Frames

WIDTH, HEIGHT = 640, 360
KINDS = {
    "attention": r"flash|fmha|attention|_attend|_merge|softmax",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitK|cublas|_gemv",
    "copies": r"copy|Memcpy|Memset|cat|index|gather|scatter",
    "norms and gates": r"norm|_gate|silu|gelu",
}
QUESTION_TOKENS = (16, 32, 64)
KV_TOKENS = (2_000, 18_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a folder with a checkpoint")
    parser.add_argument("--chunks", type=int, default=6, help="of the video, in every measurement")
    parser.add_argument("--behind", default="0,360", help="numbers of chunks that were prefilled before")
    parser.add_argument("--modes", default="", help="prefill modes [what the server would take for such a video]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-questions", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = load_model(given.model)
    assert isinstance(model, DecoderModel)
    result = circumstances("python", sys.argv[0], bundled=given.model == "tiny") | gpu()
    paces = measure_paces(model.device, model.dtype)
    result |= {"matmul_tflop_s": paces.matmul / 1e12, "copy_gb_s": paces.copy / 1e9, "dtype": str(model.dtype)}
    step_decoder = model.step_decoder(1)  # before prefill: it fuses the layers
    with torch.inference_mode():
        result["prefill"] = prefill(model, paces.matmul, given)
        write(result, given.out)
        if step_decoder is not None and not given.no_questions:
            result["questions"] = questions(model, given.repeats)
    write(result, given.out)
    columns = "vision ms", "language ms", "of a matrix product", "busy"
    rows = {
        row["name"]: [row["vision_ms"], row["language_ms"], row["language_share_of_matmul"], row["language_busy"]]
        for row in result["prefill"]
    }
    print_table("a chunk", columns, rows)
    for row in result.get("questions", ()):
        print(row, flush=True)


def prefill(model: DecoderModel, matmul: float, given: argparse.Namespace) -> list[dict[str, Any]]:
    """At the begin of a video, and behind much of one."""
    frames, times_s = noise(model)
    features = model.encode(frames, times_s)
    vision_ms = median_ms(lambda: model.encode(frames, times_s), given.repeats, model.device)
    vision_kinds = kinds(lambda: model.encode(frames, times_s), model.device)
    rows = []
    reach = model.prefill_modes(WIDTH, HEIGHT, model.spec.fps)
    for num_behind, asked in product(map(int, given.behind.split(",")), given.modes.split(",")):
        most_frames = (num_behind + 2 * given.chunks + 2) * model.spec.frames_per_chunk
        mode = asked or next(mode for mode, most in reach if most >= most_frames)
        name = f"{mode}, behind {num_behind} chunks"
        started: Any = model.prefill(mode)
        low, high = started.append(features, last=False)
        low, high = started.append(features, last=False)
        for _ in range(num_behind - 2):
            started.restore(model.num_visual_tokens(len(frames), WIDTH, HEIGHT), low, high)

        def chunks(started: Any = started, features: Any = features) -> None:
            for _ in range(given.chunks):
                started.append(features, last=False)

        width = model.spec.num_heads * model.spec.head_dim
        chunks()
        with counted(model.decoder, width) as flops:
            took_ms = once_ms(chunks, model.device) / given.chunks
        found = kinds(chunks, model.device)
        busy_ms = sum(found.values()) / given.chunks
        share = flops[0] / given.chunks / (took_ms / 1000) / matmul
        rows.append({
            "name": name,
            "num_behind": num_behind,
            "mode": mode,
            "frames": len(frames),
            "vision_ms": vision_ms,
            "vision_kinds_ms": vision_kinds,
            "language_ms": took_ms,
            "language_gflop": flops[0] / given.chunks / 1e9,
            "language_share_of_matmul": share,
            "language_busy": busy_ms / took_ms,
            "language_kinds_ms": {kind: ms / given.chunks for kind, ms in found.items()},
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def noise(model: DecoderModel) -> tuple[torch.Tensor, Any]:
    """A chunk's frames, as the model takes them, and when they were on screen."""
    count = model.spec.frames_per_chunk
    pixels = np.random.default_rng(0).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)
    times_s = np.arange(count) / model.spec.fps
    return model.preprocess(Frames(pixels, times_s)).to(model.device), times_s


def questions(model: DecoderModel, repeats: int) -> list[dict[str, Any]]:
    """Both passes of a question, each in both ways."""
    rows = []
    decoding = model._decoding
    for num_kv in KV_TOKENS:
        cache = mixed_cache(model, num_kv)
        for num_tokens in QUESTION_TOKENS:
            ids = torch.arange(100, 100 + num_tokens, device=model.device)
            row: dict[str, Any] = {"tokens": num_tokens, "kv_tokens": cache.num_mixed, "segments": len(cache.segments)}
            for name, chosen in (("token_by_token", decoding), ("in_one_piece", None)):
                model._decoding = chosen

                def read(ids: torch.Tensor = ids, cache: SharedCache = cache) -> None:
                    model.forward([Row(ids, cache)])
                    cache.length = cache.num_mixed

                def score(ids: torch.Tensor = ids, cache: SharedCache = cache) -> None:
                    model.trace([Row(ids, cache)])

                row |= {
                    f"{name}_ms": median_ms(read, repeats, model.device),
                    f"{name}_scoring_ms": median_ms(score, repeats, model.device),
                    f"{name}_kinds_ms": kinds(read, model.device),
                }
            rows.append(row)
    model._decoding = decoding
    return rows


def mixed_cache(model: DecoderModel, num_tokens: int) -> SharedCache:
    """Of random KVs: small ones with three chunks in detail among them."""
    spec = model.spec

    def random(tokens: list[int]) -> RotatedKV:
        size = spec.num_layers, spec.num_kv_heads, sum(tokens), spec.head_dim
        keys, values = (torch.randn(size, device=model.device, dtype=model.dtype) for _ in range(2))
        ends = np.cumsum(tokens).tolist()
        spans = tuple(zip([0, *ends[:-1]], ends, strict=True))
        return RotatedKV(keys, values, spans, (0,) * len(tokens), (None,) * len(tokens))

    num_high = max((num_tokens - NUM_PREFIX - NUM_LOW) // NUM_HIGH, 8)
    small = random([NUM_PREFIX, *[NUM_HIGH] * num_high])
    chosen = {num_high // 6, num_high // 2, num_high * 5 // 6}
    parts = [Part(small, 0)]
    for place in range(num_high):
        parts.append(Part(random([NUM_LOW // 3]), 0) if place in chosen else Part(small, place + 1))
    return SharedCache(parts, model.rope, room=256)


def median_ms(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Until the device has done it. The first time is to warm up."""
    work()
    return statistics.median(once_ms(work, device) for _ in range(repeats))


def once_ms(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin_s = time.perf_counter()
    work()
    synchronize(device)
    return 1000 * (time.perf_counter() - begin_s)


def kinds(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of the device by kind of kernel; those of no kind by name."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        synchronize(device)
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        of = (kind for kind, pattern in KINDS.items() if re.search(pattern, event.key, re.IGNORECASE))
        found[next(of, event.key[:60])] += event.device_time_total / 1000
    return {kind: round(ms, 4) for kind, ms in found.most_common(8)}


if __name__ == "__main__":
    main()
