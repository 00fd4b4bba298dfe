"""A video's chunks, and whether it fits: into the model's positions, and onto its device."""

from __future__ import annotations

import math
from bisect import bisect_right

import torch

from compression.chunk import Chunk
from server.engine.options import EngineOptions
from server.models.base import TYPICAL_PIXELS, VideoModel
from server.video.errors import VideoTooLarge
from server.video.reader import Sampling, VideoInfo

_KEPT_NBYTES, _KEPT_SHARE = 2 << 30, 8
"""Of KVs of one level on the device; of what is free, the part that is."""
_COMPUTING = 0.1
"""Of a GPU's memory: for passes, and for the caches of questions."""
_MOST_CHUNKS = 1_000_000
"""Where no bound is met, this is long enough."""


def plan_chunks(info: VideoInfo, frames_per_chunk: int) -> tuple[Chunk, ...]:
    """The chunks of a video: ``frames_per_chunk`` frames each, the last what remains; they cover it without a gap."""
    count = math.ceil(info.num_frames / frames_per_chunk)
    chunks = []
    for index in range(count):
        first = index * frames_per_chunk
        stop = min(first + frames_per_chunk, info.num_frames)
        end_s = info.duration_s if index == count - 1 else stop * info.interval_s
        chunks.append(Chunk(index, first * info.interval_s, end_s, stop - first))
    return tuple(chunks)


def choose_mode(model: VideoModel, info: VideoInfo, sampling: Sampling, memory_nbytes: int | None) -> str:
    """The first of the model's prefill modes in which a video fits into its positions, and what a prefill remembers
    into ``memory_nbytes`` (None: no bound).

    Raises VideoTooLarge, which tells what fits, where there is none.
    """
    modes = model.prefill_modes(info.width, info.height, 1 / info.interval_s)
    fitting = [mode for mode, most in modes if info.num_frames <= most]
    if not fitting:
        most = max(most for _, most in modes)
        raise VideoTooLarge(
            f"The video has {info.num_frames} sampled frames; {model.spec.name} has positions for at most {most}, "
            f"which are {most / sampling.fps:.1f} s at {sampling.fps:g} fps. Lower fps or set max_frames.",
            code="video_too_long",
        )
    visual = _visual(model, info)
    needed = [model.token_nbytes * model.num_remembered(mode, sum(visual), len(visual)) for mode in fitting]
    for mode, nbytes in zip(fitting, needed, strict=True):
        if memory_nbytes is None or nbytes <= memory_nbytes:
            return mode
    raise VideoTooLarge(
        f"The prefill of the video keeps {min(needed)} bytes or more of KVs on the device, where there is room for "
        f"{memory_nbytes}. Lower fps or set max_frames."
    )


def longest_in_memory(model: VideoModel, mode: str, memory_nbytes: int | None) -> int:
    """The most frames of a typical size, in whole chunks, of which a prefill in ``mode`` remembers no more than
    ``memory_nbytes``."""
    size = model.spec.frames_per_chunk
    num_visual = model.num_visual_tokens(size, *TYPICAL_PIXELS)

    def nbytes(num_chunks: int) -> int:
        return model.token_nbytes * model.num_remembered(mode, num_chunks * num_visual, num_chunks)

    most = _MOST_CHUNKS if memory_nbytes is None else bisect_right(range(_MOST_CHUNKS), memory_nbytes, lo=1, key=nbytes)
    return (most - 1) * size


def default_kept_nbytes(device: torch.device, others_nbytes: int | None) -> int:
    """Room for KVs of one level where nobody says otherwise, once the model is on ``device``; ``others_nbytes`` are set
    aside there for those of the other level, if somebody says that."""
    if device.type != "cuda":
        return _KEPT_NBYTES
    return max(_KEPT_NBYTES, (torch.cuda.mem_get_info(device)[0] - (others_nbytes or 0)) // _KEPT_SHARE)


def free_nbytes(device: torch.device, options: EngineOptions) -> int | None:
    """What a prefill may remember on a GPU, beside the KVs that are kept for questions and what is computed with."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    kept = (options.resident_nbytes or 0) + options.shared_low_nbytes + options.prefetch_nbytes
    return max(0, free - kept - int(_COMPUTING * total))


def least_resident_nbytes(model: VideoModel, info: VideoInfo) -> int:
    """What a video's H-KVs take at least; the prefix and what models keep of a chunk besides come on top."""
    return model.token_nbytes * sum(num // model.spec.high_ratio for num in _visual(model, info))


def check_resident(nbytes: int, budget_nbytes: int | None) -> None:
    """Raises VideoTooLarge for prefix and H-KVs with which no question could ever be answered."""
    if budget_nbytes is not None and nbytes > budget_nbytes:
        raise VideoTooLarge(
            f"The video's small KVs take {nbytes} bytes or more, and the server keeps at most {budget_nbytes} bytes on "
            "its device (--gpu-kv-budget). Lower fps, set max_frames, or give the server a larger --gpu-kv-budget."
        )


def check_budgets(model: VideoModel, options: EngineOptions) -> None:
    """Raises ValueError, naming the option of ``x2l serve``, for a bound in which a single chunk would have no room."""
    spec = model.spec
    visual_nbytes = model.token_nbytes * model.num_visual_tokens(spec.frames_per_chunk, *TYPICAL_PIXELS)
    low_nbytes, high_nbytes = visual_nbytes // spec.low_ratio, visual_nbytes // spec.high_ratio
    if options.low_precision == "int8":
        low_nbytes //= model.dtype.itemsize
    high_nbytes += model.prefix().nbytes
    for option, given, least in (
        ("--gpu-kv-budget", options.resident_nbytes, high_nbytes),
        ("--store-quota-bytes", options.store_quota_bytes, high_nbytes + low_nbytes),
    ):
        if given is not None and given < least:
            raise ValueError(
                f"{option} must be at least {least} bytes, the KVs of a single chunk of {spec.name}; it is {given}"
            )


def _visual(model: VideoModel, info: VideoInfo) -> list[int]:
    """Of each chunk."""
    chunks = plan_chunks(info, model.spec.frames_per_chunk)
    return [model.num_visual_tokens(chunk.num_frames, info.width, info.height) for chunk in chunks]
