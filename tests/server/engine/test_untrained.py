"""A model without summary tokens behind the engine: files in, chunks re-loaded, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_transformers import SAVE, image

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from compression.select import Dial
from kvstore.memory import MemoryStore
from server.engine.detokenize import Detokenizer
from server.models.base import Row, Turn
from server.models.one_pass import OnePassModel
from server.models.registry import load_model
from server.video.frames import Frames
from server.video.reader import Sampling, VideoLimits, VideoReader

QUESTION = "What code is on the red star?"


@pytest.fixture(scope="module", params=SAVE)
def untrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnePassModel:
    folder = tmp_path_factory.mktemp(request.param)
    SAVE[request.param](folder)
    options = {"low_ratio": 2, "high_ratio": 8, "compressor": "keydiff", "prefill_mode": "recent-1"}
    model = load_model(str(folder), device="cpu", dtype="float32", **options)
    assert isinstance(model, OnePassModel)
    model.spec = replace(model.spec, frames_per_chunk=4, default_reload=2)
    model.end_ids = frozenset()
    return model


def chunks_by_hand(model: OnePassModel, path: Path, level: int) -> list[ChunkKV]:
    """A whole video's KVs at one level, without engine, store or chunks of the reader's."""
    with VideoReader(path, Sampling(1.0), VideoLimits()) as reader:
        batches = list(reader)
    frames = Frames(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in ("pixels", "times_s")))
    run, chunks = model.prefill(), []
    for start in range(0, len(frames), 4):
        part = Frames(frames.pixels[start : start + 4], frames.times_s[start : start + 4])
        tokens = model.encode(model.preprocess(part), part.times_s)
        chunks.append(run.append(tokens, last=start + 4 >= len(frames))[level])
    return chunks


def answer_by_hand(model: OnePassModel, chunks: list[ChunkKV], images: Sequence[Any] = ()) -> tuple[str, int]:
    """The answer over these KVs and what is seen behind them; KV tokens."""
    cache = MixedCache(model.prefix(), chunks, model.rope, room=200)
    for each in images:
        model.forward([Row(torch.empty(0, dtype=torch.int64), cache, model.encode_image(each))])
    behind = model.tokenize([Turn("user", QUESTION)], behind_media=bool(chunks or images))
    ids, detokenizer, text = torch.tensor(behind), Detokenizer(model.tokenizer), ""
    for _ in range(12):
        ids = model.forward([Row(ids, cache)])[0].argmax(-1, keepdim=True)
        text += detokenizer.push(int(ids))
    return text + detokenizer.flush(), cache.num_mixed


def test_questions_about_a_file(drive, untrained, four_chunks):
    store = MemoryStore()
    first = drive(store, model=untrained, prompt_step=16)
    record = first.upload(four_chunks)
    assert (record.status, record.status_details) == ("processed", None)
    per_chunk = [untrained.num_visual_tokens(size, 160, 96) for size in (4, 4, 4, 2)]
    assert record.video.tokens_visual == sum(per_chunk)
    low, high = ([-(-count // ratio) for count in per_chunk] for ratio in (2, 8))
    more = [have - visual for have, visual in zip(record.video.low_tokens, low, strict=True)]
    assert [have - visual for have, visual in zip(record.video.high_tokens, high, strict=True)] == more
    assert min(more) >= 0, "what is kept whole is the same at both levels"
    answers = {}
    for mode, level in (("low", 0), ("high", 1)):
        answer = answers[mode] = first.ask(record, QUESTION, dial=Dial(mode=mode))
        expected = answer_by_hand(untrained, chunks_by_hand(untrained, four_chunks.path, level))
        assert (answer.text, answer.outcome.mixed_tokens) == expected
        assert not answer.outcome.degraded
    mixed = first.ask(record, QUESTION)
    assert len(mixed.outcome.evidence) == 2 and len(mixed.outcome.scores) == 4
    assert answers["high"].outcome.mixed_tokens < mixed.outcome.mixed_tokens < answers["low"].outcome.mixed_tokens

    again = drive(store, model=untrained)
    assert again.ask(record, QUESTION).text == mixed.text
    assert again.num_prefilled == 0, "another engine answers from the store"


def test_images_behind_a_video_and_without_one(drive, untrained, four_chunks):
    """Also with no chunk in detail, where the cache that was scored over goes on as the answer's."""
    driver = drive(MemoryStore(), model=untrained, prompt_step=16)
    record = driver.upload(four_chunks)
    images = [untrained.preprocess_image(image(seed, 60, 44), alone=False) for seed in (1, 2)]
    for mode, level in (("low", 0), ("high", 1)):
        answer = driver.ask(record, QUESTION, dial=Dial(mode=mode), images=images)
        expected = answer_by_hand(untrained, chunks_by_hand(untrained, four_chunks.path, level), images)
        assert (answer.text, answer.outcome.mixed_tokens) == expected
    num_images = sum(untrained.num_image_tokens(each) for each in images)
    num_text = len(untrained.tokenize([Turn("user", QUESTION)]))
    assert answer.outcome.prompt_tokens == answer.outcome.mixed_tokens + num_images + num_text
    for shown in (images[:1], []):
        answer = driver.ask(None, QUESTION, images=shown)
        assert (answer.text, answer.outcome.mixed_tokens) == answer_by_hand(untrained, [], shown)


def test_a_second_video_goes_on_where_the_first_ends(drive, untrained, four_chunks, two_chunks):
    driver = drive(MemoryStore(), model=untrained)
    records = {clip.path: driver.upload(clip) for clip in (four_chunks, two_chunks)}
    for paths in (list(records), list(records)[::-1]):
        for mode, level in (("low", 0), ("high", 1)):
            first, second = (chunks_by_hand(untrained, path, level) for path in paths)
            if first[-1].next_position is not None:
                ahead = first[-1].next_position - untrained.prefix().num_tokens
                second = [
                    replace(kv, positions=kv.positions + ahead, next_position=kv.next_position + ahead) for kv in second
                ]
            answer = driver.ask([records[path] for path in paths], QUESTION, dial=Dial(mode=mode))
            assert (answer.text, answer.outcome.mixed_tokens) == answer_by_hand(untrained, [*first, *second])


def test_shared_kvs_are_seen_as_copies_are(drive, untrained, four_chunks, two_chunks):
    store = MemoryStore()
    copying = drive(store, model=untrained, share_kvs=False)
    a, b = copying.upload(four_chunks), copying.upload(two_chunks)
    sharing = drive(store, model=untrained, share_kvs=True)
    for files in ([a], [b, a]):
        for dial in (Dial(), Dial(mode="high"), Dial(mode="low"), Dial(reload=1)):
            expected, answer = copying.ask(files, QUESTION, dial=dial), sharing.ask(files, QUESTION, dial=dial)
            assert answer.text == expected.text
            assert answer.outcome.selection == expected.outcome.selection
            assert answer.outcome.scores == pytest.approx(expected.outcome.scores, abs=1e-5)


def test_a_prefill_that_was_cut_off_goes_on(drive, untrained, four_chunks):
    store = MemoryStore()
    record = (driver := drive(store, model=untrained)).upload(four_chunks)
    whole = driver.ask(record, QUESTION, dial=Dial(mode="low")).text
    key = driver.engine.library.video(record.id, record.tenant).key
    for name in (key.manifest, key.low(2)):
        store.delete(name)
    other = drive(store, model=untrained)
    assert other.ask(record, QUESTION, dial=Dial(mode="low")).text == whole
    assert 1 <= other.num_prefilled < 4
