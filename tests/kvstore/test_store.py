"""The contract, over every backend."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import envelope
from kvstore.errors import CorruptBlob, FormatVersionError, InvalidKey, InvalidStoreURL, StoreError
from kvstore.open import open_store

on_one_store = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


def test_a_miss_is_none(store):
    assert store.get("a/b") is None
    assert store.stat("a/b") is None
    assert store.delete("a/b") is False
    assert store.touch("a/b") is False
    assert list(store.keys()) == []
    assert store.nbytes() == 0


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000, bytearray(b"abc"), memoryview(b"abcdef")[2:4]])
def test_round_trip(store, data):
    store.put("a", data)
    assert store.get("a") == bytes(data)
    assert store.stat("a").nbytes == len(data)


def test_put_replaces(store):
    store.put("a", b"long before")
    store.put("a", b"new")
    assert store.get("a") == b"new"
    assert list(store.keys()) == ["a"]
    assert store.nbytes() == 3


def test_what_get_returns_is_the_callers_own(store):
    store.put("a", b"abc")
    store.get("a")[0] = 0
    assert store.get("a") == b"abc"


def test_a_buffer_changed_after_put_changes_nothing(store):
    data = bytearray(b"abc")
    store.put("a", data)
    data[0] = 0
    assert store.get("a") == b"abc"


def test_a_key_may_continue_another(store):
    store.put("a", b"1")
    store.put("a/b", b"2")
    store.put("a/b/c", b"3")
    assert store.delete("a/b") is True
    assert [store.get(key) for key in ("a", "a/b", "a/b/c")] == [b"1", None, b"3"]


def test_keys_and_nbytes_by_prefix(store):
    for key in ("kv/a/1", "kv/a/2", "kv/ab/1", "kv.x", "content/a"):
        store.put(key, b"12")
    assert sorted(store.keys()) == ["content/a", "kv.x", "kv/a/1", "kv/a/2", "kv/ab/1"]
    assert sorted(store.keys("kv/a/")) == ["kv/a/1", "kv/a/2"]
    assert sorted(store.keys("kv/a")) == ["kv/a/1", "kv/a/2", "kv/ab/1"]
    assert sorted(store.keys("kv")) == ["kv.x", "kv/a/1", "kv/a/2", "kv/ab/1"]
    assert list(store.keys("nothing/here")) == []
    assert store.nbytes("kv/a/") == 4


def test_deleting_while_listing(store):
    for index in range(20):
        store.put(f"a/{index}/b", b"x")
    for key in store.keys("a/"):
        assert store.delete(key)
    assert list(store.keys()) == []


def test_use_is_recorded_by_put_and_touch(store):
    before = time.time()
    store.put("a", b"1")
    store.put("b", b"1")
    assert before <= store.stat("a").used_s <= store.stat("b").used_s <= time.time()
    assert store.touch("a") is True
    assert store.stat("a").used_s >= store.stat("b").used_s
    assert store.get("a") == b"1"


BAD_KEYS = ["", "/", "a/", "/a", "a//b", "..", "a/../b", ".", ".hidden", "a/.b", "A", "ä", "a b", "a\n", "a\0", "a\\b"]


@pytest.mark.parametrize("key", [*BAD_KEYS, "a+x2l", "a" * 201, "a/" * 600 + "a", "~", "a:b"])
def test_bad_keys_are_refused(store, key):
    for call in (store.get, store.delete, store.stat, store.touch, lambda key: store.put(key, b"x")):
        with pytest.raises(InvalidKey):
            call(key)
    assert list(store.keys()) == []


@pytest.mark.parametrize("prefix", ["/", "..", "../x", "a//", "a/..", "A"])
def test_bad_prefixes_are_refused(store, prefix):
    with pytest.raises(InvalidKey):
        list(store.keys(prefix))


@on_one_store
@given(at=st.integers(0, 123), bit=st.integers(0, 7))
def test_every_flipped_bit_is_detected(store, damage, at, bit):
    store.put("a/b", bytes(range(100)))
    damage("a/b", lambda blob: blob[:at] + bytes([blob[at] ^ (1 << bit)]) + blob[at + 1 :])
    with pytest.raises(CorruptBlob, match="a/b"):
        store.get("a/b")
    store.put("a/b", b"healed")
    assert store.get("a/b") == b"healed"


@on_one_store
@given(length=st.integers(0, 123))
def test_every_truncation_is_detected(store, damage, length):
    store.put("a", bytes(100))
    damage("a", lambda blob: blob[:length])
    with pytest.raises(CorruptBlob):
        store.get("a")


@pytest.mark.parametrize("change", [lambda blob: blob + b"x", lambda blob: b"", lambda blob: b"garbage" * 30])
def test_other_damage_is_detected(store, damage, change):
    store.put("a", bytes(100))
    damage("a", change)
    with pytest.raises(CorruptBlob):
        store.get("a")


def test_a_blob_under_anothers_key_is_detected(store, damage):
    store.put("a", b"one")
    store.put("b", b"two")
    other = b"".join(map(bytes, store._read("b")))
    damage("a", lambda blob: other)
    with pytest.raises(CorruptBlob):
        store.get("a")


def test_a_newer_format_is_told_apart_and_left_alone(store, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(envelope, "FORMAT_VERSION", envelope.FORMAT_VERSION + 1)
        store.put("a", b"from the future")
    with pytest.raises(FormatVersionError, match=f"version {envelope.FORMAT_VERSION + 1}"):
        store.get("a")
    assert list(store.keys()) == ["a"]


def test_an_older_format_is_read(store, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(envelope, "FORMAT_VERSION", 1)
        store.put("a", b"from the past")
    assert store.get("a") == b"from the past"
    assert store.get_many(["a"]) == [b"from the past"]


def test_threads_never_see_a_mixture(store):
    """Writers of differing sizes, readers, deleters and listers on the same few keys."""
    errors, stop = [], threading.Event()

    def loop(step):
        try:
            while not stop.is_set():
                for key in ("t/a", "t/b/c"):
                    step(key)
        except BaseException as error:
            errors.append(error)

    def read(key):
        data = store.get(key)
        assert data is None or len(set(data)) == 1

    def stat_all(key):
        for found in store.keys("t/"):
            store.stat(found)

    steps = [lambda key, n=n: store.put(key, bytes([n]) * (n * 5000)) for n in (1, 2, 3)]
    threads = [threading.Thread(target=loop, args=(step,)) for step in (*steps, read, read, store.delete, stat_all)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []


def test_close_twice(store):
    store.close()
    store.close()


@pytest.mark.parametrize(
    "url",
    ["", "memory", "memory:", "memory://x", "disk:", "disk://", "disk:///tmp/x", "ftp://host", "/tmp/x", ":", "disk"],
)
def test_bad_urls(url):
    with pytest.raises(InvalidStoreURL, match="known stores"):
        open_store(url)


def test_a_refused_url_never_repeats_a_password():
    for url in (
        "weird://:secret@host",
        "redis://:secret@host:port",
        "redis://:secret@host/db",
        "rediss://:secret@host?a=b",
    ):
        with pytest.raises(InvalidStoreURL) as caught:
            open_store(url)
        assert "secret" not in str(caught.value)
        assert isinstance(caught.value, StoreError)


names = st.sampled_from(["a", "a/b", "kv/1/low/00001", "kv/1/low/00002", "kv/10/x"])
operations = st.lists(
    st.tuples(st.sampled_from(["put", "delete", "get", "touch", "stat"]), names, st.binary(max_size=40)), max_size=30
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(operations)
def test_behaves_like_a_dict(store, operations):
    model: dict[str, bytes] = {}
    for key in list(store.keys()):
        store.delete(key)
    for operation, key, data in operations:
        if operation == "put":
            store.put(key, data)
            model[key] = data
        elif operation == "delete":
            assert store.delete(key) == (model.pop(key, None) is not None)
        elif operation == "get":
            assert store.get(key) == model.get(key)
            assert store.get_many([key, "never", key]) == [model.get(key), None, model.get(key)]
        elif operation == "touch":
            assert store.touch(key) == (key in model)
        else:
            stat = store.stat(key)
            assert (stat and stat.nbytes) == (len(model[key]) if key in model else None)
    for prefix in ("", "a", "kv/1/", "kv/1", "none"):
        expected = {key: len(data) for key, data in model.items() if key.startswith(prefix)}
        assert sorted(store.keys(prefix)) == sorted(expected)
        assert {key: stat.nbytes for key, stat in store.stats(prefix)} == expected


def test_many_in_one_read(store, damage):
    blobs = {f"kv/{index}": bytes([index]) * (index * 1000) for index in range(9)}
    for key, data in blobs.items():
        store.put(key, data)
    damage("kv/3", lambda blob: blob[:-1] + b"x")
    store.delete("kv/5")
    keys = [f"kv/{index}" for index in (8, 0, 3, 5, 1, 1)]
    found = store.get_many(keys)
    assert isinstance(found[2], CorruptBlob)
    assert [found[index] for index in (0, 1, 3, 4, 5)] == [blobs["kv/8"], b"", None, blobs["kv/1"], blobs["kv/1"]]
    assert store.get_many([]) == []
    with pytest.raises(InvalidKey):
        store.get_many(["kv/1", "../x"])


def test_what_get_many_returned_outlives_a_change(store):
    store.put("a", b"before")
    (found,) = store.get_many(["a"])
    store.put("a", b"after!")
    store.delete("a")
    assert found == b"before"
