"""What ``x2l serve`` says that it will do."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from kvstore.open import without_password
from server.config import Settings
from server.engine.fit import longest_in_memory
from server.engine.options import EngineOptions
from server.models.base import TYPICAL_PIXELS, ModelSpec, VideoModel

_ALIKE = "both ratios are the same, so re-loading chunks gains nothing (--low-ratio, --high-ratio)"


def plan(settings: Settings, model: VideoModel, options: EngineOptions) -> dict[str, str]:
    """What the server will do, before it does it."""
    spec = model.spec
    token_nbytes = model.token_nbytes
    low_nbytes, high_nbytes = _hour_nbytes(settings, spec, token_nbytes)
    rooms: dict[str, float] = {}
    if options.resident_nbytes is not None:
        rooms["on the device (--gpu-kv-budget)"] = options.resident_nbytes / high_nbytes
    rooms["in the store, kept files apart (--store-quota-bytes)"] = settings.store_quota_bytes / (
        low_nbytes + high_nbytes
    )
    chunk_s = spec.frames_per_chunk / spec.fps
    reload = spec.default_reload if settings.reload is None else settings.reload
    longest = longest_videos(settings, model, options.prefill_nbytes)
    modes = [f"{mode} up to {timedelta(seconds=int(most_s))}" for mode, most_s in longest]
    served = f" as {settings.served_model_name}" if settings.served_model_name else ""
    lines = {
        "model": f"{spec.name}{served}, {model.num_parameters / 1e6:.1f} M parameters",
        "device": f"{model.device}, {str(model.dtype).removeprefix('torch.')}",
        "store": without_password(settings.store),
        "chunk": f"{spec.frames_per_chunk} frames of {spec.tokens_per_frame} tokens, {chunk_s:g} s at {spec.fps:g} fps",
        "prefill": f"{', '.join(modes)}, {whose_limit(settings, model)}",
        "ratios": f"{spec.low_ratio} (detailed) and {spec.high_ratio} (small), re-load {reload} chunks",
        "compressor": getattr(getattr(model, "compression", None), "compressor", ""),  # only one-pass models have one
        "KV": f"{token_nbytes / 1024:g} KiB a token",
        "size": f"{low_nbytes / 1e6:.1f} MB (detailed) and {high_nbytes / 1e6:.1f} MB (small) of KVs per video-hour",
        "room": "KVs of about " + ", ".join(f"{_length(hours)} {where}" for where, hours in rooms.items()),
        "access": f"{len(settings.api_key)} API keys" if settings.api_key else "no API key",
        "warning": _ALIKE if spec.low_ratio == spec.high_ratio else "",
    }
    return {name: value for name, value in lines.items() if value}


def _length(hours: float) -> str:
    """Of video, as people say it."""
    return f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:.1f} hours" if hours < 100 else f"{hours:,.0f} hours"


def longest_videos(
    settings: Settings, model: VideoModel, memory_nbytes: int | None = None
) -> Iterator[tuple[str, float]]:
    """The prefill modes that videos come to, in their order, each with the longest video in seconds; at the model's own
    sampling, of frames of a typical size."""
    spec = model.spec
    bound_s = min(_bounds(settings, spec).values())
    before_s = 0.0
    for mode, num_frames in model.prefill_modes(*TYPICAL_PIXELS, spec.fps):
        most_s = min(min(num_frames, longest_in_memory(model, mode, memory_nbytes)) / spec.fps, bound_s)
        if most_s > before_s:
            yield mode, most_s
            before_s = most_s


def whose_limit(settings: Settings, model: VideoModel) -> str:
    """What keeps the longest of these videos from being longer."""
    spec = model.spec
    bounds = _bounds(settings, spec)
    positions = max(num_frames for _, num_frames in model.prefill_modes(*TYPICAL_PIXELS, spec.fps)) / spec.fps
    bounds["where the model's positions end"] = positions
    return min(bounds, key=lambda whose: bounds[whose])


def _bounds(settings: Settings, spec: ModelSpec) -> dict[str, float]:
    """In seconds of video at the model's own sampling, by what sets them."""
    bounds = {"as --max-duration-s says": settings.max_duration_s}
    if spec.max_duration_s is not None:
        bounds["where the model's clock ends"] = spec.max_duration_s
    return bounds | {"as --max-frames says": settings.max_frames / spec.fps}


def _hour_nbytes(settings: Settings, spec: ModelSpec, token_nbytes: int) -> tuple[float, float]:
    """Bytes of an hour's L-KVs and of its H-KVs in the store, at the model's own sampling."""
    num_frames = 3600 * spec.fps
    num_tokens = num_frames * spec.tokens_per_frame
    low_nbytes, high_nbytes = num_tokens / spec.low_ratio * token_nbytes, num_tokens / spec.high_ratio * token_nbytes
    if settings.kv_dtype == "int8":  # a byte each, and a float32 per channel and chunk
        num_channels = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
        low_nbytes = num_channels * (num_tokens / spec.low_ratio + 4 * num_frames / spec.frames_per_chunk)
    return low_nbytes, high_nbytes
