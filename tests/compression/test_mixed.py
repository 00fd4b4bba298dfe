from __future__ import annotations

from dataclasses import replace

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


def test_chunks_that_bring_their_positions_stay_where_they_were() -> None:
    rope = Rope(rotary_dim=6, theta=1e4, sections=(1, 1, 1))
    for_all = torch.randint(0, 500, (3, 1, 1, 4), dtype=torch.int32)
    each_own = torch.randint(0, 500, (3, 2, 3, 5), dtype=torch.int32)
    chunks = [
        replace(kv(4, seed=1), positions=for_all, next_position=80),
        replace(kv(5, seed=2), positions=each_own, next_position=190),
    ]
    cache = MixedCache(kv(3, "prefix"), chunks, rope, room=2)
    assert (cache.num_mixed, cache.next_position) == (12, 190)
    for (start, stop), chunk in zip(cache.spans, chunks, strict=True):
        rotated = rope.rotate(chunk.keys, *rope.tables(chunk.positions, torch.float32))
        assert torch.equal(cache.keys[:, :, start:stop], rotated)
    cache.append(kv(2, seed=3))
    text = rope.rotate(kv(2, seed=3).keys, *rope.tables(torch.tensor([190, 191]), torch.float32))
    assert torch.equal(cache.keys[:, :, 12:], text)
    assert cache.next_position == 192
    cache.advance(0, 250)  # as an image does, whose positions are not as many as its tokens
    cache.append(kv(1, seed=4))
    assert (cache.length, cache.next_position) == (15, 251)
    cache.rewind(14, 192)
    assert (cache.length, cache.next_position) == (14, 192)
    cache.forget_conversation()
    assert (cache.length, cache.next_position, cache.copy().next_position) == (12, 190, 190)


def test_some_tokens_of_a_chunk_and_two_chunks_as_one() -> None:
    one_for_all = torch.randint(0, 500, (3, 1, 1, 4), dtype=torch.int32)
    each_own = torch.randint(0, 500, (3, 2, 3, 5), dtype=torch.int32)
    first = replace(kv(4, seed=1), positions=one_for_all, next_position=80)
    second = replace(kv(5, seed=2), positions=each_own, next_position=190)
    both = first.followed_by(second)
    assert (both.num_tokens, both.next_position, both.positions.shape) == (9, 190, (3, 2, 3, 9))
    for part, tokens in ((first, slice(0, 4)), (second, slice(4, None))):
        again = both.take(tokens)
        assert torch.equal(again.keys, part.keys) and torch.equal(again.values, part.values)
        assert torch.equal(again.positions, part.positions.expand(3, 2, 3, -1))
    plain = kv(4).followed_by(kv(2, seed=5))
    assert plain.positions is None and plain.num_tokens == 6


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    kinds=st.lists(st.sampled_from([None, (1, 1), (2, 1), (1, 3), (2, 3)]), min_size=5, max_size=5),
)
def test_parts_added_together_stand_as_if_added_one_by_one(
    sizes: list[int], kinds: list[tuple[int, int] | None]
) -> None:
    rope = Rope(rotary_dim=8, theta=1e4, sections=(2, 1, 1))
    generator = torch.Generator().manual_seed(0)
    parts = [kv(2, "prefix")]
    for index, (size, kind) in enumerate(zip(sizes, kinds, strict=False)):
        part = kv(size, seed=index + 1)
        if kind is not None:
            positions = torch.randint(0, 50, (3, *kind, size), generator=generator, dtype=torch.int32)
            part = replace(part, positions=positions, next_position=60 * (index + 1))
        parts.append(part)
    together, alone = (KVCache(parts[0], rope, capacity=1) for _ in range(2))
    together.append(*parts)
    for part in parts:
        alone.append(part)
    assert (together.length, together.next_position) == (alone.length, alone.next_position)
    assert torch.equal(together.keys[:, :, : alone.length], alone.keys[:, :, : alone.length])
    assert torch.equal(together.values[:, :, : alone.length], alone.values[:, :, : alone.length])
