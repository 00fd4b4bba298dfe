"""The store's quota, as files know it."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.base import Store
from kvstore.key import ContentKey, KVKey
from kvstore.quota import Quota
from server.engine.record import FileRecord
from server.engine.records import Records
from server.engine.video import Video
from server.engine.videos import Videos


class Room:
    """Keeps the store within its quota, and files informed of what it took from them."""

    def __init__(self, store: Store, limit_nbytes: int | None, records: Records, videos: Videos) -> None:
        """``limit_nbytes`` None is no quota."""
        self._store = store
        self._quota = None if limit_nbytes is None else Quota(store, limit_nbytes)
        self._records = records
        self._videos = videos

    def make(self, nbytes: int, video: Video | None = None) -> None:
        """Removes what is least recently used until ``nbytes`` more fit, nothing that is pinned or being prefilled and
        nothing of ``video``. Raises QuotaExceeded, with nothing removed, if they never would, and StoreError."""
        if self._quota is None:
            return
        records = self._records.all()
        removed = set(self._quota.make_room(nbytes, self._spared(records, video)))
        for record in records if removed else ():
            keys = (self._videos.key_of(record), record.content)
            if removed.intersection(keys):
                has_kvs, has_bytes = (self._store.stat(key.manifest) is not None for key in keys)
                self._videos.lose(record, has_kvs, has_bytes)

    def check(self, nbytes: int) -> None:
        """Raises QuotaExceeded if ``make`` would, and StoreError. Removes nothing."""
        if self._quota is not None:
            self._quota.check_room(nbytes, self._spared(self._records.all(), None))

    def _spared(self, records: Sequence[FileRecord], video: Video | None) -> set[KVKey | ContentKey]:
        videos = [*self._videos.busy(), *([] if video is None else [video])]
        keys: set[KVKey | ContentKey] = {key for other in videos for key in (other.key, other.content)}
        for record in records:
            if record.pinned:
                keys |= {self._videos.key_of(record), record.content}
        return keys
