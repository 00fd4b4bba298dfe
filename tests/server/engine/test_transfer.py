"""From a store's memory to a device's, through memory of a fixed size."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compression.kv import ChunkKV
from compression.rope import Rope
from compression.segments import RotatedKV
from kvstore.base import Store
from kvstore.disk import DiskStore
from kvstore.errors import MissingBlob
from kvstore.key import KVKey
from kvstore.memory import MemoryStore
from kvstore.tiered import TieredStore
from kvstore.video import VideoStore
from server.engine.pinned import kept_buffers
from server.engine.transfer import Arrival, Staging, Transfer

CPU = torch.device("cpu")
KEY = KVKey("0" * 64)
ROPE = Rope(16, 10_000.0, (2, 3, 3))


def make_kv(tokens: int, *, seed: int = 0, positions: bool = False) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 3, tokens, 16, generator=generator).to(torch.bfloat16) for _ in range(2))
    kv = ChunkKV(keys, values, "low", 2)
    own = torch.arange(tokens, dtype=torch.int32).expand(3, 1, 1, -1).contiguous()
    return dataclasses.replace(kv, positions=own, next_position=tokens) if positions else kv


def assert_same(a: ChunkKV, b: ChunkKV) -> None:
    assert a.keys.cpu().equal(b.keys) and a.values.cpu().equal(b.values)
    assert (a.positions is None) == (b.positions is None)
    assert a.positions is None or a.positions.cpu().equal(b.positions)
    assert (a.level, a.ratio, a.next_position) == (b.level, b.ratio, b.next_position)


def inside(staging: Staging, tensor: torch.Tensor) -> bool:
    return 0 <= tensor.data_ptr() - staging._memory.data_ptr() < len(staging._memory)


@given(st.integers(0, 5000), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.booleans())
@settings(deadline=None, max_examples=50)
@example(13, [1, 0], True)
def test_what_lies_elsewhere_goes_through_it_if_it_has_room(nbytes: int, sizes: list[int], positions: bool) -> None:
    staging = Staging(nbytes, pinned=False)
    kvs = [make_kv(tokens, seed=seed, positions=positions) for seed, tokens in enumerate(sizes)]
    for _ in range(2):
        staging.clear()
        for moved, kv in [(staging.move(kv, CPU), kv) for kv in kvs]:
            assert_same(moved, kv)
            for tensor in (moved.keys, moved.values):
                assert not tensor.numel() or not inside(staging, tensor)


def test_a_disk_is_read_straight_into_it(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    videos = VideoStore(store)
    kvs = [make_kv(tokens, seed=tokens, positions=True) for tokens in (30, 9, 400)]
    for index, kv in enumerate(kvs):
        videos.write_chunk(KEY, index, kv, kv, b"jpeg")
    staging = Staging(kvs[0].nbytes + 1000, pinned=False)
    for index, fits in ((0, True), (1, True), (2, False), (0, True)):
        staging.clear()
        (read,) = videos.read_low_of([(KEY, index)], staging.new_buffer)
        assert isinstance(read, ChunkKV)
        assert inside(staging, read.keys) == inside(staging, read.positions) == fits
        assert_same(staging.move(read, CPU), kvs[index])
    store.close()


def test_what_lies_in_other_pinned_memory_is_copied_from_there_and_held_until_it_has_been(monkeypatch) -> None:
    class Copied:
        def synchronize(self) -> None:
            events.append((held() is not None, "waited"))

    events: list[tuple[bool, str]] = []
    staging, kv = Staging(100_000, pinned=False), make_kv(30, positions=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
        moved = staging.move(kv, CPU)
    assert_same(moved, kv)
    assert staging._used == 0
    staging.copied, held = Copied(), weakref.ref(kv.keys)
    del kv
    staging.clear()
    assert events == [(True, "waited")] and held() is None


def test_without_a_gpu_nothing_is_copied() -> None:
    kv, transfer = make_kv(5), Transfer(CPU, 2)
    arrival = transfer.bring(lambda buffer: kv, lambda on_device: on_device)
    assert isinstance(arrival, Arrival) and arrival.take() is kv and arrival.nbytes == kv.nbytes
    missing = MissingBlob("gone")
    assert transfer.bring(lambda buffer: missing, lambda on_device: on_device) is missing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["disk", "memory", "kept", "kept one"])
def test_on_a_gpu_it_arrives_while_another_stream_computes(tmp_path: Path, kind: str) -> None:
    device = torch.device("cuda", 0)
    store: Store = MemoryStore() if kind == "memory" else DiskStore(tmp_path)
    if kind.startswith("kept"):
        cache_nbytes = 1 << 28 if kind == "kept" else 1 << 23  # room for all three, or for one
        store = TieredStore(store, cache_nbytes, kept_buffers(device, 1 << 28))
    videos = VideoStore(store)
    tokens = 20_000
    kvs = [make_kv(tokens, seed=seed, positions=seed == 1) for seed in range(3)]
    for index, kv in enumerate(kvs):
        videos.write_chunk(KEY, index, kv, kv, b"jpeg")
    transfer = Transfer(device, 1)
    matrix = torch.randn(8192, 8192, device=device)
    with torch.inference_mode():
        for turn in range(6):
            kv = kvs[turn % 3]
            for _ in range(50):
                matrix = matrix @ matrix / 8192  # the engine's stream has much to do
            busy = torch.cuda.current_stream().record_event()
            arrival = transfer.bring(
                lambda buffer, index=turn % 3: videos.read_low_of([(KEY, index)], buffer)[0],
                lambda on_device: RotatedKV.of([on_device], ROPE),
            )
            arrival.ready.synchronize()
            # What runs for the first time is brought to the GPU first, and that does wait.
            assert turn < 3 or not busy.query(), "it waited for the other stream"
            expected = RotatedKV.of([kv.to(device)], ROPE)
            taken = arrival.take()
            assert taken.keys.equal(expected.keys) and taken.values.equal(expected.values)
            del arrival, taken
    store.close()
