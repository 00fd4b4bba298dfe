"""Parts of a memory that come back by themselves."""

from __future__ import annotations

import gc
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.kv import ChunkKV
from kvstore import codec
from kvstore.base import new_buffer
from kvstore.disk import DiskStore
from kvstore.tiered import TieredStore
from server.engine import pinned
from server.engine.pinned import PinnedMemory, kept_buffers

NBYTES = (1 << 12) + (1 << 10)


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinned, "_PIECE_NBYTES", (1 << 8, 1 << 12))
        yield


def is_part(memory: PinnedMemory, buffer: memoryview) -> bool:
    array = np.frombuffer(buffer, np.uint8)
    return any(np.shares_memory(array, piece.memory) for piece in memory._pieces)


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 5)), max_size=60))
@settings(deadline=None, max_examples=200)
def test_parts_never_overlap_and_all_come_back(steps: list[tuple[int, int]]) -> None:
    memory = PinnedMemory(NBYTES + 255, pinned=False)
    assert sum(len(piece.memory) for piece in memory._pieces) == NBYTES
    held: list[tuple[memoryview, bytes]] = []
    for number, (nbytes, place) in enumerate(steps):
        buffer = memory.new_buffer(nbytes)
        assert len(buffer) == nbytes and not buffer.readonly
        buffer[:] = content = bytes([number]) * nbytes
        held.append((buffer, content))
        del buffer
        if place < len(held):
            del held[place]
        assert all(bytes(buffer) == content for buffer, content in held)
    held.clear()
    for size in (1 << 12, 1 << 10):  # whole again
        held.append((memory.new_buffer(size), b""))
        assert is_part(memory, held[-1][0])
    assert not is_part(memory, memory.new_buffer(1))


def test_a_part_is_taken_as_long_as_a_tensor_lies_in_it() -> None:
    memory = PinnedMemory(1 << 12, pinned=False)
    kv = ChunkKV(torch.ones(1, 2, 30, 4), torch.ones(1, 2, 30, 4), "low", 2)
    data = codec.encode(kv)
    buffer = memory.new_buffer(len(data))
    buffer[:] = data
    keys = codec.decode(buffer[:]).keys[:, 1:]
    assert is_part(memory, buffer)
    del buffer
    assert not is_part(memory, memory.new_buffer(1 << 12))
    assert keys.equal(kv.keys[:, 1:])
    del keys
    assert is_part(memory, memory.new_buffer(1 << 12))


def test_what_a_full_store_keeps_goes_on_to_lie_in_it(tmp_path: Path) -> None:
    memory, store = PinnedMemory(1 << 12, pinned=False), DiskStore(tmp_path)
    tiered = TieredStore(store, 3 * 1000, memory.new_buffer)
    contents = {f"{number}": bytes([number]) * 900 for number in range(9)}
    for key, content in contents.items():
        tiered.put(key, content)
    rng = random.Random(0)
    for _ in range(200):
        key = rng.choice(list(contents))
        (found,) = tiered.get_many([key])
        assert isinstance(found, memoryview) and found == contents[key] and is_part(memory, found)
    tiered.close()
    del found
    assert is_part(memory, memory.new_buffer(1 << 12))


def test_many_threads_may_take_and_let_go() -> None:
    memory = PinnedMemory(NBYTES, pinned=False)

    def work(seed: int) -> bool:
        rng, whole = random.Random(seed), True
        for turn in range(300):
            buffer = memory.new_buffer(rng.randrange(1500))
            buffer[:] = content = bytes([turn % 256]) * len(buffer)
            if turn % 50 == 0:
                gc.collect()
            whole &= bytes(buffer) == content
        return whole

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    whole = [memory.new_buffer(size) for size in (1 << 12, 1 << 10)]
    assert all(is_part(memory, buffer) for buffer in whole)


def test_without_a_gpu_a_stores_buffers_are_as_ever() -> None:
    assert kept_buffers(torch.device("cpu"), 1 << 40) is new_buffer


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine that pins no memory")
def test_what_cannot_be_pinned_is_ordinary_memory(caplog: pytest.LogCaptureFixture) -> None:
    buffer = kept_buffers(torch.device("cuda"), 1 << 12)(1000)
    assert len(buffer) == 1000 and not buffer.readonly
    assert "8192 bytes of the store's cache cannot be pinned" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_its_parts_are_pinned() -> None:
    buffer = kept_buffers(torch.device("cuda"), 1 << 12)(1000)
    assert torch.frombuffer(buffer, dtype=torch.uint8)[100:].is_pinned()
