"""Shared KVs through a decoder: in plain torch, and by the kernels (on a GPU, or in Triton's interpreter)."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from compression.segments import Part, RotatedKV, SharedCache
from server.models.base import Draw, Step
from server.models.lm.decoder import Decoder, DecoderConfig, LanguageModel, Window
from server.models.slices import whole

_INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
_HAS_TRITON = importlib.util.find_spec("triton") is not None
with_kernels = pytest.mark.skipif(
    not _HAS_TRITON or not (_INTERPRETED or torch.cuda.is_available()), reason="needs Triton and a GPU"
)


@pytest.fixture(autouse=True)
def _short_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes its time over programs that have nothing to do."""
    if _HAS_TRITON:
        monkeypatch.setattr("server.models.lm.plan.LEAST_ITEMS", 4)


DEVICE = "cuda" if torch.cuda.is_available() and not _INTERPRETED else "cpu"
HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 6, 2, 16, 3, 101


def decoder(*, qk_norm: bool = False, rotary_dim: int = HEAD_DIM) -> Decoder:
    config = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        head_dim=HEAD_DIM,
        rotary_dim=rotary_dim,
        qk_norm=qk_norm,
        attention_bias=not qk_norm,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Decoder(config).eval().requires_grad_(False).to(DEVICE)


def kv(num_tokens: int, seed: int) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, KV_HEADS, num_tokens, HEAD_DIM)
    keys, values = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
    return ChunkKV(keys, values, "high", 4)


def caches(model: LanguageModel, high_tokens: int, low_tokens: int, seed: int) -> tuple[SharedCache, MixedCache]:
    """Five chunks, the second and the last re-loaded: shared, and copied."""
    prefix, high = kv(5, seed), [kv(high_tokens + index, seed + index + 1) for index in range(5)]
    low = {1: kv(low_tokens, seed + 11), 4: kv(low_tokens + 9, seed + 12)}
    resident = RotatedKV.of([prefix, *high], model.rope)
    parts = [Part(resident, 0)]
    for index in range(5):
        parts.append(Part(RotatedKV.of([low[index]], model.rope), 0) if index in low else Part(resident, index + 1))
    chunks = [low.get(index, chunk) for index, chunk in enumerate(high)]
    return SharedCache(parts, model.rope, room=40), MixedCache(prefix, chunks, model.rope, room=40)


def read(model: LanguageModel, rows: list[tuple[Tensor, MixedCache]]) -> Tensor:
    """Appends ids [n] to every cache; the logits of all tokens."""
    with torch.inference_mode():
        hidden, _ = model([Window(model.embed_tokens(ids), cache) for ids, cache in rows])
        for ids, cache in rows:
            cache.advance(len(ids))
        return model.logits(hidden)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_prompt_over_shared_kvs_reads_as_over_a_copy(qk_norm: bool) -> None:
    model = decoder(qk_norm=qk_norm)
    (shared, copied), (others, other_copy) = caches(model, 7, 40, seed=0), caches(model, 3, 9, seed=100)
    for size in (6, 1, 1, 3):
        ids = torch.randint(0, VOCAB, (size,), device=DEVICE)
        seen = read(model, [(ids, shared), (ids, others)])
        expected = read(model, [(ids, copied), (ids, other_copy)])
        torch.testing.assert_close(seen, expected, atol=2e-4, rtol=1e-4)
    assert shared.length == copied.length and shared.keys.shape[2] == 40


@with_kernels
@pytest.mark.parametrize(("qk_norm", "rotary_dim", "num_rows"), [(False, 16, 1), (True, 8, 1), (False, 16, 3)])
def test_decoding_by_the_kernels(qk_norm: bool, rotary_dim: int, num_rows: int) -> None:
    from server.models.lm.decode import Decoding

    model, plain = (decoder(qk_norm=qk_norm, rotary_dim=rotary_dim) for _ in range(2))
    decoding = Decoding(model, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_positions=2048, max_rows=4)
    pairs = [caches(plain, 7 + 30 * row, 40 + 100 * row, seed=100 * row) for row in range(num_rows)]
    text, text_copy = (MixedCache(kv(5, 0), [], plain.rope, room=3) for _ in range(2))  # of its own alone, and it grows
    rows = [*pairs, (text, text_copy)] if num_rows > 1 else pairs
    tokens = list(range(3, 3 + len(rows)))
    for _ in range(5):
        expected = read(
            plain, [(torch.tensor([t], device=DEVICE), copied) for t, (_, copied) in zip(tokens, rows, strict=True)]
        )
        drawn = decoding.step([Step(t, cache) for t, (cache, _) in zip(tokens, rows, strict=True)])
        torch.testing.assert_close(drawn.logits, expected, atol=3e-4, rtol=1e-3)
        tokens = drawn.wait()
        assert tokens == expected.argmax(-1).tolist()
    # Rows that go and rows that stay.
    expected = read(plain, [(torch.tensor([tokens[0]], device=DEVICE), rows[0][1])])
    drawn = decoding.step([Step(tokens[0], rows[0][0])])
    torch.testing.assert_close(drawn.logits, expected, atol=3e-4, rtol=1e-3)


@with_kernels
def test_steps_that_are_asked_for_before_the_last_ones_are_known() -> None:
    """Rows change their places, come with a token of their own, and go."""
    from server.models.lm.decode import Decoding

    model, plain = decoder(), decoder()
    decoding = Decoding(model, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_positions=2048, max_rows=4)
    (a, a_copy), (b, b_copy), (c, c_copy) = (caches(plain, 7 + 5 * row, 40, seed=100 * row) for row in range(3))
    copies = {id(a): a_copy, id(b): b_copy, id(c): c_copy}
    tokens: dict[int, int] = {}

    def follow(steps: list[Step]) -> list[int]:
        """What plain torch draws, token by token."""
        for step in steps:
            token = step.token if step.source is None else tokens[id(step.cache)]
            logits = read(plain, [(torch.tensor([token], device=DEVICE), copies[id(step.cache)])])
            tokens[id(step.cache)] = int(logits.argmax())
        return [tokens[id(step.cache)] for step in steps]

    turns = [
        [Step(5, a), Step(9, b)],
        [Step(0, b, source=1), Step(33, c), Step(0, a, source=0)],
        [Step(0, a, source=2), Step(0, c, source=1)],
        [Step(0, c, source=1)],
    ]
    drawn = [decoding.step(steps) for steps in turns]
    assert [each.wait() for each in drawn] == [follow(steps) for steps in turns]


@with_kernels
def test_draws_from_a_part_of_the_tokens() -> None:
    from server.models.lm.decode import Decoding

    model = decoder()
    decoding = Decoding(model, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_positions=2048, max_rows=4)
    shared, copied = caches(model, 2, 4, seed=0)
    logits = read(model, [(torch.tensor([7], device=DEVICE), copied)])[0]
    best = logits.argsort(descending=True).tolist()
    probabilities = (logits / 2.0)[best[:20]].softmax(-1)
    in_nucleus = best[: int((probabilities.cumsum(-1) - probabilities < 0.5).sum())]
    assert 1 < len(in_nucleus) < 20
    seen: list[set[int]] = [set(), set(), set(), set()]
    for seed in range(40):
        draws = [Draw(2.0, seed, 3), Draw(2.0, seed, 20, 0.5), Draw(), Draw(2.0, seed, 1, 0.3)]
        for place, token in enumerate(decoding.step([Step(7, shared, draw) for draw in draws]).wait()):
            seen[place].add(token)
        shared.length = shared.num_mixed
    assert seen == [set(best[:3]), set(in_nucleus), {best[0]}, {best[0]}]


@with_kernels
def test_own_tokens_past_what_was_planned_for() -> None:
    from server.models.lm.decode import Decoding

    model = decoder()
    decoding = Decoding(model, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_positions=2048, max_rows=1)
    shared, copied = caches(model, 7, 40, seed=0)
    ids = torch.randint(0, VOCAB, (255,), device=DEVICE)
    read(model, [(ids, shared)])
    read(model, [(ids, copied)])
    for token in range(2):
        expected = read(model, [(torch.tensor([token], device=DEVICE), copied)])
        drawn = decoding.step([Step(token, shared)])
        torch.testing.assert_close(drawn.logits, expected, atol=3e-4, rtol=1e-3)


@with_kernels
def test_draws_follow_the_temperature_and_the_seed_alone() -> None:
    from server.models.lm.decode import Decoding

    model = decoder()
    decoding = Decoding(model, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_positions=2048, max_rows=4)
    shared, copied = caches(model, 2, 4, seed=0)
    probabilities = (read(model, [(torch.tensor([7], device=DEVICE), copied)])[0] / 0.5).softmax(-1)

    def draws(seeds: list[int]) -> list[int]:
        drawn = decoding.step([Step(7, shared, Draw(0.5, seed)) for seed in seeds])
        shared.length = shared.num_mixed
        return drawn.wait()

    together = [token for seed in range(0, 80, 4) for token in draws(list(range(seed, seed + 4)))]
    assert together[:3] == [draws([seed])[0] for seed in range(3)]
    likely = probabilities.topk(10).indices.tolist()
    share = sum(token in likely for token in together) / len(together)
    assert abs(share - float(probabilities[likely].sum())) < 0.2
    assert len(set(together)) > 5


@with_kernels
def test_a_decoder_that_has_warmed_up_captures_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.models.lm.decode import Decoding

    for module in ("decode", "plan"):
        monkeypatch.setattr(f"server.models.lm.{module}.LEAST_ITEMS", 16)
    monkeypatch.setattr("server.models.lm.decode._PROMPT_ROWS", 8)
    model = decoder()
    decoding = Decoding(model, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_positions=2048, max_rows=2)
    decoding.warm_up()
    graphs = set(decoding._graphs)
    assert bool(graphs) == (DEVICE == "cuda")
    (shared, copied), (others, _) = caches(model, 7, 40, seed=0), caches(model, 3, 9, seed=100)
    expected = read(model, [(torch.tensor([5], device=DEVICE), copied)])
    torch.testing.assert_close(decoding.step([Step(5, shared)]).logits, expected, atol=3e-4, rtol=1e-3)
    decoding.step([Step(5, shared), Step(6, others)])
    assert set(decoding._graphs) == graphs


@with_kernels
@pytest.mark.parametrize("qk_norm", [False, True])
def test_short_prompts_by_the_kernels(qk_norm: bool) -> None:
    """Read and traced a row a token, as in one piece."""
    from server.models.lm.decode import Decoding

    model, plain = (decoder(qk_norm=qk_norm) for _ in range(2))
    decoding = Decoding(model, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_positions=2048, max_rows=8)
    (first, first_copy), (second, second_copy) = caches(plain, 7, 40, seed=0), caches(plain, 3, 9, seed=100)
    generator = torch.Generator().manual_seed(5)
    for sizes in ((5, 3), (1, 6), (19, 9)):
        ids = [torch.randint(0, VOCAB, (size,), generator=generator).to(DEVICE) for size in sizes]
        before = first.length, first.next_position
        traced = decoding.trace([(ids[0], first), (ids[1], second)])
        assert (first.length, first.next_position) == before
        for queries, prompt, cache in zip(traced, ids, (first_copy, second_copy), strict=True):
            with torch.inference_mode():
                projected = whole(plain.slices([Window(plain.embed_tokens(prompt), cache)]))
            expected = torch.stack([like for like, _, _ in projected])
            torch.testing.assert_close(queries, expected, atol=3e-4, rtol=1e-3)
        ends = [sizes[0] - 1, sum(sizes) - 1]
        expected = read(plain, [(ids[0], first_copy), (ids[1], second_copy)])[ends]
        logits = decoding.read([(ids[0], first), (ids[1], second)])
        torch.testing.assert_close(logits, expected, atol=3e-4, rtol=1e-3)
        assert first.length == first_copy.length and second.length == second_copy.length
        expected = read(plain, [(torch.tensor([7], device=DEVICE), second_copy)])
        drawn = decoding.step([Step(7, second)])  # behind what was read
        torch.testing.assert_close(drawn.logits, expected, atol=3e-4, rtol=1e-3)


@with_kernels
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("with_vsts", [False, True])
def test_fused_layers_in_a_pass_over_many_tokens(qk_norm: bool, with_vsts: bool) -> None:
    model, plain = (decoder(qk_norm=qk_norm) for _ in range(2))
    model.fuse(HEAD_DIM)
    is_vst = torch.arange(70) % 3 == 2 if with_vsts else None
    embeddings = torch.randn(70, 48, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.inference_mode():
        hidden, projected = model([Window(embeddings.clone(), caches(model, 7, 40, seed=0)[1], is_vst)])
        expected, layers = plain([Window(embeddings.clone(), caches(plain, 7, 40, seed=0)[1], is_vst)])
    torch.testing.assert_close(hidden, expected, atol=3e-4, rtol=1e-3)
    for layer, like in zip(projected, layers, strict=True):
        for part, other in zip(layer, like, strict=True):
            torch.testing.assert_close(part, other, atol=3e-4, rtol=1e-3)


@with_kernels
def test_a_model_scores_and_reads_prompts_as_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In few passes: kernels take the short ones, as many as they can at a time."""
    from server.models.base import Row
    from server.models.lm.decode import Decoding
    from server.models.registry import load_model

    model: Any = load_model("tiny", device=DEVICE, dtype="float32")
    spec = model.spec
    generator = torch.Generator().manual_seed(0)
    shape = (2, spec.num_layers, spec.num_kv_heads, 5, spec.head_dim)
    high = [ChunkKV(*torch.randn(shape, generator=generator).to(DEVICE), "high", 32) for _ in range(3)]
    resident = RotatedKV.of([model.prefix(), *high], model.rope)
    sizes = (5, 2, 3, 20, 17, 1)
    prompts = [torch.randint(4, 60, (size,), generator=generator).to(DEVICE) for size in sizes]

    def seen() -> tuple[Tensor, Tensor]:
        caches = [SharedCache([Part(resident, i) for i in range(4)], model.rope, room=40) for _ in prompts]
        rows = [Row(ids, cache) for ids, cache in zip(prompts, caches, strict=True)]
        queries = torch.cat([traced.queries for traced in model.trace(rows)], dim=2)
        logits = model.forward(rows)
        assert [cache.num_own for cache in caches] == list(sizes)
        return queries, logits

    expected = seen()
    assert model.scorer.num_layers < spec.num_layers
    monkeypatch.setattr("server.models.lm.decode._PROMPT_ROWS", 16)
    heads = {"heads": spec.num_heads, "kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim}
    model._decoding = decoding = Decoding(
        model.decoder, **heads, max_positions=512, max_rows=8, num_traced=model.scorer.num_layers
    )
    passes: dict[str, list[list[int]]] = {"read": [], "trace": []}

    def note(name: str, prompts: list[tuple[Tensor, MixedCache]]) -> Any:
        passes[name].append([len(ids) for ids, _ in prompts])
        return getattr(Decoding, name)(decoding, prompts)

    for name in passes:
        monkeypatch.setattr(decoding, name, partial(note, name))
    for part, like in zip(seen(), expected, strict=True):
        torch.testing.assert_close(part, like, atol=3e-4, rtol=1e-3)
    assert passes["read"] == passes["trace"] == [[5, 2], [3], [1]]


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
def test_where_the_kernels_do_not_run_a_model_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from server.models.base import Row
    from server.models.lm import kernels
    from server.models.registry import load_model

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction")

    model: Any = load_model("tiny", device=DEVICE, dtype="float32")
    cache = SharedCache([Part(RotatedKV.of([model.prefix()], model.rope), 0)], model.rope, room=8)
    ids = torch.tensor([5, 9, 33], device=DEVICE)
    before = model.forward([Row(ids, cache)])
    monkeypatch.setattr(kernels, "attend", fail)
    assert model.step_decoder(4) is None
    assert "no such instruction" in caplog.text
    cache.length = cache.num_mixed
    assert torch.equal(model.forward([Row(ids, cache)]), before)
