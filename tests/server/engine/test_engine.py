"""Answers: the same alone and together, streamed and whole, from any state of store and pool."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from clips import Clip

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from compression.select import Dial, SelectionError
from kvstore.disk import DiskStore
from kvstore.memory import MemoryStore
from kvstore.video import VideoStore
from server.engine.detokenize import Detokenizer
from server.engine.errors import Cancelled, ContextLengthExceeded, FileNotFound, QueueFull
from server.engine.request import FileChunks
from server.models.base import Row, Turn
from server.models.videoxl.model import VideoXL

Drive = Callable[..., Any]
QUESTIONS = (
    "What code is on the red star?",
    "Is there a blue circle?",
    "Which came first, the dog or the house?",
    "When does the green square appear in the video?",
    "How many?",
    "Where?",
)


class Spy:
    """Notes the logits of every request by its prompt, and the size of every batch."""

    def __init__(self, model: VideoXL) -> None:
        self.logits: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self.batches: list[int] = []
        self._prompts: dict[int, tuple[int, ...]] = {}
        self._caches: list[MixedCache] = []
        self._forward = model.forward
        model.forward = self  # type: ignore[method-assign]

    def __call__(self, rows: list[Row]) -> torch.Tensor:
        logits = self._forward(rows)
        self.batches.append(len(rows))
        for row, row_logits in zip(rows, logits, strict=True):
            if len(row.ids) > 1:
                self._prompts[id(row.cache)] = tuple(row.ids.tolist())
                self._caches.append(row.cache)  # so that no other gets its id
                self.logits[self._prompts[id(row.cache)]] = []
            self.logits[self._prompts[id(row.cache)]].append(row_logits.clone())
        return logits

    def of(self, model: VideoXL, question: str) -> torch.Tensor:
        return torch.stack(self.logits[tuple(model.tokenize((Turn("user", question),)))])


def test_a_batch_answers_as_each_alone(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, two_chunks: Clip
) -> None:
    model = fresh_model()
    spy = Spy(model)
    driver = drive(model=model)
    files = [driver.upload(four_chunks), driver.upload(two_chunks), None]
    dials = [Dial(), Dial(reload=1), Dial(), Dial(mode="low"), Dial(reload=0), Dial()]
    cases = [(files[i % 3], QUESTIONS[i], dials[i]) for i in range(len(QUESTIONS))]
    alone = [driver.ask(file, question, dial=dial, max_tokens=40).text for file, question, dial in cases]
    alone_logits = [spy.of(model, question) for question in QUESTIONS]
    assert max(spy.batches) == 1
    with driver.held():
        answers = [driver.start(file, question, dial=dial, max_tokens=40) for file, question, dial in cases]
    assert [answer.wait().text for answer in answers] == alone
    assert max(spy.batches) >= 4
    for question, expected in zip(QUESTIONS, alone_logits, strict=True):
        torch.testing.assert_close(spy.of(model, question), expected, atol=1e-4, rtol=1e-4)
    assert len({logits.shape[0] for logits in alone_logits}) == 1


@pytest.mark.parametrize("dial", [Dial(), Dial(reload=0)])
def test_a_long_prompt_is_read_piece_by_piece(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, dial: Dial
) -> None:
    """The same answer and scores as in one piece, while short questions are answered between the pieces."""
    model = fresh_model()
    long = " ".join(QUESTIONS * 20)
    whole = drive(model=model, prompt_step=100_000)
    expected = whole.ask(whole.upload(four_chunks), long, dial=dial)
    spy = Spy(model)
    driver = drive(model=model, prompt_step=8)
    record = driver.upload(four_chunks)
    with driver.held():
        answer = driver.start(record, long, dial=dial)
        short = driver.start(record, "Where?", dial=Dial(reload=0), max_tokens=2)  # nothing of it waits for the store
    assert answer.wait().text == expected.text
    assert short.wait().finish_reason == "length" and short.times_s[-1] < answer.times_s[0]
    assert answer.outcome.scores == pytest.approx(expected.outcome.scores, abs=1e-5)
    assert answer.outcome.prompt_tokens == expected.outcome.prompt_tokens
    assert max(map(len, spy.logits)) <= 8


def generate(model: VideoXL, prefix: ChunkKV, chunks: list[ChunkKV], question: str, count: int) -> torch.Tensor:
    """Greedy logits [count, vocab] over one cache, with nothing of the engine in between."""
    cache = MixedCache(prefix, chunks, model.rope, room=200)
    ids = torch.tensor(model.tokenize((Turn("user", question),)))
    logits = []
    for _ in range(count):
        logits.append(model.forward([Row(ids, cache)])[0])
        ids = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits)


@pytest.mark.parametrize("dial", [Dial(mode="low"), Dial(reload=99), Dial(chunks=(3, 1, 0, 2))])
def test_everything_selected_is_the_low_cache(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, dial: Dial
) -> None:
    model = fresh_model()
    driver = drive(model=model)
    record = driver.upload(four_chunks)
    video = driver.engine.library.video(record.id, "")
    low = VideoStore(driver.store).read_low(video.key, range(4))
    expected = generate(model, model.prefix(), low, QUESTIONS[0], 12)
    spy = Spy(model)
    outcome = driver.ask(record, QUESTIONS[0], dial=dial).outcome
    assert torch.equal(spy.of(model, QUESTIONS[0]), expected)
    assert outcome.mixed_tokens == outcome.low_tokens
    assert sorted(outcome.selection) == [0, 1, 2, 3]
    assert [item.chunk for item in outcome.evidence] == list(outcome.selection)
    assert outcome.reload_nbytes == record.video.nbytes_low


@pytest.mark.parametrize("dial", [Dial(mode="high"), Dial(reload=0)])
def test_nothing_selected_is_the_high_cache(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, dial: Dial
) -> None:
    model = fresh_model()
    driver = drive(model=model)
    record = driver.upload(four_chunks)
    high = VideoStore(driver.store).read_high(driver.engine.library.video(record.id, "").key)
    expected = generate(model, high.prefix, list(high.chunks), QUESTIONS[0], 12)
    spy = Spy(model)
    outcome = driver.ask(record, QUESTIONS[0], dial=dial).outcome
    assert torch.equal(spy.of(model, QUESTIONS[0]), expected)
    assert outcome.mixed_tokens == outcome.high_tokens
    assert outcome.evidence == () and outcome.reload_nbytes == 0 and outcome.reload_ms == 0
    assert len(outcome.scores) == 4


def test_the_outcome_adds_up(drive: Drive, model: VideoXL, four_chunks: Clip) -> None:
    driver = drive()
    record = driver.upload(four_chunks)
    answer = driver.ask(record, max_tokens=9)
    outcome, video = answer.outcome, record.video
    prefix = model.prefix().num_tokens
    assert answer.finish_reason == "length" and outcome.completion_tokens == 9
    assert outcome.files == (FileChunks(record.id, 4),) and not outcome.degraded
    assert outcome.low_tokens == prefix + video.tokens_low and outcome.high_tokens == prefix + video.tokens_high
    assert len(outcome.selection) == model.spec.default_reload
    extra = sum(video.low_tokens[index] - video.high_tokens[index] for index in outcome.selection)
    assert outcome.mixed_tokens == outcome.cached_tokens == outcome.high_tokens + extra
    prompt = len(model.tokenize((Turn("user", QUESTIONS[0]),)))
    assert outcome.prompt_tokens == outcome.mixed_tokens + prompt
    best = sorted(range(4), key=lambda index: -outcome.scores[index])[:2]
    assert list(outcome.selection) == best
    assert [(e.start_s, e.end_s, e.score) for e in outcome.evidence] == [
        (video.chunks[i].start_s, video.chunks[i].end_s, outcome.scores[i]) for i in best
    ]
    assert min(outcome.score_ms, outcome.reload_ms, outcome.prefill_ms, outcome.decode_ms) > 0


def test_a_question_without_a_video(drive: Drive, model: VideoXL) -> None:
    outcome = drive().ask(None).outcome
    assert outcome.mixed_tokens == outcome.cached_tokens == model.prefix().num_tokens
    assert outcome.scores == outcome.evidence == () and outcome.files == ()


def test_relevance_alone_generates_nothing(drive: Drive, four_chunks: Clip) -> None:
    driver = drive()
    record = driver.upload(four_chunks)
    answer = driver.ask(record, generate=False)
    full = driver.ask(record)
    assert answer.text == "" and len(answer.deltas) == 1
    assert answer.outcome.scores == full.outcome.scores and answer.outcome.selection == full.outcome.selection
    assert answer.outcome.completion_tokens == 0 and answer.outcome.reload_nbytes == 0


def test_streamed_text_is_what_the_tokens_decode_to(
    drive: Drive, fresh_model: Callable[..., VideoXL], two_chunks: Clip
) -> None:
    model = fresh_model()
    spy = Spy(model)
    driver = drive(model=model)
    answer = driver.ask(driver.upload(two_chunks), QUESTIONS[1], max_tokens=60)
    tokens = spy.of(model, QUESTIONS[1]).argmax(-1).tolist()
    detokenizer = Detokenizer(model.tokenizer)
    assert answer.text == "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
    assert len(answer.deltas) > 10


def test_the_end_token_and_stop_strings_end_an_answer(
    drive: Drive, fresh_model: Callable[..., VideoXL], two_chunks: Clip
) -> None:
    model = fresh_model()
    spy = Spy(model)
    driver = drive(model=model)
    record = driver.upload(two_chunks)
    whole = driver.ask(record, QUESTIONS[2], max_tokens=30)
    middle = whole.text[len(whole.text) // 2 :][:4]
    stopped = driver.ask(record, QUESTIONS[2], max_tokens=30, stop=("never there", middle))
    assert stopped.finish_reason == "stop" and stopped.text == whole.text[: whole.text.index(middle)]
    tokens = spy.of(model, QUESTIONS[2]).argmax(-1).tolist()
    end = next(index for index in range(3, 30) if tokens[index] not in tokens[:index])
    model.end_ids = frozenset({tokens[end]})
    ended = driver.ask(record, QUESTIONS[2], max_tokens=30)
    assert ended.finish_reason == "stop" and ended.outcome.completion_tokens == end
    assert whole.text.startswith(ended.text) and len(ended.text) < len(whole.text)


def test_a_seed_repeats_an_answer(drive: Drive, two_chunks: Clip) -> None:
    driver = drive()
    record = driver.upload(two_chunks)
    params = {"temperature": 1.5, "top_p": 0.95, "top_k": 200, "max_tokens": 30}
    first = driver.start(record, seed=1, **params)
    other = driver.start(record, seed=2, **params)
    again = driver.ask(record, seed=1, **params)
    assert first.wait().text == again.text != other.wait().text


def test_a_restart_answers_the_same_without_prefill(
    drive: Drive, four_chunks: Clip, tmp_path: Any, fresh_model: Callable[..., VideoXL]
) -> None:
    store = DiskStore(tmp_path / "store")
    before = drive(store)
    record = before.upload(four_chunks)
    text, expected = before.ask(record).text, before.ask(record).outcome
    before.engine.close()
    store.close()
    model = fresh_model()
    model.encoding = model.prefill = None  # type: ignore[assignment, method-assign]
    with_store = DiskStore(tmp_path / "store")
    after = drive(with_store, model=model)
    found = after.engine.library.get(record.id, "")
    assert found == record
    assert not any(resident for *_, resident in after.engine.library.chunks(found))
    answer = after.ask(found)
    assert answer.text == text and answer.outcome.scores == expected.scores
    assert all(resident for *_, resident in after.engine.library.chunks(found))
    after.engine.close()
    with_store.close()


def test_a_full_queue_refuses_and_a_cancel_frees_the_slot(drive: Drive, two_chunks: Clip) -> None:
    driver = drive(max_batch=1, max_queue=1, max_tokens=20_000)
    record = driver.upload(two_chunks)
    endless = driver.start(record, max_tokens=20_000)
    assert endless.first.wait(30)
    queued = driver.start(record)
    with pytest.raises(QueueFull):
        driver.start(record)
    driver.engine.cancel(endless.id)
    assert queued.wait().finish_reason == "length"
    assert isinstance(endless.wait().error, Cancelled)
    driver.engine.cancel(endless.id)
    driver.engine.cancel("unknown")
    assert driver.ask(record).text == queued.text


def test_a_cancelled_question_waiting_in_the_queue_never_runs(drive: Drive, two_chunks: Clip) -> None:
    driver = drive(max_batch=1, max_tokens=20_000)
    record = driver.upload(two_chunks)
    endless = driver.start(record, max_tokens=20_000)
    queued = driver.start(record)
    driver.engine.cancel(queued.id)
    assert isinstance(queued.wait().error, Cancelled) and len(queued.deltas) == 1
    driver.engine.cancel(endless.id)
    endless.wait()


def test_a_question_waits_for_its_video(drive: Drive, long_clip: Clip, two_chunks: Clip) -> None:
    driver = drive(max_batch=1)
    other = driver.upload(two_chunks)
    with driver.slowly():
        record = driver.upload(long_clip, wait=False)
        waiting = driver.start(record)
        assert driver.ask(other).finish_reason == "length"  # the waiting one holds no slot
        assert driver.engine.library.get(record.id, "").status == "uploaded"
    assert len(waiting.outcome.scores) == 50


def test_a_text_that_is_far_too_long_is_not_tokenized_whole(
    drive: Drive, fresh_model: Callable[..., VideoXL], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take minutes, and a hundred times its memory."""
    model = fresh_model(max_position_embeddings=70)
    driver, tokenizer, seen = drive(model=model), model.tokenizer, 0

    def encode(text: str, **options: Any) -> list[int]:
        nonlocal seen
        seen += len(text)
        return original(text, **options)

    original = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", encode)
    with pytest.raises(ContextLengthExceeded) as refused:
        driver.start(None, "word " * 1_000_000)
    assert refused.value.limit == 70 and refused.value.asked > 140
    assert seen < 100_000


def test_what_can_never_fit_is_refused_at_once(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip
) -> None:
    driver = drive(model=fresh_model(max_position_embeddings=70))
    record = driver.upload(four_chunks)
    with pytest.raises(ContextLengthExceeded) as refused:
        driver.start(None, "word " * 200)
    assert refused.value.limit == 70 and refused.value.asked > 200
    with pytest.raises(ContextLengthExceeded):
        driver.start(record, max_tokens=80)
    with pytest.raises(ContextLengthExceeded):
        driver.start(record, dial=Dial(mode="low"), max_tokens=30)
    most = driver.ask(record, dial=Dial(mode="high"), max_tokens=None)
    assert most.finish_reason == "length"
    assert most.outcome.prompt_tokens + most.outcome.completion_tokens == 70


@pytest.mark.parametrize(
    ("dial", "param"),
    [
        (Dial(chunks=(4,)), "chunks"),
        (Dial(budget_tokens=3), "budget_tokens"),
        (Dial(start_s=5, end_s=5), "start_s"),
        (Dial(start_s=50), "start_s"),
    ],
)
def test_dials_that_a_video_cannot_meet(drive: Drive, four_chunks: Clip, dial: Dial, param: str) -> None:
    driver = drive()
    record = driver.upload(four_chunks)
    with pytest.raises(SelectionError) as refused:
        driver.start(record, dial=dial)
    assert refused.value.param == param


def test_a_dial_is_checked_once_the_video_is_known(drive: Drive, long_clip: Clip) -> None:
    driver = drive()
    record = driver.upload(long_clip, wait=False)
    assert isinstance(driver.ask(record, dial=Dial(chunks=(50,))).error, SelectionError)


def test_unknown_and_foreign_files(drive: Drive, two_chunks: Clip) -> None:
    driver = drive()
    record = driver.upload(two_chunks, tenant="a" * 64)
    assert driver.ask(record).error is None
    foreign = driver.engine.library.get(record.id, "")
    assert foreign is None and driver.engine.library.list("") == []
    for tenant in ("", "b" * 64):
        with pytest.raises(FileNotFound):
            driver.start(replace(record, tenant=tenant))


def test_the_metrics_tell_what_happened(drive: Drive, four_chunks: Clip) -> None:
    driver = drive()
    record = driver.upload(four_chunks)
    outcome = driver.ask(record).outcome
    value = driver.engine.metrics.registry.get_sample_value
    assert value("x2l_prefilled_chunks_total") == 4
    assert value("x2l_generated_tokens_total") == outcome.completion_tokens
    assert value("x2l_reload_bytes_total", {"tier": "memory"}) == outcome.reload_nbytes > 0
    assert value("x2l_reload_seconds_count", {"tier": "memory"}) == 1
    passes = {kind: value("x2l_forward_seconds_count", {"kind": kind}) for kind in ("prompt", "decode")}
    assert passes["prompt"] >= 1 and passes["decode"] in (outcome.completion_tokens - 1, outcome.completion_tokens)
    assert value("x2l_batch_size_count") == sum(passes.values())
    assert value("x2l_requests_in_flight") == value("x2l_requests_running") == 0
    assert value("x2l_resident_videos") == 1 and value("x2l_resident_bytes") > 0
    assert value("x2l_score_seconds_count") == 1


def test_streams_go_on_while_a_video_is_prefilled(drive: Drive, two_chunks: Clip, long_clip: Clip) -> None:
    driver = drive(max_tokens=20_000)
    record = driver.upload(two_chunks)
    stream = driver.start(record, max_tokens=20_000)
    assert stream.first.wait(30)
    before = len(stream.deltas)
    driver.upload(long_clip)
    assert len(stream.deltas) - before > 50  # at least a token a chunk
    assert not stream.ended.is_set()
    driver.engine.cancel(stream.id)
    stream.wait()


def test_many_clients_at_once(drive: Drive, four_chunks: Clip, two_chunks: Clip) -> None:
    driver = drive(max_batch=4)
    records = [driver.upload(four_chunks), driver.upload(two_chunks)]
    expected = [driver.ask(record).text for record in records]
    wrong: list[str] = []

    def client(index: int) -> None:
        for turn in range(5):
            answer = driver.ask(records[(index + turn) % 2])
            if answer.text != expected[(index + turn) % 2]:
                wrong.append(answer.text)

    threads = [threading.Thread(target=client, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_two_engines_share_nothing(drive: Drive, two_chunks: Clip) -> None:
    first, second = drive(MemoryStore()), drive(MemoryStore())
    record = first.upload(two_chunks)
    assert second.engine.library.get(record.id, "") is None
    assert first.engine.metrics.registry is not second.engine.metrics.registry
