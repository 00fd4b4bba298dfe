"""The device pool: its budget holds, leases hold, its books balance."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from compression.kv import ChunkKV
from kvstore.errors import PoolError, PoolFull, VideoTooLarge
from kvstore.key import KVKey
from kvstore.resident import HighKV, Lease, ResidentPool


def test_put_lease_and_release(make):
    pool, key, kv = ResidentPool(), make.key(), make.high()
    assert pool.lease(key) is None
    assert key not in pool
    with pool.put(key, kv) as lease:
        assert lease.kv is kv
        assert pool.num_leases == 1
    assert pool.num_leases == 0
    assert key in pool
    assert pool.nbytes == kv.nbytes == kv.prefix.nbytes + sum(chunk.nbytes for chunk in kv.chunks)
    with pool.lease(key) as lease:
        assert lease.kv is kv
    assert pool.discard(key) is True
    assert pool.discard(key) is False
    assert (len(pool), pool.nbytes) == (0, 0)


def test_the_least_recently_leased_goes_first(make):
    kv = make.high()
    pool = ResidentPool(3 * kv.nbytes)
    for name in range(3):
        pool.put(make.key(name), kv).release()
    pool.lease(make.key(0)).release()
    pool.put(make.key(3), kv).release()
    assert [make.key(name) in pool for name in range(4)] == [True, False, True, True]


def test_one_large_video_takes_the_place_of_several(make):
    kv = make.high((4, 2, 2))
    pool = ResidentPool(3 * kv.nbytes)
    for name in range(3):
        pool.put(make.key(name), kv).release()
    pool.put(make.key(3), make.high((8, 4, 4))).release()
    assert [make.key(name) in pool for name in range(4)] == [False, False, True, True]
    assert pool.nbytes == 3 * kv.nbytes


def test_what_is_leased_is_never_evicted(make):
    kv = make.high()
    pool = ResidentPool(2 * kv.nbytes)
    first, second = pool.put(make.key(0), kv), pool.put(make.key(1), kv)
    with pytest.raises(PoolFull):
        pool.put(make.key(2), kv)
    second.release()
    pool.put(make.key(2), kv).release()
    assert [make.key(name) in pool for name in range(3)] == [True, False, True]
    first.release()


def test_no_room_evicts_nothing(make):
    kv = make.high((4, 2, 2))
    pool = ResidentPool(3 * kv.nbytes)
    pool.put(make.key(0), kv).release()
    lease = pool.put(make.key(1), kv)
    with pytest.raises(PoolFull):
        pool.put(make.key(2), make.high((12, 6, 6)))
    with pytest.raises(VideoTooLarge):
        pool.put(make.key(2), make.high((12, 6, 7)))
    assert make.key(0) in pool
    lease.release()


def test_several_are_leased_together_or_not_at_all(make):
    kv = make.high((4, 2, 2))
    pool = ResidentPool(3 * kv.nbytes)
    keys = [make.key(name) for name in range(5)]
    pool.put(keys[0], kv).release()
    assert pool.lease_all(keys[:2], {}) is None
    assert pool.num_leases == 0
    held = pool.put(keys[2], kv)
    pool.put(keys[3], kv).release()
    with pytest.raises(PoolFull):
        pool.lease_all([keys[0], keys[1], keys[4]], {keys[1]: kv, keys[4]: kv})
    with pytest.raises(VideoTooLarge):
        pool.lease_all([keys[0], keys[1], keys[2], keys[4]], {keys[1]: kv, keys[4]: kv})
    assert [key in pool for key in keys] == [True, False, True, True, False]
    assert pool.num_leases == 1
    # Not the least recently used one goes, because it is among those that are wanted.
    leases = pool.lease_all([keys[0], keys[1]], {keys[1]: kv})
    assert [key in pool for key in keys] == [True, True, True, False, False]
    for lease in (*leases, held):
        lease.release()
    assert pool.num_leases == 0
    pool.check_integrity()


def test_a_second_put_keeps_what_is_there(make):
    first, second = make.high(), make.high()
    pool = ResidentPool()
    with pool.put(make.key(), first), pool.put(make.key(), second) as lease:
        assert lease.kv is first
    assert pool.nbytes == first.nbytes


def test_a_discarded_video_holds_its_bytes_until_its_leases_end(make):
    kv = make.high()
    pool = ResidentPool(kv.nbytes)
    lease, other = pool.put(make.key(0), kv), pool.lease(make.key(0))
    pool.discard(make.key(0))
    assert lease.kv is kv
    assert pool.lease(make.key(0)) is None
    assert pool.nbytes == kv.nbytes
    with pytest.raises(PoolFull):
        pool.put(make.key(0), kv)
    lease.release()
    assert pool.nbytes == kv.nbytes
    other.release()
    assert pool.nbytes == 0
    pool.put(make.key(0), kv).release()


def test_a_lease_ends_once(make):
    pool = ResidentPool()
    lease, other = pool.put(make.key(), make.high()), pool.lease(make.key())
    lease.release()
    lease.release()
    assert pool.num_leases == 1
    with pytest.raises(PoolError, match="ended"):
        _ = lease.kv
    other.release()


def test_unbalanced_books_are_told(make):
    pool = ResidentPool()
    pool.put(make.key(), make.high()).release()
    pool._nbytes += 1
    with pytest.raises(PoolError, match="counts"):
        pool.check_integrity()


def test_to_another_device(make):
    kv = make.high()
    moved = kv.brought(lambda tensor: tensor.to("meta"))
    assert {chunk.keys.device.type for chunk in (moved.prefix, *moved.chunks)} == {"meta"}
    assert moved.nbytes == kv.nbytes


def test_many_threads(make):
    """More videos than fit; every thread always finds the video that it leased."""
    videos = [make.high((1, 1 + name)) for name in range(8)]
    pool = ResidentPool(4 * videos[-1].nbytes)
    errors = []

    def work(seed):
        choose = random.Random(seed)
        try:
            for _ in range(400):
                name = choose.randrange(8)
                with pool.lease(make.key(name)) or pool.put(make.key(name), videos[name]) as lease:
                    assert lease.kv is videos[name]
                    if choose.random() < 0.1:
                        pool.discard(make.key(name))
        except PoolFull:
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert pool.num_leases == 0
    pool.check_integrity()


def video_of(tokens: int) -> HighKV:
    import torch

    def kv(level: str, tokens: int) -> ChunkKV:
        return ChunkKV(torch.zeros(1, 1, tokens, 2), torch.zeros(1, 1, tokens, 2), level, 1)

    return HighKV(kv("prefix", 1), (kv("high", tokens),))


names = st.integers(0, 5)


class Books(RuleBasedStateMachine):
    """Against a model that only counts."""

    budget_tokens = 10

    def __init__(self) -> None:
        super().__init__()
        self.pool = ResidentPool(self.budget_tokens * 16)
        self.leases: list[tuple[KVKey, HighKV, Lease]] = []

    def key(self, name: int) -> KVKey:
        return KVKey(f"{name:064x}")

    @rule(name=names, tokens=st.integers(0, 11))
    def put(self, name, tokens):
        video, key = video_of(tokens), self.key(name)
        was_resident, before = key in self.pool, self.pool.nbytes
        leased_nbytes = sum({id(kv): kv.nbytes for _, kv, _ in self.leases}.values())
        try:
            lease = self.pool.put(key, video)
        except VideoTooLarge:
            assert video.nbytes > self.budget_tokens * 16
            assert self.pool.nbytes == before
        except PoolFull:
            assert leased_nbytes + video.nbytes > self.budget_tokens * 16
            assert self.pool.nbytes == before
        else:
            assert (lease.kv is video) == (not was_resident)
            self.leases.append((key, lease.kv, lease))

    @rule(name=names)
    def lease(self, name):
        key = self.key(name)
        lease = self.pool.lease(key)
        assert (lease is not None) == (key in self.pool)
        if lease is not None:
            self.leases.append((key, lease.kv, lease))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data):
        _, _, lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()

    @rule(name=names)
    def discard(self, name):
        was_resident = self.key(name) in self.pool
        assert self.pool.discard(self.key(name)) == was_resident
        assert self.key(name) not in self.pool

    @invariant()
    def leases_hold_and_books_balance(self):
        self.pool.check_integrity()
        assert self.pool.num_leases == len(self.leases)
        assert self.pool.nbytes <= self.budget_tokens * 16
        assert all(lease.kv is kv for _, kv, lease in self.leases)

    def teardown(self):
        for _, _, lease in self.leases:
            lease.release()
        self.leases.clear()
        for name in range(6):
            self.pool.discard(self.key(name))
        assert self.pool.nbytes == 0
        self.pool.check_integrity()


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
