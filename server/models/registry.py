"""From the name that `--model` takes to a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from server.models.base import VideoModel
from server.models.families import FAMILIES, family_loader
from server.models.tiny.model import load_tiny

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


class UnknownModelError(ValueError):
    """No loader knows this name."""


class DeviceError(ValueError):
    """The device or the dtype is not to be had on this machine."""


def load_model(
    name: str = "tiny",
    *,
    device: Device = "auto",
    dtype: DType = "auto",
    low_ratio: int | None = None,
    high_ratio: int | None = None,
    prefill_mode: str | None = None,
    compressor: str | None = None,
) -> VideoModel:
    """Loads ``tiny`` (also known as ``x2l-tiny``), the bundled model, or the one in a local folder.

    ``auto`` takes a GPU where there is one, and float32 on a CPU or bfloat16 on a GPU. Raises UnknownModelError,
    DeviceError, CheckpointError, ValueError for a ``prefill_mode`` or ``compressor`` that does not exist, and for a
    ``compressor`` where the model summarizes by itself.
    """
    place = _device(device)
    precision = _dtype(dtype, place)
    if precision == torch.float32 and place.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # or convolutions keep 10 bits of 23
    options: dict[str, Any] = {
        "device": place,
        "dtype": precision,
        "low_ratio": low_ratio,
        "high_ratio": high_ratio,
        "prefill_mode": prefill_mode,
    }
    if name not in ("tiny", "x2l-tiny"):
        folder = Path(name).expanduser()
        return _family(folder)(folder, folder.resolve().name, **options, compressor=compressor)
    if compressor is not None:
        raise ValueError(f"{name} makes its own summaries of a video: it takes no compressor")
    return load_tiny(**options)


def _family(folder: Path) -> Callable[..., VideoModel]:
    supported = f"this version serves 'tiny', the bundled model, and folders with {', '.join(FAMILIES)}"
    config = folder / "config.json"
    if not config.is_file():
        raise UnknownModelError(f"unknown model {str(folder)!r}: {supported}")
    content = json.loads(config.read_text())
    load = family_loader(content)
    if load is None:
        raise UnknownModelError(f"the model in {folder} is of type {content.get('model_type')!r}: {supported}")
    return load


def _device(name: Device) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda' was asked for, but no CUDA device is available")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(name: DType, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
