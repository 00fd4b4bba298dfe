"""How fast L-KVs come back from each store, against reading the same bytes in the plainest way."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import redis
import torch

from compression.kv import ChunkKV
from kvstore import codec
from kvstore.base import Store, new_buffer
from kvstore.key import KVKey
from kvstore.open import open_store
from kvstore.redis import CONNECTIONS, PART_NBYTES, READ_NBYTES
from kvstore.video import VideoStore
from server.bench.arrival import measure_arrival
from server.bench.circumstances import circumstances
from server.bench.redis_server import RedisMissing, redis_server
from server.spool import Spool

LAYERS, KV_HEADS, HEAD_DIM = 28, 4, 128
"""Qwen2-7B, which Video-XL is made of: 57,344 bytes of bfloat16 a token."""
LEAST_SHARE = {"memory": 0.85, "disk": 0.85, "redis": 0.7}
FOLLOW_UP_CHUNKS = 16
_NUM_CHUNKS = 6
_KEY = KVKey("0" * 64)


@dataclass(frozen=True)
class _Tier:
    """A store that holds the chunks' L-KVs, and ways to read as many plain bytes from the same medium."""

    name: str
    store: Store
    floors: dict[str, Callable[[Sequence[int]], object]]


def run_reload(
    *, chunk_mb: float, top: int, repeats: int, follow_ups: int, redis_url: str | None, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Both measurements, as the JSON that is published. ``redis_url`` None starts a redis-server; without one there is
    no row for Redis. Raises StoreError."""
    result = circumstances("x2l") | {
        "load_average": round(os.getloadavg()[0], 1),  # others' work slows both sides, not always alike
        "arguments": {"chunk_mb": chunk_mb, "top": top, "repeats": repeats, "follow_ups": follow_ups},
        "kv": {"layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
    }
    with ExitStack() as stack:
        folder = stack.enter_context(closing(Spool())).folder
        if redis_url is None:
            try:
                redis_url = stack.enter_context(redis_server())
            except RedisMissing as error:
                tell(f"without Redis: {error}")
        tell("throughput")
        result["throughput"] = measure_throughput(
            folder, redis_url, chunk_nbytes=round(chunk_mb * 1e6), top=top, repeats=repeats
        )
        if follow_ups:
            result["follow_up"] = _follow_up(folder, redis_url, follow_ups, tell)
    return result


def _follow_up(folder: Path, redis_url: str | None, repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    from server.bench.follow_up import measure_follow_up
    from server.models.tiny.make_video import make_video

    video = folder / "video.mp4"
    make_video(video, seed=500, chunks=FOLLOW_UP_CHUNKS)
    questions = [question["question"] for question in json.loads(video.with_suffix(".json").read_text())["questions"]]
    urls = {"memory": "memory://", "disk": f"disk:{folder}/store", "redis": redis_url}
    rows = []
    for tier, url in urls.items():
        if url is not None:
            tell(f"time to the first token, {tier}")
            row = measure_follow_up(url, video, questions, repeats, restart=tier != "memory")
            rows.append({"tier": tier, **row})
    return {"model": "x2l-tiny", "chunks": FOLLOW_UP_CHUNKS, "tiers": rows}


def measure_throughput(
    folder: Path, redis_url: str | None, *, chunk_nbytes: int, top: int, repeats: int
) -> list[dict[str, Any]]:
    """One row a tier; without ``redis_url`` none for Redis.

    A re-load reads the L-KVs of ``top`` of 6 chunks, other ones each time, to tensors on the CPU, checksums verified;
    ``arrival`` of a row takes them to the device that models run on (see :func:`measure_arrival`).
    It takes turns with the floor: the same bytes as plain files read into fresh memory (disk), as plain GETs of 8 MB
    on one or on several connections, whichever is faster (redis), or copied (memory). Files lie in the page cache.
    """
    tokens = max(1, chunk_nbytes // (2 * 2 * LAYERS * KV_HEADS * HEAD_DIM))
    keys, values = torch.randn(2, LAYERS, KV_HEADS, tokens, HEAD_DIM).to(torch.bfloat16)
    kv = ChunkKV(keys, values, "low", 2)
    rows = []
    for open_tier in (_memory, _disk, _redis):
        with ExitStack() as stack:
            tier = stack.enter_context(open_tier(codec.encode(kv), folder, redis_url))
            if tier is not None:
                rows.append(_measure(tier, kv, top, repeats))
    return rows


def _measure(tier: _Tier, kv: ChunkKV, top: int, repeats: int) -> dict[str, Any]:
    videos, has_gpu = VideoStore(tier.store), torch.cuda.is_available()
    taken: dict[str, list[float]] = {name: [] for name in ("re-load", *tier.floors)}
    turns = [[(turn * top + offset) % _NUM_CHUNKS for offset in range(top)] for turn in range(-1, repeats)]
    for turn, indices in enumerate(turns, -1):  # the first one warms up
        read_low = {"re-load": lambda indices: videos.read_low(_KEY, indices)}
        for name, read in (tier.floors | read_low).items():
            begin_s = time.perf_counter()
            found: Any = read(indices)
            taken[name].append(time.perf_counter() - begin_s)
            if name == "re-load" and turn < 0 and not all(_same(kv, one) for one in found):
                raise RuntimeError(f"the {tier.name} store gives back something else")
            del found
    speeds = {name: kv.nbytes * top / median(times[1:]) / 1e9 for name, times in taken.items()}
    reload = speeds.pop("re-load")
    share = reload / max(speeds.values())
    return {
        "tier": tier.name,
        "reload_gb_s": round(reload, 2),
        "floor_gb_s": {name: round(speed, 2) for name, speed in speeds.items()},
        "share": round(share, 3),
        "at_least": LEAST_SHARE[tier.name],
        "met": share >= LEAST_SHARE[tier.name],
        "reload_ms": round(1000 * median(taken["re-load"][1:]), 1),
        "reload_mb": round(kv.nbytes * top / 1e6, 1),
        "arrival": measure_arrival(videos, _KEY, kv, turns, torch.device("cuda" if has_gpu else "cpu")),
    }


def _same(expected: ChunkKV, found: object) -> bool:
    return isinstance(found, ChunkKV) and found.keys.equal(expected.keys) and found.values.equal(expected.values)


def _fill(store: Store, data: bytearray) -> None:
    for index in range(_NUM_CHUNKS):
        store.put(_KEY.low(index), data)


@contextmanager
def _memory(data: bytearray, folder: Path, redis_url: str | None) -> Iterator[_Tier]:
    store = open_store("memory://")
    _fill(store, data)
    plain = [new_buffer(len(data)) for _ in range(_NUM_CHUNKS)]
    for buffer in plain:
        buffer[:] = data

    def copy(indices: Sequence[int]) -> object:
        copies = [new_buffer(len(data)) for _ in indices]
        for index, room in zip(indices, copies, strict=True):
            room[:] = plain[index]
        return copies

    yield _Tier("memory", store, {"copy": copy})
    store.close()


@contextmanager
def _disk(data: bytearray, folder: Path, redis_url: str | None) -> Iterator[_Tier]:
    with tempfile.TemporaryDirectory(dir=folder, prefix="x2l-reload-") as inside:
        store = open_store(f"disk:{inside}/store")
        _fill(store, data)
        paths = [Path(inside) / f"plain-{index}" for index in range(_NUM_CHUNKS)]
        for path in paths:
            path.write_bytes(data)

        def read(indices: Sequence[int]) -> object:
            buffers = []
            for index in indices:
                fd = os.open(paths[index], os.O_RDONLY)
                buffers.append(new_buffer(len(data)))
                os.readv(fd, [buffers[-1]])
                os.close(fd)
            return buffers

        yield _Tier("disk", store, {"file read": read})
        store.close()


@contextmanager
def _redis(data: bytearray, folder: Path, redis_url: str | None) -> Iterator[_Tier | None]:
    if redis_url is None:
        yield None
        return
    store = open_store(redis_url, cache_nbytes=0)
    client = redis.Redis.from_url(redis_url, protocol=3, socket_read_size=READ_NBYTES)
    starts = range(0, len(data), PART_NBYTES)
    names = [[f"x2l-bench:{index}:{start}" for start in starts] for index in range(_NUM_CHUNKS)]
    threads = ThreadPoolExecutor(CONNECTIONS)
    try:
        _fill(store, data)
        for of_chunk in names:
            for name, start in zip(of_chunk, starts, strict=True):
                client.set(name, bytes(data[start : start + PART_NBYTES]))

        def in_turn(indices: Sequence[int]) -> object:
            return [client.get(name) for index in indices for name in names[index]]

        def at_once(indices: Sequence[int]) -> object:
            return list(threads.map(client.get, [name for index in indices for name in names[index]]))

        yield _Tier("redis", store, {"GETs on 1 connection": in_turn, f"GETs on {CONNECTIONS} connections": at_once})
    finally:
        threads.shutdown()
        for index, of_chunk in enumerate(names):
            store.delete(_KEY.low(index))
            client.unlink(*of_chunk)
        client.close()
        store.close()
