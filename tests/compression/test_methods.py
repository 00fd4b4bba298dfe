"""What every training-free method promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.compressor import Pruner, RawChunk, ScoredPruner, both_levels, join
from compression.infinipot import InfiniPot
from compression.kv import ChunkKV
from compression.methods import COMPRESSORS, EVICTIONS
from compression.rope import Rope
from compression.snap import Snap

LAYERS, HEADS, KV_HEADS, DIM, PER_FRAME = 2, 4, 2, 8, 3
DTYPES = (torch.float32, torch.bfloat16)


def raw_chunk(num_frames: int, seed: int = 0, dtype: torch.dtype = torch.float32, start: int = 0) -> RawChunk:
    generator = torch.Generator().manual_seed(seed)
    tokens = num_frames * PER_FRAME
    keys, values = (torch.randn(LAYERS, KV_HEADS, tokens, DIM, generator=generator).to(dtype) for _ in range(2))
    window = min(4, tokens)
    positions = torch.arange(start, start + tokens)
    return RawChunk(
        kv=ChunkKV(keys, values, "low", 1),
        positions=positions,
        queries=torch.randn(LAYERS, HEADS, window, DIM, generator=generator).to(dtype),
        query_positions=positions[tokens - window :],
        rope=Rope(rotary_dim=4, theta=1e4),
        tokens_per_frame=PER_FRAME,
    )


compressors = st.sampled_from(sorted(COMPRESSORS))
few = settings(deadline=None, max_examples=40)


@few
@given(name=compressors, num_frames=st.integers(1, 9), dtype=st.sampled_from(DTYPES), data=st.data())
def test_a_compressor_keeps_exactly_its_budget_in_time_order(
    name: str, num_frames: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    raw = raw_chunk(num_frames, dtype=dtype)
    num_tokens = data.draw(st.integers(0, raw.num_tokens))
    kept = COMPRESSORS[name].compress(raw, num_tokens)
    shape = (LAYERS, KV_HEADS, num_tokens, DIM)
    assert kept.kv.keys.shape == kept.kv.values.shape == shape
    assert kept.kv.keys.dtype == kept.kv.values.dtype == dtype
    assert kept.tokens.shape == shape[:3]
    assert (kept.tokens.diff(dim=-1) > 0).all(), "every token once, in time order"
    assert ((kept.tokens >= 0) & (kept.tokens < raw.num_tokens)).all()


@few
@given(name=compressors, num_frames=st.integers(1, 9), dtype=st.sampled_from(DTYPES))
def test_at_ratio_1_a_chunk_stays_as_it_is(name: str, num_frames: int, dtype: torch.dtype) -> None:
    raw = raw_chunk(num_frames, dtype=dtype)
    low, high = both_levels(COMPRESSORS[name], raw, 1, 1)
    for kept in (low, high):
        assert torch.equal(kept.kv.keys, raw.kv.keys) and torch.equal(kept.kv.values, raw.kv.values)
        assert torch.equal(kept.tokens, torch.arange(raw.num_tokens).expand_as(kept.tokens))


@pytest.mark.parametrize("name", [name for name, one in COMPRESSORS.items() if isinstance(one, Pruner)])
def test_a_pruner_keeps_keys_and_values_of_the_same_token(name: str) -> None:
    raw = raw_chunk(6)
    kept = COMPRESSORS[name].compress(raw, 7)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            tokens = kept.tokens[layer, head]
            assert torch.equal(kept.kv.keys[layer, head], raw.kv.keys[layer, head, tokens])
            assert torch.equal(kept.kv.values[layer, head], raw.kv.values[layer, head, tokens])


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize(("frames", "low_tokens", "high_tokens"), [(8, 12, 2), (1, 2, 1)])
def test_both_levels_come_from_the_same_kvs(name: str, frames: int, low_tokens: int, high_tokens: int) -> None:
    low, high = both_levels(COMPRESSORS[name], raw_chunk(frames), 2, 16)
    assert (low.kv.level, low.kv.ratio, low.kv.num_tokens) == ("low", 2, low_tokens)
    assert (high.kv.level, high.kv.ratio, high.kv.num_tokens) == ("high", 16, high_tokens)
    if isinstance(COMPRESSORS[name], ScoredPruner):
        within = (high.tokens[..., None] == low.tokens[..., None, :]).any(-1)
        assert within.all(), "what is best of few is among the best of more"


def test_stride_is_even() -> None:
    assert COMPRESSORS["stride"].compress(raw_chunk(4), 3).tokens[0, 0].tolist() == [2, 6, 10]


def test_pool_averages_equal_runs() -> None:
    raw = raw_chunk(4)
    pooled = COMPRESSORS["pool"].compress(raw, 4).kv
    torch.testing.assert_close(pooled.keys, raw.kv.keys.unflatten(2, (4, 3)).mean(3))
    torch.testing.assert_close(pooled.values, raw.kv.values.unflatten(2, (4, 3)).mean(3))


def test_value_norm_keeps_the_longest_values() -> None:
    raw = raw_chunk(4)
    raw.kv.values[:, :, [2, 9]] *= 50
    assert (COMPRESSORS["value-norm"].compress(raw, 2).tokens == torch.tensor([2, 9])).all()


def test_keydiff_keeps_the_key_that_points_elsewhere() -> None:
    raw = raw_chunk(4)
    raw.kv.keys[:] = raw.kv.keys[:, :, :1] + 0.01 * raw.kv.keys
    raw.kv.keys[:, :, 5] *= -1
    assert (COMPRESSORS["keydiff"].compress(raw, 1).tokens == 5).all()


def test_snap_keeps_what_its_queries_look_at_whoever_asks() -> None:
    raw = raw_chunk(6, start=20)
    raw.kv.keys[:] = torch.nn.functional.normalize(raw.kv.keys, dim=-1)
    sharp = Snap(kernel=1)
    for wanted in (0, 7, 17):
        # The key that this query would find, for every head of a group, rotated to where it stands.
        query = (20 * raw.kv.keys[:, :, wanted : wanted + 1]).repeat_interleave(2, dim=1)
        asked = raw.seen_by(query, raw.positions[wanted : wanted + 1])
        assert (sharp.compress(asked, 1).tokens == wanted).all()


def test_infinipot_keeps_the_last_frames_and_what_has_changed() -> None:
    raw = raw_chunk(8)
    frames = raw.kv.keys.unflatten(2, (8, PER_FRAME))
    frames[:] = frames[:, :, -1:]  # a still picture
    frames[:, :, 2, 1] *= -1  # but for one moment at one place
    kept = InfiniPot(share=1.0).compress(raw, PER_FRAME + 1)
    assert (kept.tokens == torch.tensor([7, 21, 22, 23])).all()
    assert (InfiniPot(share=0.0).compress(raw, 5).tokens == COMPRESSORS["value-norm"].compress(raw, 5).tokens).all()


@few
@given(
    name=st.sampled_from(sorted(EVICTIONS)),
    frames=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    share=st.floats(0, 1.2),
)
def test_an_eviction_stays_in_its_budget_over_the_whole_video(name: str, frames: list[int], share: float) -> None:
    raw = [raw_chunk(size, seed) for seed, size in enumerate(frames)]
    total = sum(chunk.num_tokens for chunk in raw)
    num_tokens = int(share * total)
    kept = EVICTIONS[name].keep(raw, num_tokens, [0.5] * len(raw))
    assert [kv.keys.shape for kv in kept] == [kv.values.shape for kv in kept]
    assert all(kv.num_tokens <= chunk.num_tokens for kv, chunk in zip(kept, raw, strict=True))
    used = sum(kv.num_tokens for kv in kept)
    slack = {"frames": PER_FRAME - 1, "raw-retrieval": PER_FRAME - 1}.get(name, 0)
    assert min(num_tokens, total) - slack <= used <= num_tokens


@pytest.mark.parametrize("name", EVICTIONS)
def test_an_eviction_with_room_for_everything_is_no_compression(name: str) -> None:
    raw = [raw_chunk(frames, frames) for frames in (4, 2, 3)]
    kept = EVICTIONS[name].keep(raw, 9 * PER_FRAME, [0.1, 0.3, 0.2])
    for kv, chunk in zip(kept, raw, strict=True):
        assert torch.equal(kv.keys, chunk.kv.keys) and torch.equal(kv.values, chunk.kv.values)


def test_recency_keeps_the_end() -> None:
    raw = [raw_chunk(2, seed) for seed in range(3)]
    first, second, third = EVICTIONS["recency"].keep(raw, 8, [])
    assert first.num_tokens == 0 and torch.equal(third.keys, raw[2].kv.keys)
    assert torch.equal(second.values, raw[1].kv.values[:, :, -2:])


def test_frames_are_kept_whole_and_far_apart() -> None:
    raw = [raw_chunk(4, seed) for seed in range(3)]
    kept = EVICTIONS["frames"].keep(raw, 3 * PER_FRAME + 2, [])
    frames = [chunk.kv.keys[:, :, 2 * PER_FRAME : 3 * PER_FRAME] for chunk in raw]
    assert all(torch.equal(kv.keys, frame) for kv, frame in zip(kept, frames, strict=True))


def test_retrieval_takes_chunks_by_score_and_frames_of_the_last() -> None:
    raw = [raw_chunk(3, seed) for seed in range(4)]
    kept = EVICTIONS["raw-retrieval"].keep(raw, 13, [0.1, 0.9, 0.3, 0.5])
    assert [kv.num_tokens for kv in kept] == [0, 9, 0, 3]
    assert torch.equal(kept[1].values, raw[1].kv.values)
    assert torch.equal(kept[3].values, raw[3].kv.values[:, :, 3:6])  # the frame in the middle


def test_joined_chunks_are_one_chunk_in_time_order() -> None:
    chunks = [raw_chunk(2, seed, start=6 * seed) for seed in range(3)]
    whole = join(chunks)
    assert whole.num_tokens == 18 and whole.positions.tolist() == list(range(18))
    assert torch.equal(whole.kv.keys[:, :, 6:12], chunks[1].kv.keys)
    assert torch.equal(whole.kv.values[:, :, 12:], chunks[2].kv.values)
