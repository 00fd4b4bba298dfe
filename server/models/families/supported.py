"""The families of models that are served through transformers' own classes, by the ``model_type`` of their folders."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from server.models.base import VideoModel

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
"""One module of that name each: ``HINTS``, the class of what its folders may say (server.models.families.hints), and
``load(folder, name, *, device, dtype, compression, hints)``, which returns the model."""


def family_loader(config: dict[str, Any]) -> Callable[..., VideoModel] | None:
    """What loads a folder with this ``config.json``, with the options of :func:`server.models.registry.load_model`;
    None for other architectures."""
    family = config.get("model_type")
    if family not in FAMILIES:
        return None
    from server.models.families.one_pass import OnePassConfig  # modules of models are slow to import

    module: Any = import_module(f"server.models.families.{family}")

    def load(folder: Path, name: str, *, device: torch.device, dtype: torch.dtype, **options: Any) -> VideoModel:
        hints = module.HINTS.of(config)
        chosen = {option: getattr(hints, option) if value is None else value for option, value in options.items()}
        compression = OnePassConfig(**{option: value for option, value in chosen.items() if value is not None})
        model: VideoModel = module.load(folder, name, device=device, dtype=dtype, compression=compression, hints=hints)
        return model

    return load
