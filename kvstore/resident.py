"""H-KVs on the device: a byte budget, least recently used videos out first, never one that is in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from compression.kv import ChunkKV
from compression.segments import RotatedKV
from kvstore.errors import PoolError, PoolFull, VideoTooLarge
from kvstore.key import KVKey


@dataclass(frozen=True, slots=True)
class HighKV:
    """What stays on the device of one video: the prefix and the H-KV of every chunk, in time order."""

    prefix: ChunkKV
    chunks: Sequence[ChunkKV]

    @property
    def nbytes(self) -> int:
        return self.prefix.nbytes + sum(chunk.nbytes for chunk in self.chunks)

    def brought(self, bring: Callable[[Tensor], Tensor]) -> HighKV:
        """The same where ``bring`` takes tensors."""
        return HighKV(self.prefix.brought(bring), tuple(chunk.brought(bring) for chunk in self.chunks))


Kept = HighKV | RotatedKV
"""A video's H-KVs as they are put into every cache by a copy, or as all caches see them."""


@dataclass(slots=True, eq=False)
class _Resident:
    kv: Kept
    nbytes: int
    num_leases: int = 0


class Lease:
    """The right to use ``kv`` until ``release`` (or the end of a ``with`` block): it is not evicted before."""

    def __init__(self, pool: ResidentPool, resident: _Resident) -> None:
        self._pool = pool
        self._resident: _Resident | None = resident

    @property
    def kv(self) -> Kept:
        """Raises PoolError once released."""
        if self._resident is None:
            raise PoolError("the lease has ended")
        return self._resident.kv

    def release(self) -> None:
        """Ends the lease; a second call does nothing."""
        with self._pool._lock:
            resident, self._resident = self._resident, None
            if resident is not None:
                self._pool._release(resident)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class ResidentPool:
    """H-KVs by key, at most ``budget_nbytes`` of them (None: no bound), for any number of threads at once."""

    def __init__(self, budget_nbytes: int | None = None, keep: Callable[[HighKV], Kept] = lambda kv: kv) -> None:
        """``keep`` makes of a video what stays of it, which must not be larger."""
        self._keep = keep
        self._budget_nbytes = budget_nbytes
        self._lock = threading.Lock()
        self._videos: OrderedDict[KVKey, _Resident] = OrderedDict()  # least recently used first
        self._discarded: set[_Resident] = set()  # discarded while leased: out of sight, still holding their bytes
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes held, those of discarded videos still leased included."""
        return self._nbytes

    @property
    def num_leases(self) -> int:
        with self._lock:
            return sum(resident.num_leases for resident in (*self._videos.values(), *self._discarded))

    def __contains__(self, key: KVKey) -> bool:
        with self._lock:
            return key in self._videos

    def __len__(self) -> int:
        return len(self._videos)

    def put(self, key: KVKey, kv: HighKV) -> Lease:
        """Makes ``kv`` resident and leases it; where ``key`` is resident already, ``kv`` is dropped for what is there.

        Videos without a lease are evicted as needed, least recently used first. Raises PoolFull when that does not
        make room, VideoTooLarge when nothing could; either way nothing is evicted.
        """
        with self._lock:
            return self._lease_all([key], {key: kv})[0]

    def lease(self, key: KVKey) -> Lease | None:
        """None if ``key`` is not resident."""
        leases = self.lease_all([key], {})
        return None if leases is None else leases[0]

    def lease_all(self, keys: Sequence[KVKey], loaded: Mapping[KVKey, HighKV]) -> list[Lease] | None:
        """Leases on all of ``keys``, or on none: None if one is neither resident nor in ``loaded``, which becomes
        resident as in :meth:`put`.

        Whoever needs several videos must take them at once: two that each held one and waited for another's room would
        wait for ever. Raises as :meth:`put` does.
        """
        with self._lock:
            if any(key not in self._videos and key not in loaded for key in keys):
                return None
            return self._lease_all(keys, loaded)

    def discard(self, key: KVKey) -> bool:
        """Forgets ``key``; whether it was resident. Leases on it stay good, and its bytes go with the last of them."""
        with self._lock:
            resident = self._videos.pop(key, None)
            if resident is None:
                return False
            if resident.num_leases:
                self._discarded.add(resident)
            else:
                self._nbytes -= resident.nbytes
            return True

    def check_integrity(self) -> None:
        """Raises PoolError unless the books balance; cheap enough for every idle moment."""
        with self._lock:
            held = [*self._videos.values(), *self._discarded]
            nbytes = sum(resident.kv.nbytes for resident in held)
            if nbytes != self._nbytes:
                raise PoolError(f"the pool holds {nbytes} bytes and counts {self._nbytes}")
            if self._budget_nbytes is not None and nbytes > self._budget_nbytes:
                raise PoolError(f"the pool holds {nbytes} bytes, over its budget of {self._budget_nbytes}")
            if any(resident.num_leases < 0 for resident in held) or not all(r.num_leases for r in self._discarded):
                raise PoolError("a video was released more often than leased")

    def _lease_all(self, keys: Sequence[KVKey], loaded: Mapping[KVKey, HighKV]) -> list[Lease]:
        new = {key: kv for key, kv in loaded.items() if key not in self._videos}
        self._make_room(sum(kv.nbytes for kv in new.values()), set(keys))
        for key, high in new.items():
            kept = self._keep(high)
            self._videos[key] = resident = _Resident(kept, kept.nbytes)
            self._nbytes += resident.nbytes
        return [self._lease(key, self._videos[key]) for key in keys]

    def _make_room(self, nbytes: int, spared: Set[KVKey]) -> None:
        if self._budget_nbytes is None:
            return
        together = nbytes + sum(resident.nbytes for key, resident in self._videos.items() if key in spared)
        if together > self._budget_nbytes:
            raise VideoTooLarge(
                f"the H-KVs that are needed together take {together} bytes, the device pool has {self._budget_nbytes}"
            )
        excess = self._nbytes + nbytes - self._budget_nbytes
        victims = []
        for key, resident in self._videos.items():
            if excess <= 0:
                break
            if not resident.num_leases and key not in spared:
                victims.append(key)
                excess -= resident.nbytes
        if excess > 0:
            raise PoolFull(f"{nbytes} bytes of H-KVs do not fit beside those in use, {excess} too many")
        for key in victims:
            self._nbytes -= self._videos.pop(key).nbytes

    def _lease(self, key: KVKey, resident: _Resident) -> Lease:
        self._videos.move_to_end(key)
        resident.num_leases += 1
        return Lease(self, resident)

    def _release(self, resident: _Resident) -> None:
        resident.num_leases -= 1
        if not resident.num_leases and resident in self._discarded:
            self._discarded.remove(resident)
            self._nbytes -= resident.nbytes
