from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression.kv import ChunkKV, Level
from compression.mixed import MixedCache
from compression.rope import Rope
from compression.score import AttentionScorer, QueryTrace
from compression.segments import Part, RotatedKV, SharedCache

ROPE = Rope(rotary_dim=4, theta=1e4)
M_ROPE = Rope(rotary_dim=6, theta=1e4, sections=(1, 1, 1))


def kv(num_tokens: int, level: Level = "high", seed: int = 0) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, num_tokens, 8)
    return ChunkKV(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), level, 4)


def parts_of(
    prefix: ChunkKV, high: list[ChunkKV], low: dict[int, ChunkKV], rope: Rope, shift: int = 0
) -> tuple[list[Part], list[ChunkKV]]:
    """A video as the engine shares it, and the same chunks to be copied."""
    resident = RotatedKV.of([prefix, *high], rope)
    parts = [
        Part(RotatedKV.of([low[index]], rope), 0, shift) if index in low else Part(resident, index + 1, shift)
        for index in range(len(high))
    ]
    return [Part(resident, 0), *parts], [low.get(index, chunk) for index, chunk in enumerate(high)]


def logits(queries: Tensor, cache: MixedCache, at: int) -> Tensor:
    """Of ``queries`` [layers, heads, 1, head_dim] that stand at position ``at``, over prefix and videos."""
    rope = cache.rope
    by_segment = []
    for segment in cache.segments:
        turned = rope.rotate(queries, *rope.tables(torch.tensor([at - segment.offset]), torch.float32))
        by_segment.append(turned @ segment.keys.transpose(-1, -2))
    return torch.cat(by_segment, dim=-1)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), sizes=st.lists(st.integers(0, 6), min_size=1, max_size=7))
def test_shared_kvs_are_seen_as_copied_ones_are(data: st.DataObject, sizes: list[int]) -> None:
    chosen = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    high = [kv(size, seed=index + 1) for index, size in enumerate(sizes)]
    low = {index: kv(3 * sizes[index] + 1, "low", seed=index + 50) for index in chosen}
    parts, chunks = parts_of(kv(3, "prefix"), high, low, ROPE)
    shared = SharedCache(parts, ROPE, room=4)
    copied = MixedCache(kv(3, "prefix"), chunks, ROPE, room=4)
    assert shared.length == shared.num_mixed == copied.length
    assert shared.spans == copied.spans and shared.next_position == copied.next_position
    assert len(shared.segments) <= 2 * len(chosen) + 1
    assert shared.capacity == 4 and shared.nbytes == 2 * 2 * 3 * 4 * 8 * 4
    queries = torch.randn(2, 3, 1, 8)
    torch.testing.assert_close(
        logits(queries, shared, shared.length), logits(queries, copied, copied.length), atol=1e-4, rtol=1e-4
    )
    values = torch.cat([segment.values for segment in shared.segments], dim=2)
    assert torch.equal(values, copied.values[:, :, : copied.length])


def test_nothing_re_loaded_is_one_segment_that_owns_nothing() -> None:
    high = [kv(4, seed=1), kv(2, seed=2), kv(3, seed=3)]
    resident = RotatedKV.of([kv(3, "prefix"), *high], ROPE)
    caches = [SharedCache([Part(resident, index) for index in range(4)], ROPE, room=2) for _ in range(2)]
    for cache in caches:
        (segment,) = cache.segments
        assert segment.keys.data_ptr() == resident.keys.data_ptr() and segment.num_tokens == 12


@pytest.mark.parametrize("shift", [0, 37])
def test_own_positions_move_by_their_shift_alone(shift: int) -> None:
    def placed(chunk: ChunkKV, next_position: int, seed: int) -> ChunkKV:
        generator = torch.Generator().manual_seed(seed)
        positions = torch.randint(3, 200, (3, 1, 1, chunk.num_tokens), dtype=torch.int32, generator=generator)
        return replace(chunk, positions=positions, next_position=next_position)

    high = [placed(kv(4, seed=1), 80, 1), placed(kv(2, seed=2), 150, 2), placed(kv(3, seed=3), 201, 3)]
    low = {1: placed(kv(9, "low", seed=9), 150, 9)}
    parts, chunks = parts_of(kv(3, "prefix"), high, low, M_ROPE, shift)
    shared = SharedCache(parts, M_ROPE, room=4)
    moved = [chunk.moved(shift) for chunk in chunks]
    copied = MixedCache(kv(3, "prefix"), moved, M_ROPE, room=4)
    assert shared.next_position == copied.next_position == 201 + shift
    queries = torch.randn(2, 3, 1, 8)
    torch.testing.assert_close(logits(queries, shared, 300), logits(queries, copied, 300), atol=1e-4, rtol=1e-4)


def test_two_videos_stand_one_behind_the_other() -> None:
    prefix = kv(3, "prefix")
    first, second = [kv(4, seed=1), kv(5, seed=2)], [kv(2, seed=3), kv(6, seed=4)]
    one, other = (RotatedKV.of([prefix, *video], ROPE) for video in (first, second))
    parts = [*(Part(one, index) for index in range(3)), *(Part(other, index) for index in (1, 2))]
    shared = SharedCache(parts, ROPE, room=1)
    copied = MixedCache(prefix, [*first, *second], ROPE, room=1)
    assert [segment.offset for segment in shared.segments] == [0, 9]
    queries = torch.randn(2, 3, 1, 8)
    torch.testing.assert_close(logits(queries, shared, 20), logits(queries, copied, 20), atol=1e-4, rtol=1e-4)


def test_scores_are_those_over_a_copy() -> None:
    high = [kv(4, seed=1), kv(2, seed=2), kv(3, seed=3)]
    low = {1: kv(9, "low", seed=9)}
    parts, chunks = parts_of(kv(3, "prefix"), high, low, ROPE)
    shared, copied = SharedCache(parts, ROPE, room=1), MixedCache(kv(3, "prefix"), chunks, ROPE, room=1)
    trace = QueryTrace(torch.randn(2, 6, 5, 8), shared.length, num_asking=2)
    scorer = AttentionScorer()
    torch.testing.assert_close(scorer.score(trace, shared, chunks, ROPE), scorer.score(trace, copied, chunks, ROPE))
