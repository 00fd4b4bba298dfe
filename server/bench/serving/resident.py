"""What a video takes of the device while nobody asks about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.bench.serving.asker import Asker
from server.bench.serving.video import UploadedVideo

_DEVICE_NBYTES = 80e9


def measure_resident(asker: Asker, videos: Sequence[UploadedVideo], ratio: int | None) -> dict[str, Any]:
    """Bytes of H-KVs on the device per video-hour (``x2l_resident_bytes``) against 1/``ratio`` of the KVs of all visual
    tokens; None takes the ratio from the tokens of both. The peer is a cache of all KVs, as prefix caching keeps it:
    how many hours of video 80 GB hold, without weights.

    Only with all of ``videos`` on the device and no others the bytes are theirs; otherwise there is only the peer.
    """
    hours = sum(video.facts["duration_s"] for video in videos) / 3600
    full = sum(video.full_nbytes for video in videos)
    high = sum(video.facts["tokens"]["high"] for video in videos)
    ratio = ratio or round(sum(video.facts["tokens"]["visual"] for video in videos) / high)
    row: dict[str, Any] = {
        "high_ratio": ratio,
        "full_mb_per_hour": round(full / hours / 1e6, 2),
        "full_hours_in_80_gb": round(_DEVICE_NBYTES / (full / hours), 1),
    }
    counts = asker.counts()
    if counts["x2l_resident_videos"] == len(videos):
        nbytes = counts["x2l_resident_bytes"]
        row |= {
            "mb_per_hour": round(nbytes / hours / 1e6, 3),
            "hours_in_80_gb": round(_DEVICE_NBYTES / (nbytes / hours), 1),
            "share_of_full": round(nbytes / full, 5),
            "over_one_by_ratio": round(nbytes / full * ratio, 3),
        }
    return row
