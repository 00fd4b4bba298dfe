"""What a model's parts take by themselves, with no server around them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from server.bench.serving.floor import Floor
from server.bench.serving.hardware import Paces, describe_gpu, measure_paces, synchronize
from server.models.base import VideoModel
from server.models.lm.decoder import QKV, LanguageModel, Window
from server.models.lm.decoder_model import DecoderModel
from server.models.registry import load_model
from server.models.slices import Slices
from server.video.reader import Sampling, VideoLimits, VideoReader

NUM_CHUNKS = 8
"""Of a video, with which prefill is measured."""

_Chunk = tuple[Tensor, NDArray[np.float64]]


def measure_model(video: Path, repeats: int, tick: Callable[[], None], **settings: Any) -> tuple[dict[str, Any], Floor]:
    """Loads the model as ``load_model(**settings)`` does, measures, and lets it go again: its weights and KVs in bytes,
    the pace of the device, frames a second of decoding and of the vision tower, and the language model's share of the
    pace of a matrix product in prefill."""
    model = load_model(**settings)
    if not isinstance(model, DecoderModel):
        raise ValueError(f"{model.spec.name} has no language model that can be measured by itself")
    paces = measure_paces(model.device, model.dtype)
    tick()
    decode_fps, chunks = _decode(model, video)
    tick()
    parts = _prefill(model, chunks, repeats)
    # Others' work must not have slowed the one and spared the other.
    paces = Paces(*map(max, zip(astuple(paces), astuple(measure_paces(model.device, model.dtype)), strict=True)))
    tick()
    floor = Floor(paces, num_step_weights(model.decoder) * model.dtype.itemsize, model.token_nbytes)
    facts = describe_gpu(model.device) | {
        "paces": {name: float(f"{pace:.4g}") for name, pace in asdict(paces).items()},
        "weight_nbytes": model.num_parameters * model.dtype.itemsize,
        "weight_nbytes_a_step": floor.weight_nbytes,
        "kv_nbytes_a_token": floor.token_nbytes,
        "prefill_parts": {"decode_frames_per_s": round(decode_fps, 1)} | parts.summary(paces.matmul),
    }
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the server needs it
    return facts, floor


def num_step_weights(decoder: LanguageModel) -> int:
    """Weights that a step over text reads, once each. Of the embeddings it reads a row a token, which is nothing, and
    of the summary tokens' own projections nothing."""
    return (
        _num_layer_weights(decoder.layers)
        + sum(p.numel() for p in decoder.norm.parameters())
        + decoder.head_weight.numel()
    )


def _num_layer_weights(layers: nn.Module) -> int:
    return sum(p.numel() for name, p in layers.named_parameters() if "beacon" not in name)


def _decode(model: VideoModel, video: Path) -> tuple[float, list[_Chunk]]:
    """Sampled frames a second of the whole file, and its first chunks ready for the model."""
    pixels: list[Tensor] = []
    times_s: list[NDArray[np.float64]] = []
    num_kept, size = NUM_CHUNKS * model.spec.frames_per_chunk, model.spec.frames_per_chunk
    begin_s, num_frames = time.perf_counter(), 0
    with VideoReader(video, Sampling(model.spec.fps), VideoLimits()) as reader:
        for frames in reader:
            if num_frames < num_kept:
                pixels.append(model.preprocess(frames))
                times_s.append(frames.times_s)
            num_frames += len(frames)
    pace = num_frames / (time.perf_counter() - begin_s)
    every, times = torch.cat(pixels), np.concatenate(times_s)
    starts = range(0, max(1, min(len(every), num_kept) - size + 1), size)  # whole chunks, if there are any
    return pace, [(every[start : start + size], times[start : start + size]) for start in starts]


@dataclass(frozen=True)
class Parts:
    """What the prefill of some chunks takes in seconds and operations, in all."""

    num_chunks: int
    num_frames: int
    video_minutes: float
    vision_s: float
    vision_flops: int
    language_s: float
    language_flops: int

    def summary(self, matmul: float) -> dict[str, Any]:
        """``matmul`` is the pace of a matrix product, in operations a second."""
        return {
            "chunks": self.num_chunks,
            "vision_frames_per_s": round(self.num_frames / self.vision_s, 1),
            "vision_share_of_matmul": round(self.vision_flops / self.vision_s / matmul, 3),
            "language_frames_per_s": round(self.num_frames / self.language_s, 1),
            "language_gflop_s": round(self.language_flops / self.language_s / 1e9, 2),
            "language_share_of_matmul": round(self.language_flops / self.language_s / matmul, 3),
            "s_per_video_minute": round((self.vision_s + self.language_s) / self.video_minutes, 4),
            "floor_s_per_video_minute": round(
                (self.vision_flops + self.language_flops) / matmul / self.video_minutes, 4
            ),
        }


@torch.inference_mode()
def _prefill(model: DecoderModel, chunks: list[_Chunk], repeats: int) -> Parts:
    """Medians over ``repeats`` prefills of the same chunks."""
    device = model.device
    with FlopCounterMode(display=False) as counter:
        model.encode(chunks[0][0].to(device), chunks[0][1])
    vision_s: list[float] = []
    language_s: list[float] = []
    for _ in range(repeats + 1):  # the first one warms up
        prefill = model.prefill()
        times = [0.0, 0.0]
        with counted(model.decoder, model.spec.num_heads * model.spec.head_dim) as flops:
            for pixels, times_s in chunks:
                begin_s = _now_s(device)
                features = model.encode(pixels.to(device), times_s)
                middle_s = _now_s(device)
                prefill.append(features, last=False)
                times = [times[0] + middle_s - begin_s, times[1] + _now_s(device) - middle_s]
        vision_s.append(times[0])
        language_s.append(times[1])
    num_frames = sum(len(pixels) for pixels, _ in chunks)
    return Parts(
        len(chunks),
        num_frames,
        num_frames / model.spec.fps / 60,
        median(vision_s[1:]),
        counter.get_total_flops() * len(chunks),
        median(language_s[1:]),
        flops[0],
    )


@contextmanager
def counted(decoder: LanguageModel, width: int) -> Iterator[list[int]]:
    """Adds up the operations of all prefills by ``decoder`` meanwhile, at the one place of the list: those of the
    layers' matrices, and of attention over all KV tokens before each token and up to it. ``width`` is that of all
    heads. Of the last layer a prefill needs the projections alone."""
    flops = [0]
    num_whole = len(decoder.layers) - 1
    names = ("q_proj", "k_proj", "v_proj")
    projections = [p for name, p in decoder.layers[-1].named_parameters() if name.split(".")[-2] in names]
    linear = 2 * (_num_layer_weights(decoder.layers[:-1]) + sum(p.numel() for p in projections))
    run = decoder.slices

    def add(windows: list[Window]) -> Slices[list[QKV]]:
        for window in windows:
            new, past = len(window.embeddings), window.cache.length
            seen = new * past + new * (new + 1) // 2
            flops[0] += linear * new + 4 * num_whole * width * seen
        return run(windows)

    decoder.slices = add  # type: ignore[method-assign,assignment]
    try:
        yield flops
    finally:
        del decoder.slices


def _now_s(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()
