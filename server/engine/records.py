"""The records of files: in the store, where every replica finds them, and as last seen, for when the store is away."""

from __future__ import annotations

import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from kvstore.base import Store
from kvstore.errors import CorruptBlob, StoreError, StoreFull, StoreUnavailable
from kvstore.key import ContentKey
from server.engine.record import RECORDS, FileRecord

_FILE_ID = re.compile(r"file-[0-9a-f]{24}")
_LOCK_TTL_S = 10.0
_LOCK_PATIENCE_S = 15.0
_LOCK_POLL_S = 0.01
_AWAY_S = 1.0
_log = logging.getLogger(__name__)


class Records:
    """Reads go through to the store, because other replicas change and delete what this one has seen. While the store
    cannot be read, ``get`` tells what was last seen.

    Any thread may call any method. All but ``seen`` and ``all_seen`` may block on the store and raise StoreError.
    """

    def __init__(self, store: Store, on_gone: Callable[[FileRecord], None]) -> None:
        """``on_gone`` gets every record that was seen here and has been deleted, at whatever replica."""
        self._store = store
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._seen: dict[str, FileRecord] = {}
        self._away_until_s = 0.0

    def seen(self, file_id: str) -> FileRecord | None:
        return self._seen.get(file_id)

    def all_seen(self) -> list[FileRecord]:
        with self._lock:
            return list(self._seen.values())

    def get(self, file_id: str) -> FileRecord | None:
        """The record as the store has it; None if there is none."""
        if not _FILE_ID.fullmatch(file_id):
            return None
        seen = self._seen.get(file_id)
        if seen is not None and time.monotonic() < self._away_until_s:
            return seen
        try:
            record = self._parse(file_id, self._store.get(f"{RECORDS}{file_id}"))
        except CorruptBlob as error:
            record = self._repair(file_id, error)
        except StoreUnavailable:
            # Nobody waits for a store that has just failed to answer.
            self._away_until_s = time.monotonic() + _AWAY_S
            if seen is None:
                raise
            return seen
        self._note(file_id, record)
        return record

    def all(self) -> list[FileRecord]:
        """Every record, in no particular order."""
        before = [record.id for record in self.all_seen()]
        ids = [blob.removeprefix(RECORDS) for blob in self._store.keys(RECORDS)]
        blobs = self._store.get_many([f"{RECORDS}{file_id}" for file_id in ids])
        found = {}
        for file_id, data in zip(ids, blobs, strict=True):
            try:
                if isinstance(data, CorruptBlob):
                    raise data
                record = self._parse(file_id, data)
            except CorruptBlob as error:
                record = self._repair(file_id, error)
            if record is not None:
                found[file_id] = record
                self._note(file_id, record)
        for file_id in before:
            # A listing may miss what is replaced meanwhile, and a file that is deleted takes its prefill with it.
            record = found.get(file_id) or self.get(file_id)
            if record is not None:
                found[file_id] = record
        return list(found.values())

    def put(self, record: FileRecord) -> None:
        """Writes a record; inside :meth:`changing` only, so that a deleted one does not come back."""
        self._store.put(record.blob, record.to_json())
        with self._lock:
            self._seen[record.id] = record

    def delete(self, record: FileRecord) -> bool:
        """Whether there was one. Inside :meth:`changing` only."""
        deleted = self._store.delete(record.blob)
        self._note(record.id, None)
        return deleted

    def change(self, record: FileRecord, change: Callable[[FileRecord], FileRecord]) -> FileRecord | None:
        """Changes a record as the store has it now; None if it was deleted."""
        with self.changing(record.content):
            now = self.get(record.id)
            if now is None:
                return None
            changed = change(now)
            if changed != now:
                self.put(changed)
            return changed

    @contextmanager
    def changing(self, content: ContentKey) -> Iterator[None]:
        """One change at a time, over all replicas, to the files that hold ``content``.

        Raises StoreUnavailable if another one takes too long.
        """
        name, owner = content.root.rstrip("/"), uuid.uuid4().hex
        end_s = time.monotonic() + _LOCK_PATIENCE_S
        while not self._lock_content(name, owner):
            if time.monotonic() > end_s:
                raise StoreUnavailable("this file is being changed elsewhere: try again")
            time.sleep(_LOCK_POLL_S)
        try:
            yield
        finally:
            with suppress(StoreError):  # it lapses by itself
                self._store.release_lock(name, owner)

    def _lock_content(self, name: str, owner: str) -> bool:
        try:
            return self._store.acquire_lock(name, owner, _LOCK_TTL_S)
        except StoreFull:
            return True  # deleting makes room, so it must not need any; whatever else is changed needs room itself

    def _note(self, file_id: str, record: FileRecord | None) -> None:
        with self._lock:
            if record is not None:
                self._seen[file_id] = record
                return
            gone = self._seen.pop(file_id, None)
        if gone is not None:
            self._on_gone(gone)

    def _parse(self, file_id: str, data: bytearray | memoryview | None) -> FileRecord | None:
        return None if data is None else FileRecord.from_json(bytes(data))

    def _repair(self, file_id: str, error: CorruptBlob) -> FileRecord | None:
        """A damaged record is written again as it was last seen; one that never was is left out."""
        _log.error("a file record is damaged: %s", error)
        seen = self._seen.get(file_id)
        if seen is not None:
            self._store.put(seen.blob, seen.to_json())
        return seen
