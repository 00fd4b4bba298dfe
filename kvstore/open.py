"""From the URL that `--store` takes to a store."""

from __future__ import annotations

from pathlib import Path

from kvstore.base import Store
from kvstore.disk import DiskStore
from kvstore.errors import InvalidStoreURL
from kvstore.memory import MemoryStore


def open_store(url: str) -> Store:
    """Opens ``memory://`` or ``disk:PATH`` (``~`` is the home folder; the folder is made if missing).

    Raises InvalidStoreURL, and StoreUnavailable when the store cannot be opened.
    """
    known = "known stores: memory:// and disk:PATH"
    scheme, colon, rest = url.partition(":")
    if not colon:
        raise InvalidStoreURL(f"no scheme in the store URL ({known})")
    if scheme == "memory" and rest == "//":
        return MemoryStore()
    if scheme == "disk" and rest and not rest.startswith("//"):
        return DiskStore(Path(rest).expanduser())
    if scheme in ("redis", "rediss"):
        raise InvalidStoreURL(f"{scheme}:// stores are not supported yet ({known})")
    raise InvalidStoreURL(f"not a store URL of scheme {scheme[:20]!r} ({known})")
