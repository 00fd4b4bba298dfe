from __future__ import annotations

from dataclasses import replace

import torch

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from compression.rope import Rope
from compression.score import AttentionScorer, CosineScorer, QueryTrace

ROPE = Rope(rotary_dim=4, theta=1e4)
LAYERS, HEADS, KV_HEADS, DIM = 3, 4, 2, 8


def chunk(num_tokens: int, seed: int) -> ChunkKV:
    shape = (LAYERS, KV_HEADS, num_tokens, DIM)
    generator = torch.Generator().manual_seed(seed)
    return ChunkKV(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), "high", 4)


def setting(sizes: tuple[int, ...] = (4, 4, 0, 2)) -> tuple[QueryTrace, MixedCache, list[ChunkKV]]:
    chunks = [chunk(size, seed) for seed, size in enumerate(sizes, 1)]
    cache = MixedCache(chunk(3, 0), chunks, ROPE, room=5)
    queries = torch.randn(LAYERS, HEADS, 5, DIM, generator=torch.Generator().manual_seed(9))
    return QueryTrace(queries, cache.num_mixed), cache, chunks


def test_attention_is_the_softmax_mass_of_the_last_token() -> None:
    trace, cache, chunks = setting()
    expected = torch.zeros(4)
    for layer, head in ((0, 1), (2, 3)):
        position = torch.tensor([trace.start + 4])
        query = ROPE.rotate(trace.queries[layer, head, 4:], *ROPE.tables(position, torch.float32))
        keys = cache.keys[layer, head // 2, : cache.num_mixed]
        mass = (query @ keys.T / DIM**0.5).softmax(-1)[0]
        expected += torch.stack([mass[start:stop].sum() for start, stop in cache.spans]) / 2
    scores = AttentionScorer(((0, 1), (2, 3))).score(trace, cache, chunks, ROPE)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)
    assert scores[2] == 0, "a chunk without KV tokens gets no attention"


def test_with_a_draft_a_chunk_scores_what_any_asking_token_gives_it() -> None:
    trace, cache, chunks = setting()
    scorer = AttentionScorer(((0, 1), (2, 3)))
    alone = [  # a causal model makes the same queries, whatever follows
        scorer.score(QueryTrace(trace.queries[:, :, :tokens], trace.start), cache, chunks, ROPE) for tokens in (3, 4, 5)
    ]
    together = scorer.score(replace(trace, num_asking=3), cache, chunks, ROPE)
    torch.testing.assert_close(together, torch.stack(alone).amax(0))
    assert not torch.equal(together, alone[-1])


def test_attention_without_chosen_heads_is_the_mean_over_all() -> None:
    trace, cache, chunks = setting()
    every = tuple((layer, head) for layer in range(LAYERS) for head in range(HEADS))
    torch.testing.assert_close(
        AttentionScorer().score(trace, cache, chunks, ROPE), AttentionScorer(every).score(trace, cache, chunks, ROPE)
    )


def test_attention_per_token_does_not_favour_large_chunks() -> None:
    trace, cache, chunks = setting((16, 1, 0, 2))
    whole = AttentionScorer().score(trace, cache, chunks, ROPE)
    mean = AttentionScorer(per_token=True).score(trace, cache, chunks, ROPE)
    torch.testing.assert_close(mean, whole / torch.tensor([16, 1, 1, 2]))


def test_tokens_that_are_not_visual_do_not_speak_for_their_chunk() -> None:
    trace, cache, chunks = setting((4, 5, 3))
    marked = [replace(kv, num_others=others) for kv, others in zip(chunks, (1, 0, 3), strict=True)]
    knowing = MixedCache(chunk(3, 0), marked, ROPE, room=5)
    (first, _), middle, (last, _) = cache.spans
    assert knowing.spans == ((first, first + 3), middle, (last, last))
    cache.spans = knowing.spans
    bare = [chunks[0].take(slice(3)), chunks[1], chunks[2].take(slice(0))]
    for scorer in (AttentionScorer(), AttentionScorer(per_token=True), CosineScorer()):
        scores = scorer.score(trace, knowing, marked, ROPE)
        torch.testing.assert_close(scores, scorer.score(trace, cache, bare, ROPE))


def test_only_the_layers_of_the_chosen_heads_are_needed() -> None:
    assert AttentionScorer(((0, 3), (1, 0))).num_layers == 2
    assert AttentionScorer().num_layers is None
    trace, cache, chunks = setting()
    short = QueryTrace(trace.queries[:2], trace.start)
    scorer = AttentionScorer(((0, 3), (1, 0)))
    torch.testing.assert_close(scorer.score(short, cache, chunks, ROPE), scorer.score(trace, cache, chunks, ROPE))


def test_cosine_finds_the_chunk_whose_keys_point_where_the_question_points() -> None:
    trace, cache, chunks = setting((4, 4, 4, 4))
    wanted = trace.queries.mean(2)[:, ::2, None].expand(-1, -1, 4, -1)  # the first head of every group
    chunks[2] = ChunkKV(wanted.contiguous(), chunks[2].values, "high", 4)
    scores = CosineScorer().score(trace, cache, chunks, ROPE)
    assert int(scores.argmax()) == 2


def test_cosine_of_a_chunk_without_kv_tokens_is_a_number() -> None:
    trace, cache, chunks = setting()
    assert CosineScorer().score(trace, cache, chunks, ROPE).isfinite().all()
