"""L-KVs are read once at a time, and ahead where that costs nobody anything."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from clips import Clip
from until import until

from compression.select import Dial
from kvstore.base import Sealed
from kvstore.errors import StoreUnavailable
from kvstore.memory import MemoryStore

Drive = Callable[..., Any]
QUESTION = "What code is on the red star?"
AHEAD = {"share_kvs": True, "prefetch_nbytes": 1 << 30}


class GatedStore(MemoryStore):
    """Counts reads of L-KVs by chunk, and reads those in ``shut`` when they are let through, or fails them."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[int] = Counter()
        self.shut: dict[int, threading.Event] = {}
        self.broken: set[int] = set()

    def _read(self, key: str) -> Sealed | None:
        if "/low/" in key:
            chunk = int(key.rpartition("/")[2])
            self.reads[chunk] += 1
            if chunk in self.shut:
                assert self.shut[chunk].wait(60)
            if chunk in self.broken:
                raise StoreUnavailable(f"cannot read {key}")
        return super()._read(key)

    def forget(self) -> None:
        self.reads.clear()


def metric(driver: Any, name: str) -> float:
    return driver.engine.metrics.registry.get_sample_value(f"x2l_{name}") or 0.0


def settled(driver: Any) -> Callable[[], bool]:
    """Whether nothing is being read, nor about to be."""

    def check() -> bool:
        reloads = driver.engine._reloads
        return not driver.engine._reads.num_waits and not reloads._prefetch._wishes and not driver.engine._in_flight

    return check


@pytest.mark.parametrize("share_kvs", [True, False])
def test_two_questions_read_a_chunk_once(drive: Drive, four_chunks: Clip, share_kvs: bool) -> None:
    store = GatedStore()
    driver = drive(store, share_kvs=share_kvs)
    record = driver.upload(four_chunks)
    alone = driver.ask(record, dial=Dial(chunks=(1, 2))).text
    fresh = drive(store, share_kvs=share_kvs)
    store.forget()
    store.shut = {1: threading.Event(), 2: threading.Event()}
    answers = [fresh.start(record, dial=Dial(chunks=(1, 2))) for _ in range(2)]
    answers.append(fresh.start(record, dial=Dial(chunks=(2,))))
    until(lambda: fresh.engine._reads.num_waits == 5 and len(store.reads) == 2)
    assert store.reads == {1: 1, 2: 1}
    store.shut[2].set()
    assert not answers[2].wait().outcome.degraded
    assert not answers[0].ended.is_set()
    store.shut[1].set()
    assert [answer.wait().text for answer in answers[:2]] == [alone] * 2
    assert {answer.outcome.reload_nbytes for answer in answers[:2]} == {answers[0].outcome.reload_nbytes}
    assert store.reads == {1: 1, 2: 1} and not fresh.engine._reloads._flights


def test_answers_are_the_same_with_what_was_read_ahead(drive: Drive, four_chunks: Clip, two_chunks: Clip) -> None:
    store = MemoryStore()
    plain = drive(store, share_kvs=True)
    a, b = plain.upload(four_chunks), plain.upload(two_chunks)
    dials = [Dial(chunks=(0,)), Dial(), Dial(reload=1), Dial(chunks=(1, 2)), Dial(mode="low"), Dial(mode="high")]
    cases = [(files, dial) for dial in dials for files in ([a], [b, a], [b]) if dial.chunks is None or files == [a]]
    expected = [plain.ask(files, dial=dial) for files, dial in cases]
    ahead = drive(store, **AHEAD)
    for (files, dial), alone in zip(cases, expected, strict=True):
        answer = ahead.ask(files, dial=dial)
        assert answer.text == alone.text and answer.outcome.selection == alone.outcome.selection
        until(settled(ahead))
    assert metric(ahead, "prefetched_chunks_total") >= metric(ahead, "prefetch_hits_total") >= 1


def test_the_next_best_and_the_last_selection_are_read_ahead(drive: Drive, four_chunks: Clip) -> None:
    store = GatedStore()
    driver = drive(store, shared_low_nbytes=0, **AHEAD)  # so that what was used does not stay
    record = driver.upload(four_chunks)
    store.forget()
    first = driver.ask(record, dial=Dial(reload=1)).outcome
    until(settled(driver))
    ranked = sorted(range(4), key=lambda chunk: -first.scores[chunk])
    assert store.reads == dict.fromkeys(ranked[:2], 1), "selected, and next best"
    assert metric(driver, "prefetched_chunks_total") == 1
    nbytes = metric(driver, "prefetched_bytes")
    assert nbytes > 0

    second = driver.ask(record, dial=Dial(chunks=(ranked[1],))).outcome
    assert second.reload_nbytes == 0 and not second.degraded
    assert metric(driver, "prefetch_hits_total") == 1
    until(settled(driver))
    store.forget()
    third = driver.start(record, dial=Dial(chunks=(ranked[1],)))
    assert not third.wait().outcome.degraded
    until(settled(driver))
    assert store.reads[ranked[1]] == 1, "begun with the question, or read by it"


def test_nothing_is_read_ahead_unless_asked_for(drive: Drive, four_chunks: Clip) -> None:
    for options in ({"share_kvs": True}, {"share_kvs": False, "prefetch_nbytes": 1 << 30}):
        store = GatedStore()
        driver = drive(store, **options)
        record = driver.upload(four_chunks)
        store.forget()
        driver.ask(record, dial=Dial(reload=1))
        until(settled(driver))
        assert sum(store.reads.values()) == 1 and metric(driver, "prefetched_chunks_total") == 0


def test_a_store_that_hangs_in_a_prefetch_holds_nobody_up(drive: Drive, four_chunks: Clip) -> None:
    store = GatedStore()
    driver = drive(store, shared_low_nbytes=0, reader_threads=1, **AHEAD)
    record = driver.upload(four_chunks)
    ranked = sorted(range(4), key=lambda chunk: -driver.ask(record, dial=Dial(reload=0)).outcome.scores[chunk])
    until(settled(driver))
    gate = store.shut[ranked[1]] = threading.Event()
    try:
        store.forget()
        assert not driver.ask(record, dial=Dial(reload=1)).outcome.degraded
        until(lambda: store.reads[ranked[1]])  # it hangs now
        for chunk in (ranked[0], ranked[2], ranked[3]):
            assert not driver.ask(record, dial=Dial(chunks=(chunk,))).outcome.degraded
        wanted = driver.start(record, dial=Dial(chunks=(ranked[1],)))  # goes on with the read that hangs
        until(lambda: any(wait.future in driver.engine._reloads._ahead for wait in driver.engine._reads._waits))
        gate.set()
        assert not wanted.wait().outcome.degraded
        assert store.reads[ranked[1]] == 1
    finally:
        gate.set()


def test_a_prefetch_that_fails_is_silent_and_one_that_finds_damage_heals_it(
    drive: Drive, four_chunks: Clip, caplog: pytest.LogCaptureFixture
) -> None:
    store = GatedStore()
    driver = drive(store, shared_low_nbytes=0, **AHEAD)
    record = driver.upload(four_chunks)
    first = driver.ask(record, dial=Dial(reload=1)).outcome
    until(settled(driver))
    ranked = sorted(range(4), key=lambda chunk: -first.scores[chunk])
    key = driver.engine.library.video(record.id, "").key
    fresh = drive(store, **AHEAD)
    store.broken = {ranked[1]}
    assert not fresh.ask(record, dial=Dial(reload=1)).outcome.degraded
    until(settled(fresh))
    assert metric(fresh, "prefetched_chunks_total") == 0 and not caplog.records
    store.broken = set()
    blob = store._blobs[key.low(ranked[1])]
    blob.payload = memoryview(bytes(blob.payload[:-1]) + bytes([blob.payload[-1] ^ 1]))
    again = drive(store, **AHEAD)
    assert not again.ask(record, dial=Dial(reload=1)).outcome.degraded
    until(settled(again))
    again.wait_whole(record)
    assert "damaged" in caplog.text
    assert not again.ask(record, dial=Dial(chunks=(ranked[1],))).outcome.degraded


def test_engines_with_prefetch_close_while_they_read(drive: Drive, four_chunks: Clip) -> None:
    store = GatedStore()
    driver = drive(store, shared_low_nbytes=0, **AHEAD)
    record = driver.upload(four_chunks)
    store.shut = {chunk: threading.Event() for chunk in range(4)}
    answer = driver.start(record)
    until(lambda: sum(store.reads.values()) >= 1)
    driver.engine.cancel(answer.id)
    assert answer.wait().error is not None
    for gate in store.shut.values():
        gate.set()
    driver.engine.close()
