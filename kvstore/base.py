"""The contract of a store: bytes by key. Backends move bytes; keys and checksums are checked here, once for all."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvstore import envelope
from kvstore.errors import CorruptBlob, InvalidKey

Data = bytes | bytearray | memoryview
Sealed = tuple[bytes, memoryview]
"""Header (its first HEADER_NBYTES bytes, or what there is) and payload of a blob, as they lie in the store."""

Found = memoryview | CorruptBlob | None
"""The payload of a blob, verified; what is wrong with it; None for a miss."""

NewBuffer = Callable[[int], memoryview]
"""Makes writable memory of so many bytes."""

Tier = Literal["device", "memory", "disk", "redis"]
"""Where KVs lie, the fastest first."""

_SEGMENT = r"[a-z0-9_-][a-z0-9._-]*"  # no leading dot: neither "." nor ".." nor a hidden file
_KEY = re.compile(rf"{_SEGMENT}(/{_SEGMENT})*")
_PREFIX = re.compile(rf"({_SEGMENT}/)*({_SEGMENT})?")
_MAX_SEGMENT = 200  # below every file system's 255, with room for a suffix
_MAX_KEY = 1000


@dataclass(frozen=True, slots=True)
class BlobStat:
    """``nbytes`` as put; ``used_s`` is the Unix time of the last put or touch."""

    nbytes: int
    used_s: float


class Store(ABC):
    """Bytes by key, for any number of threads at once.

    A key is one or more segments of ``[a-z0-9._-]`` joined by "/", none with a leading dot. A miss is None (or False);
    everything else that fails is a StoreError: InvalidKey for the key, StoreUnavailable for the medium.
    """

    def get(self, key: str) -> bytearray | None:
        """What was put under ``key``, verified, in a fresh buffer that is the caller's own; None on a miss.

        Raises CorruptBlob, FormatVersionError.
        """
        payload = _opened(key, self._read(_checked(key)))
        return None if payload is None else bytearray(payload)

    def get_many(self, keys: Sequence[str], buffer: NewBuffer | None = None) -> list[Found]:
        """What was put under each of ``keys``, in one read that copies as little as can be; None for a miss.

        In the place of a damaged blob stands the error. The buffers may be the store's own: never write to them. A
        store that reads straight into the caller's memory does it where ``buffer`` gives it that. Raises
        FormatVersionError.
        """
        return self._get_many([_checked(key) for key in keys], buffer or new_buffer)

    @abstractmethod
    def tier(self, key: str) -> Tier:
        """Where a read of ``key`` goes now, as far as can be told without one."""

    def put(self, key: str, data: Data) -> None:
        """Stores ``data``, replacing what was there: a reader sees the old bytes or the new, never a mixture.

        It is durable on return, and on any error nothing has changed. Raises StoreFull.
        """
        self._write(_checked(key), envelope.seal(key, data), data)

    def delete(self, key: str) -> bool:
        """Removes the blob; whether there was one."""
        return self._delete(_checked(key))

    def stat(self, key: str) -> BlobStat | None:
        """Size and last use, without reading the blob."""
        return self._stat(_checked(key))

    def touch(self, key: str) -> bool:
        """Records a use of the blob now; whether there is one."""
        return self._touch(_checked(key))

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The keys that begin with ``prefix``, in no particular order."""
        if not _PREFIX.fullmatch(prefix):
            raise InvalidKey(f"not a prefix of a key: {prefix[:80]!r}")
        return self._keys(prefix)

    def stats(self, prefix: str = "") -> Iterator[tuple[str, BlobStat]]:
        """The keys that begin with ``prefix`` with their stats, in one pass; what goes meanwhile is left out."""
        for key in self.keys(prefix):
            stat = self._stat(key)
            if stat is not None:
                yield key, stat

    def nbytes(self, prefix: str = "") -> int:
        """Bytes held under ``prefix``."""
        return sum(stat.nbytes for _, stat in self.stats(prefix))

    def acquire_lock(self, name: str, owner: str, ttl_s: float) -> bool:
        """Takes the lock ``name`` for ``owner`` until ``ttl_s`` seconds from now; False while somebody else holds it.

        Whoever holds it already renews it by the same call. A lock that is not renewed in time lapses, and anybody may
        take it: it keeps work from being done twice at the same time, but what it guards must bear that all the same.
        ``owner`` is a text that nobody else uses, such as a UUID; ``name`` is written as a key, and is none.
        """
        if not (owner and ttl_s > 0):
            raise ValueError("a lock needs an owner and a time to live")
        return self._acquire_lock(_checked(name), owner, ttl_s)

    def release_lock(self, name: str, owner: str) -> bool:
        """Gives the lock back; False, with nothing done, unless ``owner`` still holds it."""
        return self._release_lock(_checked(name), owner)

    @abstractmethod
    def close(self) -> None:
        """Lets go of everything held open. No call may follow, except another close."""

    def _get_many(self, keys: Sequence[str], buffer: NewBuffer) -> list[Found]:
        """What :meth:`get_many` says; what is verified is verified here, once."""
        return [found(key, sealed) for key, sealed in zip(keys, self._read_many(keys, buffer), strict=True)]

    @abstractmethod
    def _read(self, key: str) -> Sealed | None: ...

    def _read_many(self, keys: Sequence[str], buffer: NewBuffer) -> Iterable[Sealed | None]:
        """In the order of ``keys``. A store that can read several blobs at a time does it here; whether it uses
        ``buffer`` is its own affair, but it must not touch that memory any more when it returns or raises."""
        return map(self._read, keys)

    @abstractmethod
    def _read_headers(self, keys: Sequence[str]) -> list[bytes | None]:
        """What ``_read`` would give as headers, without the payloads."""

    @abstractmethod
    def _write(self, key: str, header: bytes, payload: Data) -> None: ...

    @abstractmethod
    def _delete(self, key: str) -> bool: ...

    @abstractmethod
    def _stat(self, key: str) -> BlobStat | None: ...

    @abstractmethod
    def _touch(self, key: str) -> bool: ...

    @abstractmethod
    def _keys(self, prefix: str) -> Iterator[str]: ...

    @abstractmethod
    def _acquire_lock(self, name: str, owner: str, ttl_s: float) -> bool: ...

    @abstractmethod
    def _release_lock(self, name: str, owner: str) -> bool: ...


def new_buffer(nbytes: int) -> memoryview:
    """Writable memory that is not zeroed first; numpy asks for huge pages, which makes its first use several times
    faster than a bytearray's."""
    return np.empty(nbytes, np.uint8).data


def found(key: str, sealed: Sealed | None) -> Found:
    """What a blob that was read holds. Raises FormatVersionError."""
    try:
        return _opened(key, sealed)
    except CorruptBlob as error:
        return error


def _opened(key: str, sealed: Sealed | None) -> memoryview | None:
    if sealed is None:
        return None
    header, payload = sealed
    envelope.verify(key, header, payload)
    return payload


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key) or len(key) > _MAX_KEY or max(map(len, key.split("/"))) > _MAX_SEGMENT:
        raise InvalidKey(f"not a key: {key[:80]!r}")
    return key
