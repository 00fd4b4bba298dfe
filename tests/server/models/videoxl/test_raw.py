from __future__ import annotations

import pytest
import torch

from compression.cache import KVCache
from compression.compressor import RawChunk, both_levels
from compression.methods import COMPRESSORS, EVICTIONS
from compression.mixed import MixedCache
from server.models.base import PositionLimitError, Row
from server.models.lm.decoder import Window
from server.models.registry import load_model
from server.models.videoxl.model import VideoXL
from server.models.videoxl.raw import RawPrefill

SIZES = (24, 16, 40)
QUESTION = torch.tensor([7, 30, 11, 5])


@pytest.fixture(scope="module")
def tiny() -> VideoXL:
    model = load_model("tiny", device="cpu", dtype="float32", low_ratio=1, high_ratio=1)
    assert isinstance(model, VideoXL)
    return model


@pytest.fixture(scope="module")
def features(tiny: VideoXL) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randn(sum(SIZES), 256, generator=generator).split(SIZES))


@pytest.fixture(scope="module")
def raw(tiny: VideoXL, features: list[torch.Tensor]) -> list[RawChunk]:
    run = RawPrefill(tiny, num_queries=6)
    return [run.append(part) for part in features]


def test_chunk_by_chunk_is_one_pass_over_the_whole_prompt(
    tiny: VideoXL, features: list[torch.Tensor], raw: list[RawChunk]
) -> None:
    prefix_ids = torch.tensor(tiny.prompt.prefix_ids)
    with torch.inference_mode():
        embed = tiny.decoder.embed_tokens
        prompt = torch.cat([embed(prefix_ids), *features, embed(QUESTION)])
        cache = KVCache(tiny.no_tokens(), tiny.rope, capacity=len(prompt))
        hidden, projected = tiny.decoder([Window(prompt, cache)])
        expected = tiny.decoder.logits(hidden[-1])
    mixed = MixedCache(tiny.prefix(), [chunk.kv for chunk in raw], tiny.rope, room=len(QUESTION))
    torch.testing.assert_close(tiny.forward([Row(QUESTION, mixed)])[0], expected, atol=1e-4, rtol=1e-4)
    queries = torch.stack([layer[0] for layer in projected])
    for chunk in raw:
        torch.testing.assert_close(chunk.queries, queries[:, :, chunk.query_positions], atol=1e-4, rtol=1e-4)
        assert torch.equal(chunk.query_positions, chunk.positions[-6:])


def test_ratio_1_at_both_levels_is_the_raw_prefill(
    tiny: VideoXL, features: list[torch.Tensor], raw: list[RawChunk]
) -> None:
    prefill = tiny.prefill()
    for index, (part, chunk) in enumerate(zip(features, raw, strict=True)):
        for kv in prefill.append(part, last=index == 2):
            torch.testing.assert_close(kv.keys, chunk.kv.keys)
            torch.testing.assert_close(kv.values, chunk.kv.values)


def test_evicted_caches_answer_in_a_batch_as_alone(tiny: VideoXL, raw: list[RawChunk]) -> None:
    def cache(name: str) -> MixedCache:
        kept = EVICTIONS[name].keep(raw, 30, [0.2, 0.9, 0.1])
        return MixedCache(tiny.prefix(), kept, tiny.rope, room=len(QUESTION))

    together = tiny.forward([Row(QUESTION, cache(name)) for name in EVICTIONS])
    assert together.isfinite().all()
    for name, logits in zip(EVICTIONS, together, strict=True):
        alone = tiny.forward([Row(QUESTION, cache(name))])[0]
        torch.testing.assert_close(alone, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_both_levels_fit_a_mixed_cache(tiny: VideoXL, raw: list[RawChunk], name: str) -> None:
    pairs = [both_levels(COMPRESSORS[name], chunk, 2, 16) for chunk in raw]
    mixed = [low.kv if index == 1 else high.kv for index, (low, high) in enumerate(pairs)]
    cache = MixedCache(tiny.prefix(), mixed, tiny.rope, room=len(QUESTION))
    assert [stop - start for start, stop in cache.spans] == [2, 8, 3]
    assert tiny.forward([Row(QUESTION, cache)]).isfinite().all()


def test_past_the_position_limit_is_an_error(tiny: VideoXL, features: list[torch.Tensor]) -> None:
    run = RawPrefill(tiny)
    run._memory.length = tiny.spec.max_positions  # as if the video were hours long
    with pytest.raises(PositionLimitError, match="32768"):
        run.append(features[0])
