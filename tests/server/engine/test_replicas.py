"""Two engines over one store, as two replicas of a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clips import Clip, Clips, blank_media
from until import until

from compression.select import Dial
from kvstore.base import Store
from kvstore.disk import DiskStore
from kvstore.memory import MemoryStore
from server.engine.errors import FileNotFound, VideoFailed

Drive = Callable[..., Any]
ROUNDS = 3


@pytest.fixture(params=["memory", "disk"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Store]:
    """One store as two replicas open it."""
    if request.param == "disk":
        return DiskStore(tmp_path / "store"), DiskStore(tmp_path / "store")
    shared = MemoryStore()
    return shared, shared


@pytest.fixture
def pair(drive: Drive, stores: tuple[Store, Store]) -> tuple[Any, Any]:
    """No lease lapses, however busy the machine is."""
    return drive(stores[0], lease_s=60.0), drive(stores[1], lease_s=60.0)


def test_what_one_has_prefilled_the_other_answers_about(pair: tuple[Any, Any], four_chunks: Clip) -> None:
    a, b = pair
    record = a.upload(four_chunks)
    text = a.ask(record).text
    answer = b.ask(record)
    assert answer.text == text and not answer.outcome.degraded and b.num_prefilled == 0
    assert b.engine.library.list("") == [record] and b.engine.library.get(record.id, "") == record
    assert b.engine.library.get(record.id, "f" * 64) is None
    assert b.upload(four_chunks, wait=False).status == "processed"


def test_a_question_at_one_waits_for_the_prefill_at_the_other(pair: tuple[Any, Any], long_clip: Clip) -> None:
    a, b = pair
    with a.slowly():
        record = a.upload(long_clip, wait=False)
        until(lambda: a.engine.library.get(record.id, "").video.chunks_done >= 2)
        assert b.engine.library.get(record.id, "").status == "uploaded"
        assert b.engine.library.list("")[0].status == "uploaded"
        waiting = b.start(record)
        until(lambda: b.engine.library.get(record.id, "").video.chunks_done > 0)
    text = waiting.wait().text
    assert waiting.error is None and b.num_prefilled == 0 and a.num_prefilled == 50
    assert a.ask(record).text == text
    assert b.engine.library.get(record.id, "").status == "processed"


def test_the_same_video_at_both_at_once_is_prefilled_once(pair: tuple[Any, Any], long_clip: Clip) -> None:
    records: dict[int, Any] = {}

    def upload(index: int) -> None:
        records[index] = pair[index].upload(long_clip)

    threads = [threading.Thread(target=upload, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.status for record in records.values()] == ["processed"] * 2
    assert pair[0].num_prefilled + pair[1].num_prefilled == 50
    assert pair[0].ask(records[1]).text == pair[1].ask(records[0]).text


def test_a_prefill_is_taken_over_from_a_replica_that_has_failed(
    drive: Drive, stores: tuple[Store, Store], long_clip: Clip
) -> None:
    a, b = (drive(store, lease_s=1.0) for store in stores)
    with a.slowly():
        record = a.upload(long_clip, wait=False)
        until(lambda: a.engine.library.get(record.id, "").video.chunks_done >= 3)
        a.engine._scheduler.plan = None
    answer = b.ask(record)
    assert answer.error is None and b.engine.library.get(record.id, "").status == "processed"
    assert 0 < b.num_prefilled <= 50 - 3
    assert not a.engine.ready


def test_deleting_at_one_stops_the_prefill_at_the_other(pair: tuple[Any, Any], long_clip: Clip) -> None:
    a, b = pair
    with a.slowly():
        record = a.upload(long_clip, wait=False)
        until(lambda: a.engine.library.get(record.id, "").video.chunks_done >= 2)
        waiting = [a.start(record), b.start(record)]
        assert b.engine.library.delete(record.id, "")
        # Slow until it has noticed: all chunks together would take less than that.
        assert all(isinstance(answer.wait().error, FileNotFound) for answer in waiting)
        assert a.engine.library.get(record.id, "") is None and a.engine.library.list("") == []
        until(lambda: not list(a.store.keys()))
        assert a.num_prefilled < 50


def test_deleting_at_one_takes_what_the_other_makes_under_its_own_settings(
    drive: Drive, stores: tuple[Store, Store], long_clip: Clip, two_chunks: Clip
) -> None:
    a, b = drive(stores[0]), drive(stores[1], low_precision="int8")
    record = a.upload(two_chunks)
    assert b.ask(record).error is None
    assert a.engine.library.delete(record.id, "")
    assert list(a.store.keys()) == []
    with pytest.raises(FileNotFound):
        b.start(record)
    # While the other is still making its own.
    record = a.upload(long_clip)
    with b.slowly():
        waiting = b.start(record)
        until(lambda: b.engine.library.get(record.id, "").video.chunks_done >= 2 and b.num_prefilled >= 2)
        assert a.engine.library.delete(record.id, "")
    assert isinstance(waiting.wait().error, FileNotFound)
    until(lambda: not list(a.store.keys()))
    assert b.num_prefilled < 2 + 50 and b.engine._pool.nbytes == 0


def test_what_the_quota_of_one_removed_is_told_at_the_other(
    drive: Drive, stores: tuple[Store, Store], two_chunks: Clip
) -> None:
    a, b = (drive(store, store_quota_bytes=10**9) for store in stores)
    record = a.upload(two_chunks)
    kept_s = stores[0].stat(record.content.manifest).used_s
    text = b.ask(record).text
    # The use is noted in the background, first of the KVs and then of the bytes, which so outlive them.
    until(lambda: stores[0].stat(record.content.manifest).used_s > kept_s)
    a.engine.library.make_room(10**9 - two_chunks.path.stat().st_size - 4000)
    for driver in (a, b):
        lost = driver.engine.library.get(record.id, "")
        assert lost.status == "processed" and "the quota removed them" in lost.status_details
        assert lost.video.nbytes_low == lost.video.nbytes_high == 0
    assert b.ask(record).text == text
    for driver in (a, b):
        healed = driver.engine.library.get(record.id, "")
        assert healed.status_details is None and healed.video.nbytes_low == record.video.nbytes_low


def test_deleting_at_both_at_once(pair: tuple[Any, Any], two_chunks: Clip) -> None:
    a, b = pair
    kept, gone = a.upload(two_chunks), a.upload(two_chunks)
    assert b.ask(gone).error is None
    deleted: list[bool] = []
    threads = [
        threading.Thread(target=lambda driver=driver: deleted.append(driver.engine.library.delete(gone.id, "")))
        for driver in pair
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(deleted) == [False, True]
    assert a.ask(kept).error is None and b.ask(kept).error is None
    with pytest.raises(FileNotFound):
        b.start(gone)
    assert b.engine.library.delete(kept.id, "")
    assert list(a.store.keys()) == []


def test_deleting_at_one_while_the_other_takes_the_same_video(pair: tuple[Any, Any], two_chunks: Clip) -> None:
    a, b = pair
    record = a.upload(two_chunks)
    text = a.ask(record).text
    for number in range(ROUNDS):
        taken: list[Any] = []
        threads = [
            threading.Thread(target=a.engine.library.delete, args=(record.id, "")),
            threading.Thread(target=lambda taken=taken: taken.append(b.upload(two_chunks))),
        ]
        for thread in threads if number % 2 else reversed(threads):
            thread.start()
        for thread in threads:
            thread.join()
        assert a.engine.library.get(record.id, "") is None
        (record,) = taken
        answers = [driver.ask(record, dial=Dial(mode="low")) for driver in pair]
        assert len({answer.text for answer in answers}) == 1 and not any(a.outcome.degraded for a in answers)
        assert a.ask(record).text == b.ask(record).text == text
        assert b"".join(a.engine.library.content(record)) == two_chunks.path.read_bytes()
    assert b.engine.library.delete(record.id, "")
    assert list(a.store.keys()) == []


def test_an_inline_video_has_one_record_at_both(pair: tuple[Any, Any], two_chunks: Clip) -> None:
    a, b = pair
    assert a.upload(two_chunks, source="inline").id == b.upload(two_chunks, source="inline").id
    assert len(a.engine.library.list("")) == 1 and a.num_prefilled + b.num_prefilled == 2


def test_a_failure_at_one_is_told_at_the_other(pair: tuple[Any, Any], clips: Clips, tmp_path: Path) -> None:
    a, b = pair
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clips("mp4", width=160, height=96, fps=5.0, duration_s=60.0).path.read_bytes())
    blank_media(damaged, 0.5)
    record = a.upload(damaged, wait=False)
    waiting = b.start(record)
    assert isinstance(waiting.wait().error, VideoFailed)
    assert b.engine.library.get(record.id, "").status_details == a.wait_processed(record).status_details
    assert not list(a.store.keys("kv/"))
