"""The bytes of files in a store: in parts, committed by a manifest, readable by range."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

from kvstore.base import Store
from kvstore.errors import CorruptBlob, MissingBlob

PART_NBYTES = 8_000_000
"""A value that every store takes well; a network store dislikes much larger ones."""


class Readable(Protocol):
    """A file opened for reading bytes."""

    def read(self, nbytes: int, /) -> bytes: ...


class FileKey(Protocol):
    """Where the blobs of one file lie: a ContentKey, or a PartKey."""

    @property
    def root(self) -> str: ...

    @property
    def manifest(self) -> str: ...

    def part(self, index: int, /) -> str: ...


@dataclass(frozen=True, slots=True)
class _ContentManifest:
    nbytes: int
    part_nbytes: int


_ADAPTER = TypeAdapter(_ContentManifest)


class Content:
    """The kept bytes of one file: ``nbytes`` of them."""

    def __init__(self, store: Store, key: FileKey, manifest: _ContentManifest) -> None:
        self._store = store
        self._key = key
        self._part_nbytes = manifest.part_nbytes
        self.nbytes = manifest.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes [start, stop), a part at a time; bounds clamp as a slice's.

        Raises CorruptBlob, MissingBlob, StoreUnavailable, when the part concerned is reached.
        """
        start, stop, _ = slice(start, stop).indices(self.nbytes)
        while start < stop:
            index, offset = divmod(start, self._part_nbytes)
            part = self._store.get(self._key.part(index))
            if part is None:
                raise MissingBlob(f"{self._key.part(index)} is gone")
            if len(part) != self._length(index):
                raise CorruptBlob(f"{self._key.part(index)} has another length than its manifest says")
            piece = bytes(memoryview(part)[offset : offset + stop - start])
            yield piece
            start += len(piece)

    def is_whole(self) -> bool:
        """Whether every part is there, as far as its size tells: none is read. Raises StoreUnavailable."""
        stats = (self._store.stat(self._key.part(index)) for index in range(-(-self.nbytes // self._part_nbytes)))
        return all(stat is not None and stat.nbytes == self._length(index) for index, stat in enumerate(stats))

    def _length(self, index: int) -> int:
        return min(self._part_nbytes, self.nbytes - index * self._part_nbytes)


class ContentStore:
    """Files in a Store, as thread-safe as the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(self, key: FileKey, file: Readable) -> None:
        """Keeps what ``file`` yields until its end; on an error only what was kept before. Raises StoreFull."""
        try:
            nbytes = index = 0
            while part := _read_part(file):
                self._store.put(key.part(index), part)
                nbytes += len(part)
                index += 1
            manifest = _ContentManifest(nbytes, PART_NBYTES)
            self._store.put(key.manifest, _ADAPTER.dump_json(manifest))
        except BaseException:
            # Parts written over an older copy are that copy's own bytes again: it is still whole.
            if self._store.stat(key.manifest) is None:
                self.delete(key)
            raise

    def get(self, key: FileKey) -> Content | None:
        """None unless the file is kept. Raises CorruptBlob, FormatVersionError."""
        data = self._store.get(key.manifest)
        if data is None:
            return None
        try:
            manifest = _ADAPTER.validate_json(data, strict=True)
        except ValidationError as error:
            raise CorruptBlob(f"{key.manifest} is not a manifest: {error}") from error
        return Content(self._store, key, manifest)

    def holds(self, key: FileKey) -> bool:
        """Whether the file is kept, with nothing missing and its manifest undamaged; its bytes are not read."""
        try:
            content = self.get(key)
        except CorruptBlob:
            return False
        return content is not None and content.is_whole()

    def touch(self, key: FileKey) -> None:
        """Records a use of the file, for the quota."""
        self._store.touch(key.manifest)

    def delete(self, key: FileKey) -> bool:
        """Removes all parts, the manifest first; whether the file was kept."""
        kept = self._store.delete(key.manifest)
        for blob in list(self._store.keys(key.root)):
            self._store.delete(blob)
        return kept


def _read_part(file: Readable) -> bytes:
    """PART_NBYTES from ``file``, or what is left of it: one read may return less than was asked for."""
    pieces = []
    missing = PART_NBYTES
    while missing and (piece := file.read(missing)):
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)
