"""What goes wrong for one request stays with that request."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from clips import Clip
from until import until

from compression.select import Dial
from kvstore.base import Data, Sealed
from kvstore.errors import StoreFull, StoreUnavailable
from kvstore.memory import MemoryStore
from server.engine.errors import DeviceOutOfMemory, RequestFailed, ShuttingDown, VideoFailed
from server.engine.request import Request, SamplingParams
from server.models.base import Row, Turn
from server.models.videoxl.model import VideoXL

Drive = Callable[..., Any]


class FlakyStore(MemoryStore):
    """A memory store that fails to read and write keys which hold ``broken``."""

    broken: str | None = None

    def _read(self, key: str) -> Sealed | None:
        if self.broken and self.broken in key:
            raise StoreUnavailable(f"cannot read {key}")
        return super()._read(key)

    def _write(self, key: str, header: bytes, payload: Data) -> None:
        if self.broken and self.broken in key:
            raise StoreUnavailable(f"cannot write {key}")
        super()._write(key, header, payload)


class FullStore(MemoryStore):
    """Takes nothing any more, not even a lock, once it is ``full``."""

    full = False

    def _write(self, key: str, header: bytes, payload: Data) -> None:
        if self.full:
            raise StoreFull("no room")
        super()._write(key, header, payload)

    def _acquire_lock(self, name: str, owner: str, ttl_s: float) -> bool:
        if self.full:
            raise StoreFull("no room")
        return super()._acquire_lock(name, owner, ttl_s)


class HangingStore(MemoryStore):
    """L-KVs are not read before ``released`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()
        self.released.set()

    def _read(self, key: str) -> Sealed | None:
        if "/low/" in key:
            assert self.released.wait(60)
        return super()._read(key)


def key_of(driver: Any, end: str) -> str:
    return next(filter(lambda key: key.endswith(end), driver.store.keys()))


def damage(store: MemoryStore, key: str, how: str) -> None:
    """Does to a stored blob what a failing medium or an evicting store does."""
    if how == "flip":
        blob = store._blobs[key]
        payload = bytearray(blob.payload)
        payload[-1] ^= 1
        blob.payload = memoryview(payload)
    elif how == "delete":
        store.delete(key)
    else:
        store.put(key, b"garbage")


@pytest.mark.parametrize("how", ["flip", "delete", "garbage"])
def test_an_unreadable_low_kv_degrades_the_answer_until_it_is_made_again(
    drive: Drive, four_chunks: Clip, how: str
) -> None:
    driver = drive()
    record = driver.upload(four_chunks)
    whole = driver.ask(record, dial=Dial(chunks=(1, 2)))
    key = key_of(driver, "low/00001")
    intact = bytes(driver.store.get(key))
    damage(driver.store, key, how)
    answer = driver.ask(record, dial=Dial(chunks=(1, 2)))
    assert answer.outcome.degraded and answer.finish_reason == "length"
    assert answer.outcome.mixed_tokens < whole.outcome.mixed_tokens
    assert answer.outcome.selection == whole.outcome.selection
    assert answer.text == driver.ask(record, dial=Dial(chunks=(2,))).text
    assert driver.engine.library.get(record.id, "").status == "processed"
    driver.wait_whole(record)
    assert driver.store.get(key) == intact and driver.num_prefilled == 5
    healed = driver.ask(record, dial=Dial(chunks=(1, 2)))
    assert not healed.outcome.degraded and healed.text == whole.text


def test_a_damaged_low_kv_is_healed_by_an_upload_where_bytes_are_not_kept(drive: Drive, four_chunks: Clip) -> None:
    driver = drive(keep_video=False)
    record = driver.upload(four_chunks)
    text = driver.ask(record).text
    for key in list(driver.store.keys("kv/")):
        if "/low/" in key:
            damage(driver.store, key, "flip")
    for _ in range(2):
        assert driver.ask(record).outcome.degraded
        driver.wait_whole(record)
    assert driver.engine.library.get(record.id, "").status == "processed" and driver.num_prefilled == 4
    driver.upload(four_chunks)
    driver.wait_whole(record)
    answer = driver.ask(record)
    assert answer.text == text and not answer.outcome.degraded and driver.num_prefilled == 8


def test_a_damaged_manifest_is_written_again_without_computing_anything(drive: Drive, four_chunks: Clip) -> None:
    before = drive()
    record = before.upload(four_chunks)
    text = before.ask(record).text
    before.engine.close()
    damage(before.store, key_of(before, "manifest"), "flip")
    after = drive(before.store)
    assert after.ask(record).text == text and after.num_prefilled == 0


def test_a_damaged_record_is_written_again_as_it_was_last_seen(drive: Drive, four_chunks: Clip) -> None:
    driver = drive()
    record = driver.upload(four_chunks)
    text = driver.ask(record).text
    damage(driver.store, f"file/{record.id}", "flip")
    assert driver.ask(record).text == text
    assert driver.engine.library.list("") == [record]


def test_a_store_that_is_away_degrades_and_comes_back(drive: Drive, four_chunks: Clip) -> None:
    store = FlakyStore()
    driver = drive(store)
    record = driver.upload(four_chunks)
    text = driver.ask(record).text
    store.broken = "low/"
    answer = driver.ask(record)
    assert answer.outcome.degraded and answer.outcome.mixed_tokens == answer.outcome.high_tokens
    store.broken = None
    assert driver.ask(record).text == text


@pytest.mark.parametrize("keep_video", [True, False])
def test_a_damaged_high_kv_is_healed_from_the_kept_bytes(drive: Drive, four_chunks: Clip, keep_video: bool) -> None:
    before = drive(keep_video=keep_video)
    record = before.upload(four_chunks)
    text = before.ask(record).text
    before.engine.close()
    before.store.put(key_of(before, "high/00002"), b"garbage")
    after = drive(before.store, keep_video=keep_video)
    answers = [after.start(record) for _ in range(3)]
    for answer in answers:
        answer.wait()
    if keep_video:
        assert [answer.text for answer in answers] == [text] * 3
        assert not any(answer.outcome.degraded for answer in answers)
    else:
        assert all(isinstance(answer.error, VideoFailed) for answer in answers)
        assert after.engine.library.get(record.id, "").status == "error"


def test_a_store_that_hangs_holds_one_question_up_and_no_other(drive: Drive, four_chunks: Clip) -> None:
    store = HangingStore()
    driver = drive(store, reload_timeout_s=0.3, max_tokens=20_000)
    record = driver.upload(four_chunks)
    text = driver.ask(record).text
    other = driver.start(record, dial=Dial(mode="high"), max_tokens=20_000)
    store.released.clear()
    try:
        answers = [driver.start(record) for _ in range(6)]  # more than there are reading threads
        for answer in answers:
            assert answer.outcome.degraded and answer.outcome.mixed_tokens == answer.outcome.high_tokens
        assert not other.ended.is_set()
        driver.engine.cancel(other.id)
    finally:
        store.released.set()
    assert driver.ask(record).text == text


def test_a_question_does_not_wait_for_a_prefill_that_waits_for_the_store(drive: Drive, long_clip: Clip) -> None:
    store = FlakyStore()
    driver = drive(store, load_timeout_s=0.2)
    with driver.slowly():
        record = driver.upload(long_clip, wait=False)
        waiting = driver.start(record)
        until(lambda: driver.engine.library.get(record.id, "").video.chunks_done >= 2)
        store.broken = "kv/"
    assert isinstance(waiting.wait().error, StoreUnavailable)
    assert isinstance(driver.ask(record).error, StoreUnavailable)
    assert driver.engine.library.get(record.id, "").status == "uploaded"
    store.broken = None
    assert driver.wait_processed(record).status == "processed"
    assert driver.ask(record).error is None


def test_what_is_in_a_full_store_can_be_deleted(drive: Drive, two_chunks: Clip, long_clip: Clip) -> None:
    store = FullStore()
    driver = drive(store)
    record = driver.upload(two_chunks)
    store.full = True
    with pytest.raises(StoreFull):
        driver.upload(long_clip)
    assert driver.engine.library.delete(record.id, "")
    assert list(store.keys()) == []


def test_a_file_whose_record_finds_no_room_leaves_nothing(drive: Drive, two_chunks: Clip) -> None:
    store = FlakyStore()
    driver = drive(store)
    store.broken = "file/"
    with pytest.raises(StoreUnavailable):
        driver.upload(two_chunks)
    store.broken = None
    assert list(store.keys()) == []


@pytest.mark.parametrize("keep_video", [True, False])
def test_a_damaged_thumbnail_is_none_and_made_again(drive: Drive, four_chunks: Clip, keep_video: bool) -> None:
    driver = drive(keep_video=keep_video)
    library, record = driver.engine.library, driver.upload(four_chunks)
    intact = library.thumbnail(record, 1)
    damage(driver.store, key_of(driver, "thumb/00001"), "flip")
    assert intact and library.thumbnail(record, 1) is None
    driver.wait_whole(record)
    assert library.thumbnail(record, 1) == (intact if keep_video else None)
    assert library.get(record.id, "").status == "processed" and not driver.ask(record).outcome.degraded


@pytest.mark.parametrize("part", ["manifest", "part/00000"])
def test_kept_bytes_that_are_damaged_come_back_with_an_upload(drive: Drive, two_chunks: Clip, part: str) -> None:
    driver = drive()
    record = driver.upload(two_chunks)
    key = next(key for key in driver.store.keys("content/") if key.endswith(part))
    damage(driver.store, key, "flip" if part == "manifest" else "delete")
    assert part != "manifest" or driver.engine.library.content(record) is None
    assert driver.upload(two_chunks, wait=False).status == "processed"
    assert b"".join(driver.engine.library.content(record)) == two_chunks.path.read_bytes()


def test_high_kvs_out_of_reach_fail_the_question_alone(drive: Drive, four_chunks: Clip) -> None:
    store = FlakyStore()
    before = drive(store)
    record = before.upload(four_chunks)
    before.engine.close()
    after = drive(store)
    store.broken = "high/"
    assert isinstance(after.ask(record).error, StoreUnavailable)
    store.broken = None
    assert after.ask(record).error is None


@pytest.mark.parametrize(
    ("error", "reply"), [(torch.OutOfMemoryError("no room"), DeviceOutOfMemory), (RuntimeError("odd"), RequestFailed)]
)
def test_an_error_in_a_batch_fails_the_guilty_one_only(
    drive: Drive, fresh_model: Callable[..., VideoXL], two_chunks: Clip, error: Exception, reply: type[Exception]
) -> None:
    model = fresh_model()
    forward = model.forward
    victim = torch.tensor(model.tokenize((Turn("user", "Where?"),)))
    caches = []
    batches = []

    def failing(rows: list[Row]) -> torch.Tensor:
        logits = forward(rows)  # the caches have advanced when it fails
        batches.append(len(rows))
        for row in rows:
            if torch.equal(row.ids, victim):
                caches.append(row.cache)
            if any(row.cache is cache for cache in caches) and row.cache.length > row.cache.num_mixed + len(victim) + 5:
                raise error
        return logits

    driver = drive(model=model)
    record = driver.upload(two_chunks)
    expected = driver.ask(record, max_tokens=60).text
    model.forward = failing  # type: ignore[method-assign]
    with driver.held():
        others = [driver.start(record, max_tokens=60) for _ in range(3)]
        failed = driver.start(record, "Where?", max_tokens=60)
    assert isinstance(failed.wait().error, reply)
    assert [other.wait().text for other in others] == [expected] * 3
    assert max(batches) > 1
    assert driver.ask(record, max_tokens=60).text == expected


def test_an_error_while_scoring_fails_one_question(
    drive: Drive, fresh_model: Callable[..., VideoXL], two_chunks: Clip
) -> None:
    model = fresh_model()
    driver = drive(model=model)
    record = driver.upload(two_chunks)
    trace = model.trace
    model.trace = None  # type: ignore[assignment, method-assign]
    assert isinstance(driver.ask(record).error, RequestFailed)
    model.trace = trace  # type: ignore[method-assign]
    assert driver.ask(record).error is None
    assert driver.engine._pool.num_leases == 0


def test_an_error_in_a_prefill_fails_that_file(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, two_chunks: Clip
) -> None:
    model = fresh_model()
    driver = drive(model=model)
    encoding = model.encoding
    model.encoding = None  # type: ignore[assignment, method-assign]
    record = driver.upload(four_chunks)
    assert record.status == "error" and "internal error" in record.status_details

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.encoding = full  # type: ignore[assignment, method-assign]
    again = driver.upload(four_chunks)
    assert again.status == "error" and "did not fit into the device's memory" in again.status_details
    model.encoding = encoding  # type: ignore[method-assign]
    assert driver.upload(two_chunks).status == "processed"
    assert driver.upload(four_chunks).status == "processed"
    assert driver.engine.library.get(record.id, "").status == "processed"


def test_a_client_that_fails_in_its_callback_harms_nobody(drive: Drive, two_chunks: Clip) -> None:
    driver = drive()
    record = driver.upload(two_chunks)
    answer = driver.start(record)
    answer.wait()

    def broken(delta: object) -> None:
        raise ValueError("the client is gone")

    request = Request("broken", (Turn("user", "Where?"),), SamplingParams(0.0), (record.id,), "", Dial())
    driver.engine.submit(request, broken)
    driver.engine.submit(replace(request, id="broken too"), broken)
    assert driver.ask(record).text == answer.text


def test_when_the_engine_itself_fails_everybody_is_told(drive: Drive, two_chunks: Clip) -> None:
    driver = drive(max_tokens=20_000)
    record = driver.upload(two_chunks)
    answers = [driver.start(record, max_tokens=20_000) for _ in range(2)]
    assert answers[0].first.wait(30)
    driver.engine._scheduler.plan = None
    assert all(isinstance(answer.wait().error, ShuttingDown) for answer in answers)
    driver.engine._thread.join(30)
    assert not driver.engine.ready
    with pytest.raises(ShuttingDown):
        driver.start(record)
