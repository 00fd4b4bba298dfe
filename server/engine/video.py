"""What the server knows of one content under one key; all files that hold it share it."""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.codec import Precision
from kvstore.key import ContentKey, Fingerprint, KVKey, SampledKey
from kvstore.manifest import ChunkRecord, Manifest
from server.engine.fit import plan_chunks
from server.engine.ingest import Ingest
from server.engine.record import FileStatus, VideoStatus
from server.models.base import VideoModel
from server.video.reader import Sampling, VideoInfo


@dataclass(slots=True, eq=False)
class Job:
    """A prefill that is waiting, for its turn or for the end of another replica's, or running.

    ``path`` is its temporary file; None: the kept bytes are used. With ``verify`` what the store holds is not trusted:
    every chunk is read, and made again where it is damaged or gone.
    """

    ingest: Ingest
    path: Path | None = None
    verify: bool = False
    running: bool = False
    stopped: bool = False
    ending: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Of its lease on the video."""
    guard: threading.Lock = field(default_factory=threading.Lock)
    """Held while its lease is renewed or given back."""
    due_s: float = 0.0
    """When to look again whether another replica has done it, or whether the store is back; on the monotonic clock."""
    failing_since_s: float | None = None
    """Since when the store has been away."""

    @property
    def failing_s(self) -> float:
        since_s = self.failing_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s


@dataclass(slots=True, eq=False)
class Video:
    """What is known here of one content under one key. With a ``manifest`` it is ready, and a ``job`` beside that
    repairs it. Without one it is being prefilled by its ``job``, or has failed with an ``error``, or is not looked
    after here: it was ready once and will be prefilled again when it is asked about."""

    key: KVKey
    content: ContentKey
    sampled: SampledKey
    fingerprint: Fingerprint
    sampling: Sampling
    manifest: Manifest | None = None
    job: Job | None = None
    error: str | None = None
    lost: bool = False
    """Without manifest, job and error: the store was found without its KVs, which it had once."""
    unrepaired_s: float | None = None
    """When its repair was last tried in vain, on the monotonic clock."""

    @property
    def status(self) -> FileStatus | None:
        """None where only its files' records can tell."""
        if self.manifest is not None:
            return "processed"
        if self.job is not None:
            return "uploaded"
        return None if self.error is None else "error"

    def describe(self, frames_per_chunk: int) -> VideoStatus | None:
        """How it stands; None while its file has not been opened, and where nothing came of it."""
        manifest, job = self.manifest, self.job
        if manifest is not None:
            return status_of(manifest)
        if job is not None and job.ingest.info is not None:
            info = job.ingest.info
            num_chunks = len(plan_chunks(info, frames_per_chunk))
            return _status(info, num_chunks, tuple(job.ingest.records), None, None)
        return None


def fingerprint_of(model: VideoModel, sampling: Sampling, low_precision: Precision = "exact") -> Fingerprint:
    """All that the KVs of a video depend on besides its content."""
    return Fingerprint(
        model=model.fingerprint,
        low_ratio=model.spec.low_ratio,
        high_ratio=model.spec.high_ratio,
        dtype=str(model.dtype).removeprefix("torch."),
        fps=sampling.fps,
        max_frames=sampling.max_frames,
        low_precision=low_precision,
    )


def status_of(manifest: Manifest) -> VideoStatus:
    """How a video stands that is ready."""
    return _status(manifest, len(manifest.records), manifest.records, manifest.prefill_s, manifest.prefill_mode)


def _status(
    facts: Manifest | VideoInfo,
    num_chunks: int,
    records: tuple[ChunkRecord, ...],
    prefill_s: float | None,
    prefill_mode: str | None,
) -> VideoStatus:
    return VideoStatus(
        duration_s=facts.duration_s,
        width=facts.width,
        height=facts.height,
        num_frames=facts.num_frames,
        num_chunks=num_chunks,
        chunks=tuple(record.chunk for record in records),
        low_tokens=tuple(record.num_low_tokens for record in records),
        high_tokens=tuple(record.num_high_tokens for record in records),
        tokens_visual=sum(record.num_visual_tokens for record in records),
        nbytes_low=sum(record.low_nbytes for record in records),
        nbytes_high=sum(record.high_nbytes for record in records),
        prefill_s=prefill_s,
        prefill_mode=prefill_mode,
    )
