from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.cache import KVCache
from compression.kv import ChunkKV, Level
from compression.mixed import MixedCache
from compression.rope import Rope

ROPE = Rope(rotary_dim=4, theta=1e4)


def kv(num_tokens: int, level: Level = "high", seed: int = 0) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, num_tokens, 8)
    return ChunkKV(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), level, 4)


def rotated(keys: torch.Tensor, start: int = 0) -> torch.Tensor:
    positions = torch.arange(start, start + keys.shape[2])
    return ROPE.rotate(keys, *ROPE.tables(positions, keys.dtype))


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(0, 9), max_size=6), room=st.integers(0, 5))
def test_chunks_stand_in_order_at_contiguous_positions(sizes: list[int], room: int) -> None:
    prefix = kv(3, "prefix")
    chunks = [kv(size, seed=index + 1) for index, size in enumerate(sizes)]
    cache = MixedCache(prefix, chunks, ROPE, room=room)
    assert cache.num_mixed == cache.length == 3 + sum(sizes)
    assert cache.capacity == cache.length + room
    raw = torch.cat([part.keys for part in (prefix, *chunks)], dim=2)
    torch.testing.assert_close(cache.keys[:, :, : cache.length], rotated(raw))
    for (start, stop), chunk in zip(cache.spans, chunks, strict=True):
        assert torch.equal(cache.values[:, :, start:stop], chunk.values)


def test_what_is_written_counts_only_after_advance() -> None:
    cache = MixedCache(kv(3, "prefix"), [kv(2)], ROPE, room=4)
    first, second = torch.ones(3, 2, 8), torch.full((3, 2, 8), 2.0)
    cache.write(0, first, first)
    keys, values = cache.write(0, second, second)
    assert cache.length == 5
    assert torch.equal(keys[:, 5:], second) and torch.equal(values[:, 5:], second)
    cache.advance(2)
    keys, _ = cache.write(0, first, first)
    assert torch.equal(keys[:, 5:], torch.cat([second, first], 1))


def test_a_cache_grows_without_losing_anything_and_a_copy_is_independent() -> None:
    cache = KVCache(kv(0), ROPE, capacity=1)
    parts = [kv(size, seed=size) for size in (1, 5, 2, 9)]
    for part in parts:
        cache.append(part)
    raw = torch.cat([part.keys for part in parts], dim=2)
    torch.testing.assert_close(cache.keys[:, :, : cache.length], rotated(raw))
    twin = cache.copy()
    twin.append(kv(4, seed=99))
    assert cache.length == 17 and twin.length == 21
    twin.values.zero_()
    assert cache.values[:, :, :17].abs().sum() > 0


def test_rotation_depends_on_the_distance_alone_and_spares_the_rest() -> None:
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def dot(at_query: int, at_key: int) -> torch.Tensor:
        def turn(x: torch.Tensor, position: int) -> torch.Tensor:
            return ROPE.rotate(x, *ROPE.tables(torch.tensor([position]), x.dtype))

        return (turn(q, at_query) * turn(k, at_key)).sum()

    torch.testing.assert_close(dot(7, 3), dot(104, 100), atol=1e-5, rtol=1e-5)
    turned = ROPE.rotate(k, *ROPE.tables(torch.tensor([11]), k.dtype))
    assert torch.equal(turned[..., 4:], k[..., 4:])
