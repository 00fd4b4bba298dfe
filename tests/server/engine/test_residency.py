"""More videos than the device pool holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clips import Clip

from kvstore.memory import MemoryStore
from server.video.reader import Sampling

Drive = Callable[..., Any]


def test_more_videos_than_the_pool_holds(drive: Drive, four_chunks: Clip, two_chunks: Clip) -> None:
    roomy = drive()
    records = [roomy.upload(four_chunks), roomy.upload(two_chunks)]
    expected = [roomy.ask(record).text for record in records]
    nbytes = roomy.engine._pool.nbytes
    driver = drive(resident_nbytes=int(nbytes * 0.8))
    records = [driver.upload(four_chunks), driver.upload(two_chunks)]
    answers = [driver.start(records[index % 2]) for index in range(8)]
    assert [answer.wait().text for answer in answers] == expected * 4
    driver.engine._pool.check_integrity()
    assert driver.engine._pool.num_leases == 0 and len(driver.engine._pool) == 1


def test_many_more_videos_than_the_pool_holds(drive: Drive, two_chunks: Clip) -> None:
    store = MemoryStore()
    roomy = drive(store)
    records = [roomy.upload(two_chunks, sampling=Sampling(1 + index / 4)) for index in range(8)]
    expected = [roomy.ask(record).text for record in records]
    largest = max(record.video.nbytes_high for record in records) + roomy.engine._model.prefix().nbytes
    roomy.engine.close()
    tight = drive(store, resident_nbytes=2 * largest, max_batch=4)
    for step in (3, 5):  # two orders, each far from the last
        answers = [tight.start(records[number * step % 8]) for number in range(8)]
        for number, answer in enumerate(answers):
            assert answer.wait().text == expected[number * step % 8] and not answer.outcome.degraded
    tight.engine._pool.check_integrity()
    assert tight.engine._pool.num_leases == 0 and 2 <= len(tight.engine._pool) < 8 and tight.num_prefilled == 0
