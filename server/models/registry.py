"""From the name that `--model` takes to a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from server.models.base import VideoModel
from server.models.families.supported import FAMILIES, family_loader
from server.models.hub import UnknownModelError as UnknownModelError
from server.models.hub import find_folder, read_json
from server.models.tensors import CheckpointError
from server.models.tiny.model import load_tiny

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Loader = Callable[..., VideoModel]
"""``load(folder, name, *, device, dtype, low_ratio, high_ratio, prefill_mode)``."""


class DeviceError(ValueError):
    """The device or the dtype is not to be had on this machine, or the device is too small."""


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
    """Loads ``tiny`` (also known as ``x2l-tiny``), the bundled model, or one from a folder or a hub's repository, which
    is served by the repository's name or the folder's.

    ``auto`` takes a GPU where there is one, and float32 on a CPU or bfloat16 on a GPU (float16 on one without it).
    Raises UnknownModelError, DeviceError, CheckpointError, ValueError for a ``prefill_mode`` or ``compressor`` that
    does not exist, and for a ``compressor`` where the model summarizes by itself.
    """
    place = choose_device(device)
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
    load = find_model(name, compressor)
    try:
        return load(**options)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"model {name!r} in {str(precision).removeprefix('torch.')} does not fit on {place}"
        ) from error


def find_model(name: str, compressor: str | None = None) -> Callable[..., VideoModel]:
    """What loads a model, given the other options of ``load_model``: its files are found, and none but its config.json
    is read. Raises UnknownModelError, CheckpointError, and ValueError for a ``compressor`` that it does not take."""
    if name in ("tiny", "x2l-tiny"):
        _refuse(compressor, name)
        return load_tiny
    folder = find_folder(name)
    served = folder.resolve().name if Path(name).expanduser().is_dir() else name
    config = read_json(folder / "config.json")
    _refuse_quantized(config)
    family = family_loader(config)
    if family is not None:
        return partial(family, folder, served, compressor=compressor)
    load = _loader(config, name)
    _refuse(compressor, name)
    return partial(load, folder, served)


def _refuse(compressor: str | None, name: str) -> None:
    if compressor is not None:
        raise ValueError(f"{name} makes its own summaries of a video: it takes no compressor")


def _refuse_quantized(config: dict[str, Any]) -> None:
    """Raises CheckpointError, which names the method, for weights that are not plain numbers."""
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if found:
            method = found.get("quant_method", "another method") if isinstance(found, dict) else found
            raise CheckpointError(f"quantized with {method}: such checkpoints are not supported")


def _loader(config: dict[str, Any], name: str) -> Loader:
    """The loader of a checkpoint's architecture. Modules of models are slow to import, so each comes when asked for."""
    kinds = {str(config.get("model_type")), *map(str, config.get("architectures") or ())}
    if kinds & {"llava_qwen", "LlavaQwenForCausalLM"} or "beacon_window" in config:
        from server.models.videoxl.pretrained import load_pretrained

        return load_pretrained
    shown = ", ".join(sorted(kinds - {"None"})) or "none at all"
    raise UnknownModelError(
        f"model {name!r} has the architecture {shown}; supported are 'tiny', the bundled model, Video-XL (llava_qwen), "
        f"{', '.join(FAMILIES)}. Another one is added with one file in "
        "server/models/families and its name in supported.py there: see 'Contribute' in the README"
    )


def choose_device(name: Device) -> torch.device:
    """``auto`` takes a GPU where there is one. Raises DeviceError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda' was asked for, but no CUDA device is available")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(name: DType, device: torch.device) -> torch.dtype:
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        check_dtype(dtype, device)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raises DeviceError where the device does not compute in a dtype."""
    emulated = device.type == "cuda" and dtype == torch.bfloat16
    try:
        if emulated and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise RuntimeError("it could only be emulated")
        one = torch.ones(1, 1, 2, 2, device=device, dtype=dtype)
        torch.nn.functional.scaled_dot_product_attention(one, one @ one, torch.nn.functional.conv2d(one, one[:, :, :1]))
    except (RuntimeError, TypeError) as error:
        shown = str(dtype).removeprefix("torch.")
        raise DeviceError(f"device '{device}' does not compute in {shown}: choose another --dtype") from error
