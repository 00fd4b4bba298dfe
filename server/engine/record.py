"""A file as the server knows it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from compression.chunk import Chunk
from kvstore.errors import CorruptBlob
from kvstore.key import ContentKey, SampledKey
from server.video.reader import Sampling

FileStatus = Literal["uploaded", "processed", "error"]
FileSource = Literal["upload", "inline"]


@dataclass(frozen=True, slots=True)
class VideoStatus:
    """How far a video's prefill has come, and what it made. Tokens and bytes are without the prefix.

    ``chunks`` are those prefilled so far, with their KV tokens at both levels in ``low_tokens`` and ``high_tokens``;
    ``progress`` runs from 0 to 1. ``prefill_s`` and ``prefill_mode`` are None until it has ended.
    """

    duration_s: float
    width: int
    height: int
    num_frames: int
    num_chunks: int
    chunks: tuple[Chunk, ...] = ()
    low_tokens: tuple[int, ...] = ()
    high_tokens: tuple[int, ...] = ()
    tokens_visual: int = 0
    nbytes_low: int = 0
    nbytes_high: int = 0
    prefill_s: float | None = None
    prefill_mode: str | None = None

    @property
    def chunks_done(self) -> int:
        return len(self.chunks)

    @property
    def progress(self) -> float:
        return self.chunks_done / self.num_chunks

    @property
    def tokens_low(self) -> int:
        return sum(self.low_tokens)

    @property
    def tokens_high(self) -> int:
        return sum(self.high_tokens)

    def without_kvs(self) -> VideoStatus:
        """The same of a video whose KVs are gone."""
        return replace(self, nbytes_low=0, nbytes_high=0)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A snapshot of one file. ``nbytes`` of content, Unix times in whole seconds, ``tenant`` as in a Request;
    ``created_ns`` puts those of one second in order.

    ``pinned`` keeps the store's quota from removing it; it expires all the same.
    ``status_details`` tells why the status is ``error``, and of a ``processed`` one that its KVs are gone and are made
    again when it is asked about. ``video`` is None where nothing is known of it.
    """

    id: str
    tenant: str
    filename: str
    purpose: str
    nbytes: int
    created_at: int
    expires_at: int | None
    content_sha256: str
    sampling: Sampling
    source: FileSource
    created_ns: int = 0
    pinned: bool = False
    status: FileStatus = "uploaded"
    status_details: str | None = None
    video: VideoStatus | None = None

    @property
    def blob(self) -> str:
        """The key of the stored record."""
        return f"{RECORDS}{self.id}"

    @property
    def content(self) -> ContentKey:
        """The key of the kept bytes."""
        return ContentKey.of(self.content_sha256, self.tenant)

    @property
    def sampled(self) -> SampledKey:
        """The key of what its KVs are made of."""
        return SampledKey.of(self.content_sha256, self.sampling.fps, self.sampling.max_frames, self.tenant)

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= time.time()

    def visible_to(self, tenant: str) -> bool:
        return self.tenant == tenant and not self.expired

    def to_json(self) -> bytes:
        return _ADAPTER.dump_json(self)

    @classmethod
    def from_json(cls, data: bytes | bytearray) -> FileRecord:
        """Raises CorruptBlob for what is no record."""
        try:
            return _ADAPTER.validate_json(data)
        except ValidationError as error:
            raise CorruptBlob(f"not a file record: {error}") from error


RECORDS = "file/"
"""The records' place in the store."""


_ADAPTER = TypeAdapter(FileRecord)
