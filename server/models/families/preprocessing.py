"""How a folder says that frames and images are to be preprocessed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from server.models.hub import read_json

_FPS = 1.0


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """Of frames, or else of images; empty if the folder does not say. Raises CheckpointError for what is no JSON
    object."""
    combined: dict[str, Any] = _read_json(folder / "processor_config.json").get("video_processor") or {}
    video = _read_json(folder / "video_preprocessor_config.json") or combined
    return video or _read_json(folder / "preprocessor_config.json")


def read_image_preprocessing(folder: Path) -> dict[str, Any]:
    """Of images; empty if the folder does not say. Raises as above."""
    combined: dict[str, Any] = _read_json(folder / "processor_config.json").get("image_processor") or {}
    return _read_json(folder / "preprocessor_config.json") or combined


def read_fps(folder: Path) -> float:
    """Frames a second that videos are sampled at where an upload does not say: the folder's own, or 1 where it gives no
    positive number. Its least and most numbers of frames do not count: a long video would be a few frames far apart.
    """
    found = read_preprocessing(folder).get("fps")
    if isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found) and found > 0:
        return float(found)
    return _FPS


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
