"""Locks with a lease, over every store."""

from __future__ import annotations

import threading
import time

import pytest

from kvstore.errors import InvalidKey

LONG_S = 600.0


def test_one_owner_at_a_time(store):
    assert store.acquire_lock("prefill/a", "one", LONG_S) is True
    assert store.acquire_lock("prefill/a", "two", LONG_S) is False
    assert store.acquire_lock("prefill/b", "two", LONG_S) is True
    assert store.release_lock("prefill/a", "two") is False
    assert store.acquire_lock("prefill/a", "two", LONG_S) is False
    assert store.release_lock("prefill/a", "one") is True
    assert store.release_lock("prefill/a", "one") is False
    assert store.acquire_lock("prefill/a", "two", LONG_S) is True


def test_a_lock_lapses_unless_it_is_renewed(store):
    assert store.acquire_lock("a", "one", 0.05)
    assert store.acquire_lock("b", "one", 0.05)
    assert store.acquire_lock("b", "one", LONG_S)  # renewed
    time.sleep(0.1)
    assert store.release_lock("a", "one") is False
    assert store.acquire_lock("a", "two", LONG_S) is True
    assert store.acquire_lock("a", "one", LONG_S) is False
    assert store.acquire_lock("b", "two", LONG_S) is False


def test_a_lock_is_no_blob(store):
    store.acquire_lock("kv/a", "one", LONG_S)
    assert store.get("kv/a") is None
    assert list(store.keys()) == []
    store.put("kv/a", b"x")
    assert store.release_lock("kv/a", "one") is True
    assert store.get("kv/a") == b"x"


@pytest.mark.parametrize("lapsed", [False, True])
def test_of_many_takers_one_wins(store, lapsed):
    """Also when all find the lock of somebody who died."""
    for turn in range(20):
        name = f"turn/{turn}"
        if lapsed:
            store.acquire_lock(name, "dead", 0.001)
            time.sleep(0.005)
        barrier, winners = threading.Barrier(6), []

        def take(owner, name=name, barrier=barrier, winners=winners):
            barrier.wait()
            if store.acquire_lock(name, owner, LONG_S):
                winners.append(owner)

        threads = [threading.Thread(target=take, args=(f"taker {index}",)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1


def test_bad_arguments(store):
    with pytest.raises(InvalidKey):
        store.acquire_lock("../a", "one", LONG_S)
    with pytest.raises(InvalidKey):
        store.release_lock("", "one")
    for owner, ttl_s in (("", 1.0), ("one", 0.0), ("one", -1.0)):
        with pytest.raises(ValueError, match="owner"):
            store.acquire_lock("a", owner, ttl_s)
