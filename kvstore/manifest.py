"""What a video's KVs are, written after all of them: its presence is the commit."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from compression.chunk import Chunk
from kvstore.errors import CorruptBlob
from kvstore.key import Fingerprint


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """One chunk and what it costs: tokens before compression and at each level, bytes of keys and values."""

    chunk: Chunk
    num_visual_tokens: int
    num_low_tokens: int
    num_high_tokens: int
    low_nbytes: int
    high_nbytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The table of contents of one video under one key.

    ``width`` and ``height`` are pixels of the upright video, ``num_frames`` the sampled frames, ``prefill_s`` the time
    that prefill took and ``prefill_mode`` how it ran. ``records`` are in time order: ``records[i].chunk.index == i``.
    The format version stands in the fingerprint. ``next_position`` is where text behind the video goes on, for models
    whose positions are not contiguous.
    """

    fingerprint: Fingerprint
    duration_s: float
    width: int
    height: int
    num_frames: int
    records: tuple[ChunkRecord, ...]
    num_prefix_tokens: int
    prefix_nbytes: int
    prefill_s: float
    prefill_mode: str
    next_position: int | None = None

    @property
    def high_nbytes(self) -> int:
        """Bytes of the prefix and of all H-KVs."""
        return self.prefix_nbytes + sum(record.high_nbytes for record in self.records)

    def to_json(self) -> bytes:
        return _ADAPTER.dump_json(self)

    @classmethod
    def from_json(cls, data: bytes | bytearray) -> Manifest:
        """Raises CorruptBlob for what is no manifest. Newer versions were told apart by the envelope before."""
        try:
            return _ADAPTER.validate_json(data, strict=True)
        except ValidationError as error:
            raise CorruptBlob(f"not a manifest: {error}") from error


_ADAPTER = TypeAdapter(Manifest)
