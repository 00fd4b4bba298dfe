"""The engine's part of the settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from kvstore.codec import Precision
from server.models.base import ModelSpec
from server.video.reader import VideoLimits


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Bounds and policies. None means no bound, or the model's own default.

    ``max_batch`` requests hold a cache and run; ``max_queue`` more may wait. One pass takes at most ``prompt_step``
    tokens of a prompt, so that a long one holds nobody up. Up to ``prefill_share`` of the engine's time goes to uploads
    while questions are running as well, and the rest to the questions. ``spool`` is the folder for temporary files,
    ``low_precision`` how L-KVs are stored.

    A video whose prefill would remember more than ``prefill_nbytes`` on the device takes a cheaper mode (None: as much
    as is free there when the engine starts, but for what the others may take).

    With ``share_kvs`` the caches of all questions see the same KVs of a video instead of a copy each (None: where that
    pays, on a GPU); then up to ``shared_low_nbytes`` of the L-KVs used last stay on the device, and up to
    ``prefetch_nbytes`` of others are there that were read ahead.

    A prefill holds its video by a lease of ``lease_s``, which another replica takes over when it lapses. A question
    waits ``reload_timeout_s`` for its L-KVs before H-KVs stand in, and ``load_timeout_s`` for its H-KVs, or for a
    prefill that a store which is away holds up; the prefill itself waits ``store_patience_s`` for it.
    """

    max_batch: int = 16
    max_queue: int = 64
    max_tokens: int = 1024
    prompt_step: int = 256
    max_concurrent_prefills: int = 2
    prefill_share: float = 0.4
    default_reload: int | None = None
    keep_video: bool = True
    low_precision: Precision = "exact"
    store_quota_bytes: int | None = None
    spool: Path | None = None
    resident_nbytes: int | None = None
    prefill_nbytes: int | None = None
    share_kvs: bool | None = None
    shared_low_nbytes: int = 1 << 31
    prefetch_nbytes: int = 0
    limits: VideoLimits = field(default_factory=VideoLimits)
    inline_ttl_s: int = 86_400
    sweep_interval_s: float = 30.0
    reader_threads: int = 4
    writer_threads: int = 2
    lease_s: float = 5.0
    reload_timeout_s: float = 5.0
    load_timeout_s: float = 15.0
    store_patience_s: float = 60.0

    def limits_for(self, spec: ModelSpec) -> VideoLimits:
        """The limits of a video for a model, which may not be able to tell the time of a longer one."""
        if spec.max_duration_s is None or spec.max_duration_s >= self.limits.max_duration_s:
            return self.limits
        return replace(
            self.limits, max_duration_s=spec.max_duration_s, max_duration_of=f"where the clock of {spec.name} ends"
        )
