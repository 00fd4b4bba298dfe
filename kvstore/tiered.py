"""Host memory before another store, for the large blobs that are read many times."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvstore.base import BlobStat, Data, Found, NewBuffer, Sealed, Store, Tier, found, new_buffer
from kvstore.errors import StoreUnavailable


class TieredStore(Store):
    """What ``get_many`` reads from ``below`` stays in memory, at most ``cache_nbytes`` of it, least recently used out
    first.

    Everything is written to ``below``, and only there: most of what an upload writes is not asked for soon, and would
    push out what is. Before memory serves a blob its header, 24 bytes that hold the checksum, is read from below, so
    that what another server deletes or replaces is seen at once. While ``below`` cannot be reached, memory serves
    what it has. ``get`` goes past the memory: small records, that must be the newest or an error.
    """

    def __init__(self, below: Store, cache_nbytes: int, buffer: NewBuffer = new_buffer) -> None:
        """``buffer`` makes the memory that blobs stay in, on any thread; what it made is free when nothing refers to
        it any more."""
        self._below = below
        self._cache_nbytes = cache_nbytes
        self._buffer = buffer
        self._lock = threading.Lock()
        self._blobs: OrderedDict[str, Sealed] = OrderedDict()  # least recently used first
        self._nbytes = 0

    def close(self) -> None:
        with self._lock:
            self._blobs.clear()
            self._nbytes = 0
        self._below.close()

    def tier(self, key: str) -> Tier:
        with self._lock:
            kept = key in self._blobs
        return "memory" if kept else self._below.tier(key)

    def _read(self, key: str) -> Sealed | None:
        return self._below._read(key)

    def _get_many(self, keys: Sequence[str], buffer: NewBuffer) -> list[Found]:
        """A blob is verified as it comes in; what memory serves is not verified again. Nobody writes to it, and what a
        checksum is for is a disk and the way from there: the KVs that stay on a device are believed as well."""
        hits = self._hits(keys)
        missing = [key for key in keys if key not in hits]
        from_below = iter(self._below._read_many(missing, self._buffer))  # they stay here
        payloads: list[Found] = []
        for key in keys:
            if key in hits:
                sealed: Sealed | None = hits[key]
                payload: Found = hits[key][1]
            else:
                sealed = next(from_below)
                payload = found(key, sealed)
            self._keep(key, sealed if isinstance(payload, memoryview) else None)
            payloads.append(payload)
        return payloads

    def _hits(self, keys: Sequence[str]) -> dict[str, Sealed]:
        """Those of ``keys`` that memory may serve. What is stale is forgotten."""
        with self._lock:
            kept = {key: self._blobs[key] for key in keys if key in self._blobs}
        try:
            headers = dict(zip(kept, self._below._read_headers(list(kept)), strict=True))
        except StoreUnavailable:
            return kept
        hits = {}
        for key, sealed in kept.items():
            if sealed[0] == headers[key]:
                hits[key] = sealed
            else:
                self._keep(key, None)
        return hits

    def _keep(self, key: str, sealed: Sealed | None) -> None:
        """Makes ``sealed`` the most recently used blob, and forgets what was kept under ``key`` before."""
        with self._lock:
            before = self._blobs.pop(key, None)
            if before is not None:
                self._nbytes -= _nbytes(before)
            if sealed is None or _nbytes(sealed) > self._cache_nbytes:
                return
            self._blobs[key] = sealed
            self._nbytes += _nbytes(sealed)
            while self._nbytes > self._cache_nbytes:
                self._nbytes -= _nbytes(self._blobs.popitem(last=False)[1])

    def _read_headers(self, keys: Sequence[str]) -> list[bytes | None]:
        return self._below._read_headers(keys)

    def _write(self, key: str, header: bytes, payload: Data) -> None:
        self._below._write(key, header, payload)
        self._keep(key, None)

    def _delete(self, key: str) -> bool:
        self._keep(key, None)
        return self._below._delete(key)

    def _stat(self, key: str) -> BlobStat | None:
        return self._below._stat(key)

    def _touch(self, key: str) -> bool:
        return self._below._touch(key)

    def _keys(self, prefix: str) -> Iterator[str]:
        return self._below._keys(prefix)

    def stats(self, prefix: str = "") -> Iterator[tuple[str, BlobStat]]:
        return self._below.stats(prefix)

    def _acquire_lock(self, name: str, owner: str, ttl_s: float) -> bool:
        return self._below._acquire_lock(name, owner, ttl_s)

    def _release_lock(self, name: str, owner: str) -> bool:
        return self._below._release_lock(name, owner)


def _nbytes(sealed: Sealed) -> int:
    header, payload = sealed
    return len(header) + len(payload)
