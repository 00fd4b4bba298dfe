"""A bound on what a store holds: whole videos go, least recently used first."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from kvstore.base import Store
from kvstore.content import ContentStore
from kvstore.errors import QuotaExceeded
from kvstore.key import UPLOADS, ContentKey, KVKey
from kvstore.video import VideoStore

_UNITS: dict[str, type[KVKey] | type[ContentKey]] = {"kv": KVKey, "content": ContentKey}
WRITING_S = 600.0
"""What has no manifest and was written to within this time is being written, maybe by another replica."""


@dataclass(slots=True)
class _Usage:
    nbytes: int = 0
    used_s: float = 0.0
    committed: bool = False


class Quota:
    """Keeps ``store`` within ``limit_nbytes``, which count KVs, kept files and uploads in parts.

    A video's KVs are one unit and its kept file is another; each goes as a whole, its manifest first. What was never
    committed goes by its newest blob, but not before WRITING_S: the leavings of a crash go in their turn, and what
    another replica is writing stays. Uploads in parts never go: they expire.

    Replicas that share a store each apply the quota. Two that write at the same moment may both find the same room;
    the next one to look takes away what is over.
    """

    def __init__(self, store: Store, limit_nbytes: int) -> None:
        self._store = store
        self._videos = VideoStore(store)
        self._contents = ContentStore(store)
        self._limit_nbytes = limit_nbytes

    def check_room(self, nbytes: int, in_use: Collection[KVKey | ContentKey] = ()) -> None:
        """Raises QuotaExceeded if ``make_room`` would. Removes nothing."""
        self._victims(nbytes, in_use)

    def make_room(self, nbytes: int = 0, in_use: Collection[KVKey | ContentKey] = ()) -> list[KVKey | ContentKey]:
        """Removes what it takes for ``nbytes`` more to fit, nothing of ``in_use``, and tells what was removed.

        Raises QuotaExceeded, with nothing removed, when even that would not do. Looks at every blob's size and age:
        call it once a chunk or file, not once a blob.
        """
        victims = self._victims(nbytes, in_use)
        for key in victims:
            if isinstance(key, KVKey):
                self._videos.delete(key)
            else:
                self._contents.delete(key)
        return victims

    def _victims(self, nbytes: int, in_use: Collection[KVKey | ContentKey]) -> list[KVKey | ContentKey]:
        units, uploads_nbytes = self._usage()
        excess = sum(usage.nbytes for usage in units.values()) + uploads_nbytes + nbytes - self._limit_nbytes
        written_s = time.time() - WRITING_S
        victims: list[KVKey | ContentKey] = []
        for key, usage in sorted(units.items(), key=lambda unit: unit[1].used_s):
            if excess <= 0:
                break
            if key not in in_use and (usage.committed or usage.used_s < written_s):
                victims.append(key)
                excess -= usage.nbytes
        if excess > 0:
            raise QuotaExceeded(
                f"the store's quota of {self._limit_nbytes} bytes has no room for {nbytes} more: "
                f"{excess} too many even without every video that is neither pinned nor in use"
            )
        return victims

    def _usage(self) -> tuple[dict[KVKey | ContentKey, _Usage], int]:
        """The units, and the bytes of uploads in parts."""
        units: defaultdict[KVKey | ContentKey, _Usage] = defaultdict(_Usage)
        uploads_nbytes = 0
        for blob, stat in self._store.stats():
            kind, _, rest = blob.partition("/")
            if f"{kind}/" == UPLOADS:
                uploads_nbytes += stat.nbytes
            elif kind in _UNITS:
                key = _UNITS[kind](rest.partition("/")[0])
                usage = units[key]
                usage.nbytes += stat.nbytes
                usage.used_s = max(usage.used_s, stat.used_s)
                usage.committed |= blob == key.manifest
        return units, uploads_nbytes
