"""A bound on what a store holds: whole videos go, least recently used first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from kvstore.base import Store
from kvstore.content import ContentStore
from kvstore.errors import StoreFull
from kvstore.key import ContentKey, KVKey
from kvstore.video import VideoStore


@dataclass(slots=True)
class _Usage:
    nbytes: int = 0
    used_s: float = 0.0


class Quota:
    """Keeps ``store`` within ``limit_nbytes``.

    A video's KVs are one unit and its kept file is another; each goes as a whole, its manifest first. What was never
    committed counts by its newest blob, so the leavings of a crash go in their turn.
    """

    def __init__(self, store: Store, limit_nbytes: int) -> None:
        self._store = store
        self._videos = VideoStore(store)
        self._contents = ContentStore(store)
        self._limit_nbytes = limit_nbytes

    def make_room(self, nbytes: int = 0, in_use: Collection[KVKey | ContentKey] = ()) -> list[KVKey | ContentKey]:
        """Removes what it takes for ``nbytes`` more to fit, nothing of ``in_use``, and tells what was removed.

        Raises StoreFull, with nothing removed, when even that would not do. Looks at every blob's size and age: call it
        once a chunk or file, not once a blob.
        """
        units: defaultdict[KVKey | ContentKey, _Usage] = defaultdict(_Usage)
        for kind, key_type in (("kv/", KVKey), ("content/", ContentKey)):
            for blob in self._store.keys(kind):
                stat = self._store.stat(blob)
                if stat is not None:
                    usage = units[key_type(blob.split("/")[1])]
                    usage.nbytes += stat.nbytes
                    usage.used_s = max(usage.used_s, stat.used_s)
        excess = sum(usage.nbytes for usage in units.values()) + nbytes - self._limit_nbytes
        victims: list[KVKey | ContentKey] = []
        for key, usage in sorted(units.items(), key=lambda unit: unit[1].used_s):
            if excess <= 0:
                break
            if key not in in_use:
                victims.append(key)
                excess -= usage.nbytes
        if excess > 0:
            raise StoreFull(
                f"the store's quota of {self._limit_nbytes} bytes has no room for {nbytes} more: "
                f"{excess} too many even without every video that is not in use"
            )
        for key in victims:
            if isinstance(key, KVKey):
                self._videos.delete(key)
            else:
                self._contents.delete(key)
        return victims
