"""What a video takes of the device while nobody asks about it, and what a cache of all its KVs would take."""

from __future__ import annotations

from typing import Any

from server.bench.serving.asker import Asker
from server.bench.serving.floor import Floor
from server.bench.serving.hardware import Paces
from server.bench.serving.video import UploadedVideo


def measure_resident(asker: Asker, video: UploadedVideo, floor: Floor, ratio: int) -> dict[str, Any]:
    """Bytes of H-KVs on the device per video-hour (``x2l_resident_bytes``, with the prefix) against 1/``ratio`` of the
    KVs of all visual tokens. Raises ValueError unless this and no other video is on the device."""
    counts = asker.counts()
    if counts["x2l_resident_videos"] != 1:
        raise ValueError("the video does not stay on the device: give it more room, --serve '--gpu-kv-budget 8GB'")
    hours = video.facts["duration_s"] / 3600
    full = video.facts["tokens"]["visual"] * floor.token_nbytes
    nbytes = counts["x2l_resident_bytes"]
    return {
        "high_ratio": ratio,
        "mb_per_hour": round(nbytes / hours / 1e6, 3),
        "full_mb_per_hour": round(full / hours / 1e6, 3),
        "floor_mb_per_hour": round(full / ratio / hours / 1e6, 3),
        "over_floor": round(nbytes / full * ratio, 3),
    }


def full_cache(
    resident: dict[str, Any], weight_nbytes: int, paces: Paces, disk: float, memory_gb: float
) -> dict[str, Any]:
    """What prefix caching of all KVs (ratio 1, nothing compressed) would take, computed from this run's measured rates:
    hours of video beside all weights in ``memory_gb``, and the re-load of an hour from ``disk`` (bytes a second)."""
    room_mb = max(0.0, 1000 * memory_gb - weight_nbytes / 1e6)
    full_mb = resident["full_mb_per_hour"]
    return {
        "computed_from": "bytes a token, disk and device paces of this run",
        "memory_gb": memory_gb,
        "mb_per_hour": full_mb,
        "hours_that_fit": round(room_mb / full_mb, 1),
        "hours_that_fit_here": round(room_mb / resident["mb_per_hour"], 1),
        "reload_hour_s": round(full_mb * 1e6 / min(disk, paces.to_device), 3),
    }
