"""Questions that see the same KVs of a video, and decode by a step of their own, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from clips import Clip

from compression.score import QueryTrace
from compression.segments import SharedCache
from compression.select import Dial
from kvstore.memory import MemoryStore
from server.engine import engine
from server.engine.question import Phase
from server.models.base import Draw, Row, Step
from server.models.videoxl.model import VideoXL

Drive = Callable[..., Any]
QUESTION = "What code is on the red star?"
DIALS = (Dial(), Dial(mode="high"), Dial(mode="low"), Dial(chunks=(3, 0)), Dial(reload=1))


def test_answers_are_those_over_copies(drive: Drive, four_chunks: Clip, two_chunks: Clip) -> None:
    store = MemoryStore()
    copying = drive(store, share_kvs=False)
    a, b = copying.upload(four_chunks), copying.upload(two_chunks)
    cases = [(files, dial) for files in ([a], [b, a]) for dial in DIALS if len(files) == 1 or dial.chunks is None]
    expected = [copying.ask(files, QUESTION, dial=dial) for files, dial in cases]
    sharing = drive(store, share_kvs=True)
    answers = [sharing.start(files, QUESTION, dial=dial) for files, dial in cases]
    for answer, (files, dial), alone in zip(answers, cases, expected, strict=True):
        assert answer.wait().text == alone.text, (len(files), dial)
        assert answer.outcome.scores == pytest.approx(alone.outcome.scores, abs=1e-5)
        assert answer.outcome.selection == alone.outcome.selection
        assert answer.outcome.mixed_tokens == alone.outcome.mixed_tokens and not answer.outcome.degraded
    assert sharing.ask(None, "Hello?").text == copying.ask(None, "Hello?").text


def test_questions_about_a_video_hold_nothing_of_it(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip
) -> None:
    model = fresh_model()
    forward, seen = model.forward, []

    def spy(rows: Sequence[Row]) -> torch.Tensor:
        seen.extend(row.cache for row in rows if isinstance(row.cache, SharedCache))
        return forward(rows)

    model.forward = spy  # type: ignore[method-assign]
    driver = drive(model=model, share_kvs=True)
    record = driver.upload(four_chunks)
    answers = [driver.start(record, f"{QUESTION} {number}") for number in range(3)]
    own = {a.outcome.prompt_tokens - a.outcome.mixed_tokens + 12 for a in answers}
    caches = list({id(cache): cache for cache in seen}.values())
    assert len(caches) == 3
    addresses = {cache.segments[0].keys.data_ptr() for cache in caches}
    assert len(addresses) == 1, "all see the prefix in the same place"
    assert {cache.capacity for cache in caches} == own, "the conversation"


def test_low_kvs_stay_on_the_device_up_to_a_budget(drive: Drive, four_chunks: Clip) -> None:
    store = MemoryStore()
    driver = drive(store, share_kvs=True)
    record = driver.upload(four_chunks)
    chunk = [driver.ask(record, dial=Dial(chunks=(index,))).outcome.reload_nbytes for index in range(4)]
    assert min(chunk) > 0
    assert driver.ask(record, dial=Dial(mode="low")).outcome.reload_nbytes == 0
    value = driver.engine.metrics.registry.get_sample_value
    assert value("x2l_reload_bytes_total", {"tier": "memory"}) == sum(chunk)
    assert value("x2l_reload_bytes_total", {"tier": "device"}) == sum(chunk)
    assert [value("x2l_reload_seconds_count", {"tier": tier}) for tier in ("memory", "device")] == [4, 1]
    key = driver.engine.library.video(record.id, "").key
    for index in range(4):
        store.delete(key.low(index))
    assert not driver.ask(record, dial=Dial(mode="low")).outcome.degraded, "nothing was read"

    small = drive(share_kvs=True, shared_low_nbytes=2 * chunk[0])
    record = small.upload(four_chunks)
    assert small.ask(record, dial=Dial(mode="low")).outcome.reload_nbytes == sum(chunk)
    assert small.engine._caches.nbytes <= 2 * chunk[0]
    again = [small.ask(record, dial=Dial(chunks=(index,))).outcome.reload_nbytes for index in (3, 0, 0)]
    assert again == [0, chunk[0], 0]


class PlainSteps:
    """A StepDecoder that goes through the model all the same; greedy."""

    def __init__(self, model: VideoXL, worst_token: int | None = None) -> None:
        self._model = model
        self._worst_token = worst_token
        self.drawn: list[list[int]] = []
        self.batches: list[list[Step]] = []
        self.log: list[str] = []

    def step(self, rows: Sequence[Step]) -> PlainTokens:
        if any(row.cache.num_mixed == self._worst_token for row in rows):
            raise RuntimeError("out of memory")
        self.batches.append(list(rows))
        self.log.append("asked")
        tokens = [row.token if row.source is None else self.drawn[-1][row.source] for row in rows]
        logits = self._model.forward(
            [Row(torch.tensor([token]), row.cache) for token, row in zip(tokens, rows, strict=True)]
        )
        self.drawn.append(logits.argmax(-1).tolist())
        return PlainTokens(self.drawn[-1], self.log)


@dataclass
class PlainTokens:
    tokens: list[int]
    log: list[str]

    def wait(self) -> list[int]:
        self.log.append("known")
        return self.tokens


def test_a_step_decoder_takes_what_decodes(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, two_chunks: Clip
) -> None:
    model = fresh_model()
    plain = drive(model=model, share_kvs=True)
    records = [plain.upload(four_chunks), plain.upload(two_chunks)]
    cases = [(records[0], {}), (records[1], {"max_tokens": 3}), (records[1], {}), (None, {})]
    expected = [plain.ask(record, **params) for record, params in cases]
    steps = PlainSteps(model)
    model.step_decoder = lambda max_rows: steps  # type: ignore[method-assign]
    driver = drive(plain.store, model=model, share_kvs=True)
    with driver.held():
        answers = [driver.start(record, **params) for record, params in cases]
    assert [answer.wait().text for answer in answers] == [answer.text for answer in expected]
    assert [a.outcome.completion_tokens for a in answers] == [a.outcome.completion_tokens for a in expected]
    assert max(map(len, steps.batches)) > 1
    assert {row.draw for batch in steps.batches for row in batch} == {Draw()}
    warm = driver.start(records[0], temperature=0.7, seed=11, top_k=5, top_p=0.9).wait()
    assert warm.error is None
    assert {row.draw for row in steps.batches[-1]} == {Draw(0.7, 11, 5, 0.9)}


def test_the_next_token_is_asked_for_before_the_last_one_is_known(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip
) -> None:
    model = fresh_model()
    plain = drive(model=model, share_kvs=True)
    record = plain.upload(four_chunks)
    expected = plain.ask(record)
    num_drawn = expected.outcome.completion_tokens
    assert num_drawn > 5
    steps = PlainSteps(model)
    model.step_decoder = lambda max_rows: steps  # type: ignore[method-assign]
    driver = drive(plain.store, model=model, share_kvs=True)
    with driver.held():
        answer = driver.start(record, max_tokens=num_drawn)
    assert answer.wait().text == expected.text
    num_steps = num_drawn - 1
    assert steps.log == ["asked", *["asked", "known"] * (num_steps - 1), "known"], "and none behind the last"
    assert [batch[0].source for batch in steps.batches] == [None, *[0] * (num_steps - 1)]
    # A stop string is found when tokens behind it are on their way, which nobody gets to know of.
    stop = expected.text[len(expected.text) // 2 :][:2]
    like = plain.ask(record, stop=(stop,))
    with driver.held():
        answer = driver.start(record, stop=(stop,))
    assert answer.wait().text == like.text and answer.finish_reason == like.finish_reason == "stop"
    assert answer.outcome.completion_tokens == like.outcome.completion_tokens < num_drawn
    # So is the end of an answer by itself.
    said = [tokens[0] for tokens in steps.drawn[:num_steps]]
    model.end_ids = frozenset(said[-2:-1]) - frozenset([steps.batches[0][0].token, *said[:-2]])
    assert model.end_ids
    like = plain.ask(record)
    with driver.held():
        answer = driver.start(record)
    assert answer.wait().text == like.text and answer.finish_reason == like.finish_reason == "stop"
    assert answer.outcome.completion_tokens == like.outcome.completion_tokens == num_drawn - 2
    assert driver.ask(record, "Again?").error is None
    driver.engine._pool.check_integrity()
    assert driver.engine._pool.num_leases == 0 and driver.engine.num_in_flight == 0


@pytest.mark.parametrize("wanting", ["a slot", "room"])
def test_who_waits_comes_in_when_the_last_one_ends(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, two_chunks: Clip, wanting: str
) -> None:
    """Although nothing else is asked for in that round."""
    model = fresh_model()
    plain = drive(model=model, share_kvs=True)
    records = [plain.upload(four_chunks), plain.upload(two_chunks)]
    expected = [plain.ask(record) for record in records]
    largest = max(record.video.nbytes_high for record in map(plain.wait_processed, records))
    room = largest + model.prefix().nbytes
    model.step_decoder = lambda max_rows: PlainSteps(model)  # type: ignore[method-assign]
    bounds = {"max_batch": 1} if wanting == "a slot" else {"resident_nbytes": room}
    driver = drive(plain.store, model=model, share_kvs=True, **bounds)
    for max_tokens in (1, 12):
        with driver.held():
            answers = [driver.start(record, max_tokens=max_tokens) for record in records]
        for answer, like in zip(answers, expected, strict=True):
            assert answer.wait().error is None and like.text.startswith(answer.text)
    driver.engine._pool.check_integrity()
    assert driver.engine._pool.num_leases == 0 and driver.engine.num_in_flight == 0


def test_a_stop_string_that_is_found_before_a_score_ends_the_question_alone(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh_model()
    plain = drive(model=model, share_kvs=True)
    record = plain.upload(four_chunks)
    text, like = plain.ask(None, "Hello?").text, plain.ask(record)
    later: list[Any] = []

    class Asking(PlainSteps):
        def step(self, rows: Sequence[Step]) -> PlainTokens:
            drawn = super().step(rows)
            if len(self.batches) == 4:
                later.append(driver.start(record))
            return drawn

    steps = Asking(model)
    model.step_decoder = lambda max_rows: steps  # type: ignore[method-assign]
    driver = drive(plain.store, model=model, share_kvs=True)
    passes, draw = [], engine.draw
    monkeypatch.setattr(
        engine, "draw", lambda m, questions: passes.append([q.phase for q in questions]) or draw(m, questions)
    )
    for size in range(1, len(text)):
        steps.batches.clear()
        stopped = driver.ask(None, "Hello?", stop=(text[:size],))
        assert stopped.error is None and text.startswith(stopped.text)
    assert later and all(answer.wait().text == like.text for answer in later)
    assert {phase for phases in passes for phase in phases} == {Phase.PREFILL}


def test_questions_that_come_together_are_scored_together(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, two_chunks: Clip
) -> None:
    model = fresh_model()
    plain = drive(model=model, share_kvs=True)
    records = [plain.upload(four_chunks), plain.upload(two_chunks)]
    words = ["What is shown?", "x" * 2000, "When does it end?", "How many are there?"]
    cases = list(zip([*records, *records], words, strict=True))
    expected = [plain.ask(record, text) for record, text in cases]
    assert len({answer.outcome.scores for answer in expected}) == len(cases)
    steps = PlainSteps(model)
    model.step_decoder = lambda max_rows: steps  # type: ignore[method-assign]
    sizes: list[int] = []
    trace = model.trace

    def count(rows: Sequence[Row]) -> list[QueryTrace]:
        sizes.append(len(rows))
        if len(rows) > 1 and fails:
            raise RuntimeError("out of memory")
        return trace(rows)

    model.trace = count  # type: ignore[method-assign]
    for fails in (False, True):
        driver = drive(plain.store, model=model, share_kvs=True)
        for record in records:  # now its H-KVs are there
            driver.ask(record, max_tokens=1)
        sizes.clear()
        with driver.held():
            answers = [driver.start(record, text) for record, text in cases]
        waited = [answer.wait() for answer in answers]
        assert [answer.text for answer in waited] == [answer.text for answer in expected]
        for answer, like in zip(waited, expected, strict=True):
            assert answer.outcome.scores == pytest.approx(like.outcome.scores, rel=1e-4)
        assert max(sizes) > 1 and (not fails or sizes.count(1) >= len(cases))


def test_a_step_that_fails_ends_its_question_alone(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, two_chunks: Clip
) -> None:
    model = fresh_model()
    plain = drive(model=model, share_kvs=True)
    records = [plain.upload(four_chunks), plain.upload(two_chunks)]
    expected = plain.ask(records[0])
    guilty = plain.ask(records[1], dial=Dial(mode="high")).outcome.mixed_tokens
    assert guilty != expected.outcome.mixed_tokens
    model.step_decoder = lambda max_rows: PlainSteps(model, guilty)  # type: ignore[method-assign]
    driver = drive(plain.store, model=model, share_kvs=True)
    answers = [driver.start(records[0]), driver.start(records[1], dial=Dial(mode="high"))]
    assert answers[1].wait().error is not None
    assert answers[0].wait().text == expected.text
