"""What the server knows of one content under one key; all files that hold it share it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from kvstore.key import ContentKey, Fingerprint, KVKey
from kvstore.manifest import ChunkRecord, Manifest
from server.engine.ingest import Ingest, plan_chunks
from server.engine.record import FileStatus, VideoStatus
from server.models.base import VideoModel
from server.video.reader import Sampling, VideoInfo


@dataclass(slots=True)
class Job:
    """A prefill that is queued or running. ``path`` is its temporary file; None: the kept bytes are used."""

    ingest: Ingest
    path: Path | None
    future: Future[None] | None = None

    def stop(self, timeout_s: float) -> None:
        """Cancels it and waits until it has cleaned up, at most ``timeout_s``."""
        if self.future is not None and self.future.cancel():  # never started
            if self.path is not None:
                self.path.unlink(missing_ok=True)
            return
        self.ingest.cancel()
        self.ingest.wait_ended(timeout_s)


@dataclass(slots=True, eq=False)
class Video:
    """Exactly one of these holds: a ``manifest`` (ready), a ``job`` (being prefilled), an ``error``, or none of them,
    which is a video that was ready once and will be prefilled again when it is next asked about."""

    key: KVKey
    content: ContentKey
    fingerprint: Fingerprint
    sampling: Sampling
    manifest: Manifest | None = None
    job: Job | None = None
    error: str | None = None

    @property
    def status(self) -> FileStatus:
        if self.error is not None:
            return "error"
        return "uploaded" if self.job is not None else "processed"

    def describe(self, frames_per_chunk: int) -> VideoStatus | None:
        """How it stands; None while its file has not been opened, and where nothing came of it."""
        manifest, job = self.manifest, self.job
        if manifest is not None:
            num_chunks = len(manifest.records)
            return _status(manifest, num_chunks, manifest.records, manifest.prefill_s, manifest.prefill_mode)
        if job is not None and job.ingest.info is not None:
            info = job.ingest.info
            num_chunks = len(plan_chunks(info, frames_per_chunk))
            return _status(info, num_chunks, tuple(job.ingest.records), None, None)
        return None


def fingerprint_of(model: VideoModel, sampling: Sampling) -> Fingerprint:
    """All that the KVs of a video depend on besides its content."""
    return Fingerprint(
        model=model.fingerprint,
        low_ratio=model.spec.low_ratio,
        high_ratio=model.spec.high_ratio,
        dtype=str(model.dtype).removeprefix("torch."),
        fps=sampling.fps,
        max_frames=sampling.max_frames,
    )


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
