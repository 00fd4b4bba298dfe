"""The KVs of videos in a store: written chunk by chunk, committed by the manifest, read back at need."""

from __future__ import annotations

from collections.abc import Sequence

from compression.kv import ChunkKV
from kvstore import codec
from kvstore.base import NewBuffer, Store, Tier
from kvstore.errors import CorruptBlob, MissingBlob
from kvstore.key import KVKey, SampledKey
from kvstore.manifest import Manifest
from kvstore.resident import HighKV


class VideoStore:
    """What a video is made of, over any Store and as thread-safe as that.

    Whoever writes a video notes what it is made of, writes the prefix and every chunk, then commits. Until then
    ``manifest`` is None and the video does not exist for readers; an abandoned one is removed by ``delete``. Every
    method may raise StoreUnavailable; writing raises StoreFull, reading FormatVersionError.
    """

    def __init__(self, store: Store, low_precision: codec.Precision = "exact") -> None:
        """``low_precision`` is that of the L-KVs written here, and must be in their fingerprint; reading needs none."""
        self._store = store
        self._low_precision = low_precision

    def low_nbytes(self, low: ChunkKV) -> int:
        """Bytes of keys and values that an L-KV takes in the store."""
        return codec.stored_nbytes(low, self._low_precision)

    def note(self, key: KVKey, sampled: SampledKey) -> None:
        """Says, before any of the KVs under ``key`` is written, what they are made of: see :meth:`delete_made_of`."""
        self._store.put(sampled.note(key), b"")

    def write_prefix(self, key: KVKey, prefix: ChunkKV) -> None:
        self._store.put(key.prefix, codec.encode(prefix))

    def write_chunk(self, key: KVKey, index: int, low: ChunkKV, high: ChunkKV, thumbnail: bytes) -> None:
        """``thumbnail`` is a JPEG."""
        self._store.put(key.low(index), codec.encode(low, self._low_precision))
        self._store.put(key.high(index), codec.encode(high))
        self._store.put(key.thumbnail(index), thumbnail)

    def commit(self, key: KVKey, manifest: Manifest) -> None:
        """Makes the video visible. All its blobs must be written before."""
        self._store.put(key.manifest, manifest.to_json())

    def manifest(self, key: KVKey) -> Manifest | None:
        """None unless the video is committed. Raises CorruptBlob."""
        data = self._store.get(key.manifest)
        return None if data is None else Manifest.from_json(data)

    def read_high(self, key: KVKey) -> HighKV | None:
        """Prefix and every H-KV, on the CPU; None unless the video is committed. Raises CorruptBlob, MissingBlob."""
        manifest = self.manifest(key)
        if manifest is None:
            return None
        blobs = [key.prefix, *(key.high(index) for index in range(len(manifest.records)))]
        kvs = []
        for kv in self._read(blobs):
            if not isinstance(kv, ChunkKV):
                raise kv
            kvs.append(kv)
        return HighKV(kvs[0], tuple(kvs[1:]))

    def read_low(self, key: KVKey, indices: Sequence[int]) -> list[ChunkKV | MissingBlob | CorruptBlob]:
        """The L-KVs of the chunks ``indices``, in that order, on the CPU; see :meth:`read_low_of`."""
        return self.read_low_of([(key, index) for index in indices])

    def read_low_of(
        self, chunks: Sequence[tuple[KVKey, int]], buffer: NewBuffer | None = None
    ) -> list[ChunkKV | MissingBlob | CorruptBlob]:
        """The L-KVs of chunks of any videos, each by key and index, in one read, on the CPU; in memory from ``buffer``
        where the store reads straight into it.

        In the place of one that cannot be read stands the error that says why, so that the others still serve.
        """
        return self._read([key.low(index) for key, index in chunks], buffer)

    def low_tiers(self, chunks: Sequence[tuple[KVKey, int]]) -> list[Tier]:
        """Where :meth:`read_low_of` would find each now, without asking the medium."""
        return [self._store.tier(key.low(index)) for key, index in chunks]

    def read_chunk(self, key: KVKey, index: int) -> tuple[ChunkKV, ChunkKV] | None:
        """A chunk's L-KV and H-KV, on the CPU, whether or not the video is committed; None unless all that
        ``write_chunk`` wrote is there and undamaged, and is what it was given."""
        if self._low_precision != "exact":
            return None
        low, high = self._read([key.low(index), key.high(index)])
        if not (isinstance(low, ChunkKV) and isinstance(high, ChunkKV) and self._has_thumbnail(key, index)):
            return None
        return low, high

    def thumbnail(self, key: KVKey, index: int) -> bytearray | None:
        """JPEG. Raises CorruptBlob."""
        return self._store.get(key.thumbnail(index))

    def touch(self, key: KVKey) -> None:
        """Records a use of the video: the least recently used is the first that a quota removes."""
        self._store.touch(key.manifest)

    def delete(self, key: KVKey) -> bool:
        """Removes all blobs, manifest first so that half a video is never visible; whether it was committed."""
        committed = self._store.delete(key.manifest)
        for blob in list(self._store.keys(key.root)):
            self._store.delete(blob)
        return committed

    def delete_made_of(self, sampled: SampledKey) -> None:
        """Removes all that was noted as made of ``sampled``, under whatever fingerprint, and the notes."""
        for note in list(self._store.keys(sampled.root)):
            self.delete(KVKey(note.removeprefix(sampled.root)))
            self._store.delete(note)

    def _has_thumbnail(self, key: KVKey, index: int) -> bool:
        try:
            return self.thumbnail(key, index) is not None
        except CorruptBlob:
            return False

    def _read(self, blobs: Sequence[str], buffer: NewBuffer | None = None) -> list[ChunkKV | MissingBlob | CorruptBlob]:
        return [_decoded(blob, data) for blob, data in zip(blobs, self._store.get_many(blobs, buffer), strict=True)]


def _decoded(blob: str, data: memoryview | CorruptBlob | None) -> ChunkKV | MissingBlob | CorruptBlob:
    if data is None:
        return MissingBlob(f"{blob} is gone")
    if isinstance(data, CorruptBlob):
        return data
    try:
        return codec.decode(data)
    except CorruptBlob as error:
        return error
