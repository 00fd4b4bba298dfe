"""Names of what is stored: full SHA-256 over a canonical encoding of everything that makes the bytes what they are."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass

from kvstore.envelope import FORMAT_VERSION

UPLOADS = "upload/"
"""The place of uploads that come in parts."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything besides the video's content that its KVs depend on.

    ``model`` names the weights and every setting that changes a KV (chunk length, edge rule, ...). ``low_ratio`` and
    ``high_ratio`` are visual tokens per KV token, ``dtype`` the dtype of the KVs ("float32", "bfloat16", ...),
    ``low_precision`` how the L-KVs are stored (kvstore.codec). ``fps`` and ``max_frames`` are the sampling.
    Raises ValueError for an fps that is no positive number.
    """

    model: str
    low_ratio: int
    high_ratio: int
    dtype: str
    fps: float
    max_frames: int | None
    low_precision: str = "exact"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be a positive number, not {self.fps}")
        object.__setattr__(self, "fps", float(self.fps))  # 1 and 1.0 are the same sampling


@dataclass(frozen=True, slots=True)
class KVKey:
    """The KVs of one video under one fingerprint, for one tenant. ``digest`` is 64 hex digits, never shortened."""

    digest: str

    def __post_init__(self) -> None:
        _check_sha256(self.digest)

    @classmethod
    def of(cls, content_sha256: str, fingerprint: Fingerprint, salt: str = "") -> KVKey:
        """``content_sha256`` of the video file's bytes (64 hex digits); ``salt`` of the tenant."""
        _check_sha256(content_sha256)
        return cls(_digest("kv", content_sha256, asdict(fingerprint), salt))

    @property
    def root(self) -> str:
        return f"kv/{self.digest}/"

    @property
    def manifest(self) -> str:
        return f"{self.root}manifest"

    @property
    def prefix(self) -> str:
        return f"{self.root}prefix"

    def low(self, index: int) -> str:
        return f"{self.root}low/{index:05d}"

    def high(self, index: int) -> str:
        return f"{self.root}high/{index:05d}"

    def thumbnail(self, index: int) -> str:
        return f"{self.root}thumb/{index:05d}"


@dataclass(frozen=True, slots=True)
class SampledKey:
    """A video file's bytes under one sampling, for one tenant: what KVs are made of, under whatever fingerprint.

    Below ``root`` lies an empty note for each of these KVs, so that all of them are found when the video goes.
    ``digest`` is 64 hex digits, never shortened.
    """

    digest: str

    def __post_init__(self) -> None:
        _check_sha256(self.digest)

    @classmethod
    def of(cls, content_sha256: str, fps: float, max_frames: int | None, salt: str = "") -> SampledKey:
        """``content_sha256`` of the file's bytes (64 hex digits); ``salt`` of the tenant."""
        _check_sha256(content_sha256)
        return cls(_digest("sampled", content_sha256, float(fps), max_frames, salt))

    @property
    def root(self) -> str:
        return f"made/{self.digest}/"

    def note(self, key: KVKey) -> str:
        return f"{self.root}{key.digest}"


@dataclass(frozen=True, slots=True)
class ContentKey:
    """The kept bytes of a video file, for one tenant. ``digest`` is 64 hex digits, never shortened."""

    digest: str

    def __post_init__(self) -> None:
        _check_sha256(self.digest)

    @classmethod
    def of(cls, content_sha256: str, salt: str = "") -> ContentKey:
        """``content_sha256`` of the file's bytes (64 hex digits); ``salt`` of the tenant."""
        _check_sha256(content_sha256)
        return cls(_digest("content", content_sha256, salt))

    @property
    def root(self) -> str:
        return f"content/{self.digest}/"

    @property
    def manifest(self) -> str:
        return f"{self.root}manifest"

    def part(self, index: int) -> str:
        return f"{self.root}part/{index:05d}"


@dataclass(frozen=True, slots=True)
class PartKey:
    """One part of an upload that comes in parts. Both ids must fit into a key."""

    upload_id: str
    part_id: str

    @property
    def root(self) -> str:
        return f"{UPLOADS}{self.upload_id}/part/{self.part_id}/"

    @property
    def manifest(self) -> str:
        return f"{self.root}manifest"

    def part(self, index: int) -> str:
        return f"{self.root}part/{index:05d}"


def _check_sha256(digest: str) -> None:
    if not _SHA256.fullmatch(digest):
        raise ValueError(f"not a SHA-256 in 64 lower-case hex digits: {digest[:80]!r}")


def _digest(*fields: object) -> str:
    # JSON quotes every string and sorts every key, so no two different lists of fields share an encoding.
    # ensure_ascii is off because it would write a pair of lone surrogates and the character they stand for alike.
    canonical = json.dumps(fields, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()
