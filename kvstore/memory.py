"""Blobs in host memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvstore.base import BlobStat, Data, Sealed, Store, Tier, new_buffer


@dataclass(slots=True)
class _Blob:
    header: bytes
    payload: memoryview
    used_s: float


class MemoryStore(Store):
    """Lives and dies with the process. Unbounded: the quota is the policy of whoever fills it."""

    def __init__(self) -> None:
        self._blobs: dict[str, _Blob] = {}
        self._held: dict[str, tuple[str, float]] = {}  # owner and end (monotonic) of every lock
        self._lock = threading.Lock()

    def tier(self, key: str) -> Tier:
        return "memory"

    def close(self) -> None:
        with self._lock:
            self._blobs.clear()

    def _read(self, key: str) -> Sealed | None:
        with self._lock:
            blob = self._blobs.get(key)
        return None if blob is None else (blob.header, blob.payload)

    def _read_headers(self, keys: Sequence[str]) -> list[bytes | None]:
        return [None if sealed is None else sealed[0] for sealed in map(self._read, keys)]

    def _write(self, key: str, header: bytes, payload: Data) -> None:
        view = memoryview(payload).cast("B")
        copy = new_buffer(len(view))
        copy[:] = view
        blob = _Blob(header, copy, time.time())
        with self._lock:
            self._blobs[key] = blob

    def _delete(self, key: str) -> bool:
        with self._lock:
            return self._blobs.pop(key, None) is not None

    def _stat(self, key: str) -> BlobStat | None:
        with self._lock:
            blob = self._blobs.get(key)
            return None if blob is None else BlobStat(len(blob.payload), blob.used_s)

    def _touch(self, key: str) -> bool:
        with self._lock:
            blob = self._blobs.get(key)
            if blob is not None:
                blob.used_s = time.time()
            return blob is not None

    def _keys(self, prefix: str) -> Iterator[str]:
        with self._lock:
            return iter([key for key in self._blobs if key.startswith(prefix)])

    def _acquire_lock(self, name: str, owner: str, ttl_s: float) -> bool:
        now_s = time.monotonic()
        with self._lock:
            holder, end_s = self._held.get(name, (owner, 0.0))
            if holder != owner and end_s > now_s:
                return False
            self._held[name] = owner, now_s + ttl_s
            return True

    def _release_lock(self, name: str, owner: str) -> bool:
        with self._lock:
            holder, end_s = self._held.get(name, ("", 0.0))
            if holder != owner:
                return False
            del self._held[name]
            return end_s > time.monotonic()
