"""How mixed caches are made of what is on the device: from copies, or from what they share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from compression.segments import Part, RotatedKV, SharedCache
from kvstore.key import KVKey
from kvstore.resident import HighKV
from server.models.base import VideoModel

LowKey = tuple[KVKey, int]
"""A video and the index of a chunk in it."""

Low = ChunkKV | RotatedKV
"""An L-KV on the device: to be copied into every cache, or as all caches see it."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A video's place in a cache: its H-KVs, and how far its chunks stand from where they were prefilled, if they
    bring positions of their own."""

    resident: object
    shift: int


class Caches(Protocol):
    """Used by the engine thread alone, but for :meth:`resident` and :meth:`prepare_low`."""

    nbytes: int
    """Bytes of L-KVs that stay on the device."""

    def resident(self, high: HighKV) -> HighKV | RotatedKV:
        """What stays on the device of a video whose H-KVs are there."""

    def chunks(self, videos: Sequence[Placed]) -> tuple[ChunkKV, ...]:
        """The H-KVs before RoPE of all videos, for scorers that read them."""

    def find_low(self, key: LowKey) -> Low | None:
        """An L-KV, if it is on the device already."""

    def prepare_low(self, kv: ChunkKV) -> Low:
        """What caches see of an L-KV that was read from the store and is on the device."""

    def add_low(self, key: LowKey, low: Low) -> Low:
        """A prepared L-KV, or the same that was there before."""

    def assemble(self, videos: Sequence[Placed], low: Mapping[int, Low], room: int) -> MixedCache:
        """Of one video or more: ``low`` in its places, counted through all of them, H-KVs in the others."""


class Copies:
    """Every cache has its own copy: the fastest to read where memory is not what counts."""

    nbytes = 0

    def __init__(self, model: VideoModel) -> None:
        self._model = model

    def resident(self, high: HighKV) -> HighKV:
        return high

    def chunks(self, videos: Sequence[Placed]) -> tuple[ChunkKV, ...]:
        return tuple(_moved(chunk, video.shift) for video in videos for chunk in _high(video).chunks)

    def find_low(self, key: LowKey) -> None:
        return None

    def prepare_low(self, kv: ChunkKV) -> ChunkKV:
        return kv

    def add_low(self, key: LowKey, low: Low) -> Low:
        return low

    def assemble(self, videos: Sequence[Placed], low: Mapping[int, Low], room: int) -> MixedCache:
        chunks: list[ChunkKV] = []
        for video in videos:
            for chunk in _high(video).chunks:
                chosen = low.get(len(chunks), chunk)
                assert isinstance(chosen, ChunkKV)
                chunks.append(_moved(chosen, video.shift))
        return MixedCache(_high(videos[0]).prefix, chunks, self._model.rope, room=room)


class Shares:
    """All caches see the same KVs: those of resident videos, and the L-KVs used last, which stay on the device up to a
    number of bytes. One that goes while a cache sees it is freed with the cache."""

    def __init__(self, model: VideoModel, low_nbytes: int) -> None:
        self._model = model
        self._low_nbytes = low_nbytes
        self._low: OrderedDict[LowKey, RotatedKV] = OrderedDict()  # least recently used first
        self.nbytes = 0

    def resident(self, high: HighKV) -> RotatedKV:
        return RotatedKV.of([high.prefix, *high.chunks], self._model.rope)

    def chunks(self, videos: Sequence[Placed]) -> tuple[ChunkKV, ...]:
        return ()

    def find_low(self, key: LowKey) -> RotatedKV | None:
        found = self._low.get(key)
        if found is not None:
            self._low.move_to_end(key)
        return found

    def prepare_low(self, kv: ChunkKV) -> RotatedKV:
        return RotatedKV.of([kv], self._model.rope)

    def add_low(self, key: LowKey, low: Low) -> Low:
        assert isinstance(low, RotatedKV)
        known = self.find_low(key)  # another question may have waited for it too
        if known is not None:
            return known
        if low.nbytes <= self._low_nbytes:
            self._low[key] = low
            self.nbytes += low.nbytes
        while self.nbytes > self._low_nbytes:
            self.nbytes -= self._low.popitem(last=False)[1].nbytes
        return low

    def assemble(self, videos: Sequence[Placed], low: Mapping[int, Low], room: int) -> MixedCache:
        parts: list[Part] = []
        place = 0
        for video in videos:
            resident = video.resident
            assert isinstance(resident, RotatedKV)
            parts += [] if parts else [Part(resident, 0)]
            for index in range(1, len(resident.spans)):
                chosen = low.get(place)
                assert chosen is None or isinstance(chosen, RotatedKV)
                part = Part(resident, index, video.shift) if chosen is None else Part(chosen, 0, video.shift)
                parts.append(part)
                place += 1
        return SharedCache(parts, self._model.rope, room=room)


def _high(video: Placed) -> HighKV:
    assert isinstance(video.resident, HighKV)
    return video.resident


def _moved(kv: ChunkKV, shift: int) -> ChunkKV:
    return kv.moved(shift) if shift else kv
