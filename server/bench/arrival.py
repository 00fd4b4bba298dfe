"""From a store to the device, as an answer sees the L-KVs: as the engine brings them, and one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any

import torch

from compression.kv import ChunkKV
from compression.rope import Rope
from compression.segments import RotatedKV
from kvstore.base import NewBuffer
from kvstore.errors import CorruptBlob, MissingBlob
from kvstore.key import KVKey
from kvstore.video import VideoStore
from server.engine.options import EngineOptions
from server.engine.transfer import Arrival, Transfer

_ROPE = Rope(128, 1_000_000.0)


def measure_arrival(
    videos: VideoStore, key: KVKey, kv: ChunkKV, turns: Sequence[Sequence[int]], device: torch.device
) -> dict[str, Any]:
    """One row: medians over ``turns``, each of which re-loads the L-KVs of some chunks, that are all ``kv``.

    ``ms`` is as the engine does it: every chunk on a thread, through pinned memory, on a stream beside the others',
    and rotated there. ``in_turn_ms`` reads all in one call, copies them from where they lie, and rotates. The floor
    copies as many bytes that lie in pinned memory.
    """
    threads = EngineOptions().reader_threads
    transfer = Transfer(device, threads)
    taken: dict[str, list[float]] = {"ms": [], "in_turn_ms": [], "floor_ms": []}
    plain = torch.empty(kv.keys.nbytes + kv.values.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    with ThreadPoolExecutor(threads) as pool, torch.inference_mode():
        ways: dict[str, Callable[[Sequence[int]], Sequence[RotatedKV | torch.Tensor]]] = {
            "ms": lambda indices: [
                _taken(arrival) for arrival in pool.map(partial(_bring, transfer, videos, key), indices)
            ],
            "in_turn_ms": lambda indices: [
                _prepare(_read(found).to(device)) for found in videos.read_low(key, indices)
            ],
            "floor_ms": lambda indices: [plain.to(device, non_blocking=True, copy=True) for _ in indices],
        }
        expected = _prepare(kv.to(device))
        for number, indices in enumerate(turns):
            for name, way in ways.items():
                begin_s = time.perf_counter()
                found = way(indices)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                taken[name].append(1000 * (time.perf_counter() - begin_s))
                rotated = [one for one in found if isinstance(one, RotatedKV)]
                if not number and any(not _same(one, expected) for one in rotated):
                    raise RuntimeError("what arrives is something else")
                del found, rotated
    row: dict[str, Any] = {name: round(median(times[1:] or times), 2) for name, times in taken.items()}
    return row | {
        "device": str(device),
        "gb_s": round(kv.nbytes * len(turns[0]) / row["ms"] / 1e6, 2),
        "in_turn_gb_s": round(kv.nbytes * len(turns[0]) / row["in_turn_ms"] / 1e6, 2),
        "times_in_turn": round(row["in_turn_ms"] / row["ms"], 2),
    }


def _bring(transfer: Transfer, videos: VideoStore, key: KVKey, index: int) -> Arrival | MissingBlob | CorruptBlob:
    def read(buffer: NewBuffer) -> ChunkKV | MissingBlob | CorruptBlob:
        return videos.read_low_of([(key, index)], buffer)[0]

    return transfer.bring(read, _prepare)


def _prepare(kv: ChunkKV) -> RotatedKV:
    return RotatedKV.of([kv], _ROPE)


def _taken(arrival: Arrival | MissingBlob | CorruptBlob) -> RotatedKV:
    if isinstance(arrival, Arrival):
        taken = arrival.take()
        assert isinstance(taken, RotatedKV)
        return taken
    raise arrival


def _read(found: ChunkKV | MissingBlob | CorruptBlob) -> ChunkKV:
    if isinstance(found, ChunkKV):
        return found
    raise found


def _same(one: RotatedKV, other: RotatedKV) -> bool:
    return one.keys.equal(other.keys) and one.values.equal(other.values)
