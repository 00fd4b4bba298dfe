"""From the URL that `--store` takes to a store."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from kvstore.base import NewBuffer, Store, new_buffer
from kvstore.disk import DiskStore
from kvstore.errors import InvalidStoreURL, StoreUnavailable
from kvstore.memory import MemoryStore
from kvstore.redis import RedisStore
from kvstore.tiered import TieredStore

DEFAULT_CACHE_NBYTES = 2**30
"""Host memory before a Redis. There is none before a disk, whose files the system keeps in memory by itself."""

_KNOWN = "known stores: memory://, disk:PATH, redis://HOST and rediss://HOST"
_RETRY_S = 0.5


def open_store(
    url: str,
    *,
    cache_nbytes: int | None = None,
    cache_buffers: Callable[[int], NewBuffer] = lambda nbytes: new_buffer,
    wait_s: float = 0.0,
) -> Store:
    """Opens ``memory://``, ``disk:PATH`` (``~`` is the home folder; the folder is made if missing) or a Redis.

    ``cache_nbytes`` of host memory keep what is read from it (see TieredStore; 0: none; None: as the store needs it),
    in buffers that are made by what ``cache_buffers`` gives for so many bytes. A store that cannot be reached is tried
    again for ``wait_s``. Raises InvalidStoreURL, FormatVersionError, and StoreUnavailable when the store cannot be
    opened.
    """
    end_s = time.monotonic() + wait_s
    while True:
        try:
            store = _open(url)
            break
        except StoreUnavailable:
            if time.monotonic() + _RETRY_S > end_s:
                raise
            time.sleep(_RETRY_S)
    if cache_nbytes is None:
        cache_nbytes = DEFAULT_CACHE_NBYTES if isinstance(store, RedisStore) else 0
    if not cache_nbytes or isinstance(store, MemoryStore):
        return store
    return TieredStore(store, cache_nbytes, cache_buffers(cache_nbytes))


def _open(url: str) -> Store:
    scheme, colon, rest = url.partition(":")
    if not colon:
        raise InvalidStoreURL(f"no scheme in the store URL ({_KNOWN})")
    if scheme == "memory" and rest == "//":
        return MemoryStore()
    if scheme == "disk" and rest and not rest.startswith("//"):
        return DiskStore(Path(rest).expanduser())
    if scheme in ("redis", "rediss") and rest.startswith("//"):
        return RedisStore(url)
    raise InvalidStoreURL(f"not a store URL of scheme {scheme[:20]!r} ({_KNOWN})")


def without_password(url: str) -> str:
    """``url`` as it may be shown."""
    return re.sub(r"^(rediss?://)[^/?#]*@", r"\1***@", url)
