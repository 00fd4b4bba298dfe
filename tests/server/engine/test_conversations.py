"""Several videos and images behind one question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from clips import Clip

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from compression.select import Dial
from kvstore.errors import VideoTooLarge
from kvstore.memory import MemoryStore
from kvstore.resident import HighKV
from kvstore.video import VideoStore
from server.engine.errors import ContextLengthExceeded, FileNotFound
from server.engine.request import FileChunks
from server.models.base import Row, Turn
from server.models.videoxl.model import VideoXL
from server.video.frames import Frames
from server.video.reader import Sampling

Drive = Callable[..., Any]
QUESTION = "What code is on the red star?"


def high_of(driver: Any, record: Any) -> HighKV:
    high = VideoStore(driver.store).read_high(driver.engine.library.video(record.id, "").key)
    assert high is not None
    return high


def low_of(driver: Any, record: Any) -> list[Any]:
    key = driver.engine.library.video(record.id, "").key
    return VideoStore(driver.store).read_low(key, range(record.video.num_chunks))


def ids_of(model: VideoXL, question: str = QUESTION) -> torch.Tensor:
    return torch.tensor(model.tokenize((Turn("user", question),)))


class Spy:
    """Notes the logits that every answer was drawn from, by question."""

    def __init__(self, model: VideoXL) -> None:
        self._model = model
        self._forward = model.forward
        self._logits: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._prompts: dict[int, tuple[int, ...]] = {}
        self._caches: list[MixedCache] = []  # so that no other gets their id
        model.forward = self  # type: ignore[method-assign]

    def __call__(self, rows: list[Row]) -> torch.Tensor:
        logits = self._forward(rows)
        for row, row_logits in zip(rows, logits, strict=True):
            if len(row.ids) > 1:
                self._prompts[id(row.cache)] = prompt = tuple(row.ids.tolist())
                self._caches.append(row.cache)
                self._logits[prompt] = []
            if len(row.ids):
                self._logits[self._prompts[id(row.cache)]].append(row_logits.clone())
        return logits

    def of(self, question: str = QUESTION) -> torch.Tensor:
        """Of the last answer to a question."""
        return torch.stack(self._logits[tuple(ids_of(self._model, question).tolist())])


def generate(
    model: VideoXL, chunks: Sequence[ChunkKV], images: Sequence[torch.Tensor] = (), question: str = QUESTION
) -> torch.Tensor:
    """Greedy logits [12, vocab] over one cache, with nothing of the engine in between."""
    forward = VideoXL.forward
    cache = MixedCache(model.prefix(), chunks, model.rope, room=200)
    for pixels in images:
        forward(model, [Row(torch.empty(0, dtype=torch.int64), cache, model.encode(pixels, np.zeros(1)))])
    ids, logits = ids_of(model, question), []
    for _ in range(12):
        logits.append(forward(model, [Row(ids, cache)])[0])
        ids = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5, rtol=1e-5)


def image(model: VideoXL, seed: int) -> torch.Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, (1, 40, 60, 3), np.uint8)
    return model.preprocess(Frames(pixels, np.zeros(1)))


def test_the_cache_is_one_video_behind_the_other(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, two_chunks: Clip
) -> None:
    model = fresh_model()
    driver, spy = drive(model=model), Spy(model)
    a, b = driver.upload(four_chunks), driver.upload(two_chunks)
    for first, second in ((a, b), (b, a)):
        high = [*high_of(driver, first).chunks, *high_of(driver, second).chunks]
        low = [*low_of(driver, first), *low_of(driver, second)]
        prefix = model.prefix().num_tokens
        for dial in (Dial(mode="high"), Dial(mode="low"), Dial(), Dial(reload=4)):
            outcome = driver.ask([first, second], dial=dial).outcome
            chosen = outcome.selection
            mixed = [low[place] if place in chosen else high[place] for place in range(6)]
            assert torch.equal(spy.of(), generate(model, mixed))
            assert outcome.mixed_tokens == prefix + sum(chunk.num_tokens for chunk in mixed)
            assert outcome.low_tokens == prefix + sum(chunk.num_tokens for chunk in low)
            assert outcome.high_tokens == prefix + sum(chunk.num_tokens for chunk in high)
            assert not outcome.degraded and outcome.reload_nbytes == sum(low[place].nbytes for place in chosen)
            assert len(chosen) == {"high": 0, "low": 6}.get(str(dial.mode), dial.reload or model.spec.default_reload)


def test_one_softmax_scores_all_chunks_and_evidence_names_their_file(
    drive: Drive, model: VideoXL, four_chunks: Clip, two_chunks: Clip
) -> None:
    driver = drive()
    a, b = driver.upload(four_chunks), driver.upload(two_chunks)
    high = [*high_of(driver, a).chunks, *high_of(driver, b).chunks]
    cache = MixedCache(model.prefix(), high, model.rope, room=200)
    expected = model.scorer.score(model.trace([Row(ids_of(model), cache)])[0], cache, high, model.rope).tolist()
    outcome = driver.ask([a, b], dial=Dial(reload=5)).outcome
    assert outcome.scores == pytest.approx(expected, abs=1e-6)
    assert outcome.files == (FileChunks(a.id, 4), FileChunks(b.id, 2))
    places = [(a, index) for index in range(4)] + [(b, index) for index in range(2)]
    best = sorted(range(6), key=lambda place: -outcome.scores[place])[:5]
    assert list(outcome.selection) == best  # of any of them: the budget is one
    for place, evidence in zip(best, outcome.evidence, strict=True):
        record, index = places[place]
        chunk = record.video.chunks[index]
        assert (evidence.file_id, evidence.chunk) == (record.id, index)
        assert (evidence.start_s, evidence.end_s, evidence.score) == (chunk.start_s, chunk.end_s, outcome.scores[place])


def test_a_token_budget_is_shared(drive: Drive, four_chunks: Clip, two_chunks: Clip) -> None:
    driver = drive()
    a, b = driver.upload(four_chunks), driver.upload(two_chunks)
    most = driver.ask([a, b], dial=Dial(reload=3)).outcome.mixed_tokens
    outcome = driver.ask([a, b], dial=Dial(budget_tokens=most)).outcome
    assert outcome.high_tokens < outcome.mixed_tokens <= most
    assert 0 < len(outcome.selection) < 6


def test_all_videos_are_waited_for(drive: Drive, long_clip: Clip, four_chunks: Clip, two_chunks: Clip) -> None:
    driver = drive(max_batch=1)
    ready = driver.upload(two_chunks)
    late = [driver.upload(four_chunks, wait=False, sampling=Sampling(2.0)), driver.upload(long_clip, wait=False)]
    waiting = driver.start([late[0], ready, late[1]])
    assert driver.ask(ready).finish_reason == "length"  # the waiting one holds no slot
    assert [file.file_id for file in waiting.outcome.files] == [late[0].id, ready.id, late[1].id]
    assert len(waiting.outcome.scores) == sum(file.num_chunks for file in waiting.outcome.files) > 52


def test_a_video_that_is_gone_or_damaged_is_seen_to_as_if_alone(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, two_chunks: Clip
) -> None:
    model = fresh_model()
    driver, spy = drive(model=model), Spy(model)
    a, b = driver.upload(four_chunks), driver.upload(two_chunks)
    low, high = [*low_of(driver, a), *low_of(driver, b)], high_of(driver, b)
    key = driver.engine.library.video(b.id, "").key
    driver.store.delete(key.low(1))
    assert driver.ask([a, b], dial=Dial(mode="low")).outcome.degraded
    assert torch.equal(spy.of(), generate(model, [*low[:5], high.chunks[1]]))
    driver.wait_whole(b)
    assert not driver.ask([a, b], dial=Dial(mode="low")).outcome.degraded  # it was repaired
    assert torch.equal(spy.of(), generate(model, low))
    driver.store.delete(key.high(0))
    driver.engine._pool.discard(key)
    assert driver.ask([a, b], dial=Dial(mode="low")).error is None  # it was prefilled again
    assert torch.equal(spy.of(), generate(model, low))
    assert driver.engine.library.delete(b.id, "")
    with pytest.raises(FileNotFound):
        driver.start([a, b])
    assert driver.engine._pool.num_leases == 0


def test_deleting_one_of_the_videos_ends_the_question(drive: Drive, two_chunks: Clip, long_clip: Clip) -> None:
    driver = drive()
    a = driver.upload(two_chunks)
    with driver.slowly():
        b = driver.upload(long_clip, wait=False)
        waiting = driver.start([a, b])
        driver.engine.library.delete(a.id, "")
    assert isinstance(waiting.wait().error, FileNotFound)


def test_a_foreign_file_among_ones_own_is_not_found(drive: Drive, two_chunks: Clip) -> None:
    driver = drive()
    own, foreign = driver.upload(two_chunks), driver.upload(two_chunks, tenant="a" * 64)
    with pytest.raises(FileNotFound):
        driver.start([own, foreign])


def test_videos_that_fit_the_pool_two_at_a_time_never_lock_each_other_out(drive: Drive, two_chunks: Clip) -> None:
    """Each finds its own videos, whatever was evicted meanwhile."""
    store = MemoryStore()
    roomy = drive(store)
    records = [roomy.upload(two_chunks, sampling=Sampling(1 + index / 4)) for index in range(4)]
    pairs = [(0, 1), (2, 3), (1, 2), (3, 0), (1, 0), (2,), (3, 1)]
    expected = [roomy.ask([records[index] for index in pair]).outcome.scores for pair in pairs]
    assert len(set(expected)) == len(pairs)
    largest = max(record.video.nbytes_high for record in records) + roomy.engine._model.prefix().nbytes
    roomy.engine.close()
    tight = drive(store, resident_nbytes=int(2.2 * largest))
    for _ in range(2):
        answers = [tight.start([records[index] for index in pair]) for pair in pairs]
        assert [answer.outcome.scores for answer in answers] == expected
        assert not any(answer.outcome.degraded for answer in answers)
    assert isinstance(tight.ask(records).error, VideoTooLarge)
    assert tight.ask([records[0], records[3]]).error is None
    tight.engine._pool.check_integrity()
    assert tight.engine._pool.num_leases == 0 and tight.num_prefilled == 0


def test_two_files_with_the_same_content_are_two(
    drive: Drive, fresh_model: Callable[..., VideoXL], two_chunks: Clip
) -> None:
    model = fresh_model()
    driver, spy = drive(model=model), Spy(model)
    a, b = driver.upload(two_chunks), driver.upload(two_chunks)
    high = list(high_of(driver, a).chunks)
    outcome = driver.ask([a, b], dial=Dial(mode="high")).outcome
    assert torch.equal(spy.of(), generate(model, high + high))
    assert [file.file_id for file in outcome.files] == [a.id, b.id]


@pytest.mark.parametrize("dial", [Dial(mode="high"), Dial(reload=1), Dial(mode="low")])
def test_images_stand_between_video_and_text(
    drive: Drive, fresh_model: Callable[..., VideoXL], two_chunks: Clip, dial: Dial
) -> None:
    model = fresh_model()
    driver, spy = drive(model=model), Spy(model)
    record = driver.upload(two_chunks)
    stored = sorted(driver.store.keys())
    images = [image(model, seed) for seed in (1, 2)]
    outcome = driver.ask(record, dial=dial, images=images).outcome
    low, high = low_of(driver, record), high_of(driver, record).chunks
    mixed = [low[place] if place in outcome.selection else high[place] for place in range(2)]
    assert torch.equal(spy.of(), generate(model, mixed, images))
    assert not same(spy.of()[:1], generate(model, mixed, images[::-1])[:1])
    assert not same(spy.of()[:1], generate(model, mixed)[:1])
    num_images = 2 * model.num_image_tokens(images[0])
    assert outcome.prompt_tokens == outcome.mixed_tokens + num_images + len(ids_of(model))
    assert outcome.cached_tokens == outcome.mixed_tokens
    assert sorted(driver.store.keys()) == stored  # nothing of them is kept
    in_pieces = drive(driver.store, model=fresh_model(), prompt_step=3)
    assert in_pieces.ask(record, dial=dial, images=images).outcome.scores == pytest.approx(outcome.scores, abs=1e-6)


def test_an_image_changes_what_is_relevant(drive: Drive, model: VideoXL, four_chunks: Clip) -> None:
    driver = drive()
    record = driver.upload(four_chunks)
    plain, shown = driver.ask(record), driver.ask(record, images=[image(model, 3)])
    high = list(high_of(driver, record).chunks)
    cache = MixedCache(model.prefix(), high, model.rope, room=200)
    model.forward([Row(torch.empty(0, dtype=torch.int64), cache, model.encode(image(model, 3), np.zeros(1)))])
    expected = model.scorer.score(model.trace([Row(ids_of(model), cache)])[0], cache, high, model.rope).tolist()
    assert shown.outcome.scores == pytest.approx(expected, abs=1e-6)
    assert shown.outcome.scores != pytest.approx(plain.outcome.scores, abs=1e-6)


def test_images_without_a_video_and_many_at_once(
    drive: Drive, fresh_model: Callable[..., VideoXL], two_chunks: Clip
) -> None:
    model = fresh_model()
    driver, spy = drive(model=model), Spy(model)
    record = driver.upload(two_chunks)
    high = high_of(driver, record).chunks
    cases = [
        (None, [image(model, 0)], (), "Where?"),
        (None, [image(model, 1), image(model, 2)], (), "How many?"),
        (None, [], (), "What?"),
        (record, [image(model, 3)], high, "Is there a star?"),
    ]
    answers = [
        driver.start(files, question, images=images, dial=Dial(mode="high") if files else Dial())
        for files, images, _, question in cases
    ]
    assert [answer.wait().error for answer in answers] == [None] * 4
    for _, images, chunks, question in cases:
        assert same(spy.of(question), generate(model, chunks, images, question))


def test_too_many_images_for_the_context_are_refused(drive: Drive, fresh_model: Callable[..., VideoXL]) -> None:
    model = fresh_model(max_position_embeddings=70)
    driver = drive(model=model)
    with pytest.raises(ContextLengthExceeded):
        driver.start(None, images=[image(model, seed) for seed in range(20)])
    assert driver.ask(None, images=[image(model, 0)], max_tokens=4).finish_reason == "length"


def test_a_failing_vision_tower_ends_one_question_alone(
    drive: Drive, fresh_model: Callable[..., VideoXL], two_chunks: Clip, caplog: pytest.LogCaptureFixture
) -> None:
    model = fresh_model()
    driver = drive(model=model)
    record = driver.upload(two_chunks)
    broken = torch.zeros(1, 3, 7)  # not what preprocess makes
    for files in (None, record):
        assert driver.ask(files, images=[broken]).error is not None
    assert driver.ask(record, images=[image(model, 0)]).error is None
    assert driver.engine._pool.num_leases == 0
