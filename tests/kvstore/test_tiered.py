"""What memory before another store may keep, and when it must not be believed."""

from __future__ import annotations

import pytest
from redis_servers import RedisServer

from kvstore import envelope
from kvstore.base import new_buffer
from kvstore.errors import CorruptBlob, FormatVersionError, StoreUnavailable
from kvstore.memory import MemoryStore
from kvstore.open import open_store
from kvstore.redis import PART_NBYTES, RedisStore
from kvstore.tiered import TieredStore

DATA = bytes(range(256)) * 40
HEADER_NBYTES = 24


class Counting(MemoryStore):
    """Tells which payloads were read."""

    def __init__(self):
        super().__init__()
        self.payloads = []

    def _read_many(self, keys, buffer):
        self.payloads += keys
        return super()._read_many(keys, buffer)


@pytest.fixture
def below():
    return Counting()


def test_the_second_read_comes_from_memory(below):
    store = TieredStore(below, 100_000)
    store.put("a", DATA)
    store.put("b", b"b")
    for _ in range(3):
        assert store.get_many(["a", "b", "none"]) == [DATA, b"b", None]
    assert below.payloads == ["a", "b", "none", "none", "none"]


def test_it_tells_where_a_read_goes(tmp_path):
    store = open_store(f"disk:{tmp_path}", cache_nbytes=100_000)
    store.put("a", DATA)
    assert store.tier("a") == store.tier("none") == "disk"
    store.get_many(["a"])
    assert store.tier("a") == "memory" and store.tier("none") == "disk"
    store.close()


def test_memory_is_bounded_and_the_least_recently_used_go(below):
    store = TieredStore(below, 3 * (1000 + HEADER_NBYTES))
    for key in "abcd":
        store.put(key, key.encode() * 1000)
    store.put("huge", bytes(10_000))
    store.get_many(["a", "b", "c"])
    store.get_many(["a", "huge", "huge"])
    store.get_many(["d"])  # b goes
    below.payloads.clear()
    store.get_many(["a", "c", "d", "huge"])
    assert below.payloads == ["huge"]
    store.get_many(["b"])
    assert below.payloads == ["huge", "b"]
    assert sum(len(payload) for _, payload in store._blobs.values()) <= 3000
    assert store._nbytes == 3 * (1000 + HEADER_NBYTES)


def test_what_another_server_deletes_or_replaces_is_seen(redis_url):
    stores = [TieredStore(RedisStore(redis_url), 100_000) for _ in range(2)]
    one, other = stores
    one.put("a", DATA)
    assert one.get_many(["a"]) == other.get_many(["a"]) == [DATA]
    other.put("a", DATA[::-1])
    assert one.get_many(["a"]) == [DATA[::-1]]
    one.put("a", DATA)
    assert other.get_many(["a"]) == [DATA]
    other.delete("a")
    assert one.get_many(["a"]) == [None]
    assert one._nbytes == other._nbytes == 0
    for store in stores:
        store.close()


def test_memory_serves_while_the_store_is_away(tmp_path):
    with RedisServer(tmp_path) as server:
        store = open_store(server.url)
        assert isinstance(store, TieredStore)
        store.put("kept", DATA)
        store.put("not/kept", DATA)
        store.get_many(["kept"])
        server.kill()
        assert store.get_many(["kept"]) == [DATA]
        with pytest.raises(StoreUnavailable):
            store.get_many(["kept", "not/kept"])
        with pytest.raises(StoreUnavailable):
            store.get("kept")
        server.start()
        assert store.get_many(["kept"]) == [None]  # that server had no persistence
        store.close()


def test_what_is_damaged_on_its_way_is_not_kept(below, monkeypatch):
    store = TieredStore(below, 100_000)
    store.put("a", DATA)
    read = below._read
    with monkeypatch.context() as patch:
        patch.setattr(below, "_read", lambda key: (read(key)[0], memoryview(DATA[:-1] + b"x")))
        (found,) = store.get_many(["a"])
        assert isinstance(found, CorruptBlob)
    assert store.get_many(["a"]) == [DATA]


def test_a_blob_is_verified_once_as_it_comes_in(below, monkeypatch):
    verified = []
    verify = envelope.verify
    monkeypatch.setattr(envelope, "verify", lambda key, *sealed: (verified.append(key), verify(key, *sealed)))
    store = TieredStore(below, 100_000)
    store.put("a", DATA)
    store.put("b", DATA)
    assert store.get_many(["a"]) == [DATA]
    assert store.get_many(["a", "b"]) == [DATA, DATA]
    assert verified == ["a", "b"]
    below.put("a", DATA[::-1])
    assert store.get_many(["a"]) == [DATA[::-1]]
    assert verified == ["a", "b", "a"]


def test_what_a_newer_version_has_written_is_refused_and_pushes_out_what_was_kept(below, monkeypatch):
    store = TieredStore(below, 100_000)
    store.put("a", DATA)
    store.get_many(["a"])
    with monkeypatch.context() as patch:
        patch.setattr(envelope, "FORMAT_VERSION", envelope.FORMAT_VERSION + 1)
        below.put("a", DATA[::-1])
    for _ in range(2):
        with pytest.raises(FormatVersionError):
            store.get_many(["a"])
    assert store._nbytes == 0


@pytest.mark.parametrize("kind", ["disk", "redis"])
def test_what_it_keeps_lies_in_the_buffers_that_it_was_given(tmp_path, redis_url, kind):
    rooms = []

    def buffer(nbytes):
        rooms.append(new_buffer(nbytes))
        return rooms[-1]

    url = {"disk": f"disk:{tmp_path}", "redis": redis_url}[kind]
    store = open_store(url, cache_nbytes=100_000_000, cache_buffers=lambda nbytes: buffer)
    large = bytes(PART_NBYTES + 1)
    for key, data in (("a", DATA), ("large", large), ("empty", b"")):
        store.put(key, data)
    for _ in range(2):
        found = store.get_many(["a", "large", "none", "empty"], new_buffer)
        assert found == [DATA, large, None, b""]
        assert [one.obj for one in found if one is not None] == [room.obj for room in rooms]
    store.close()


def test_where_memory_stands_by_default(tmp_path, redis_url):
    for url, cache_nbytes, tiered in (
        ("memory://", None, False),
        ("memory://", 1000, False),
        (f"disk:{tmp_path}", None, False),
        (f"disk:{tmp_path}", 1000, True),
        (redis_url, None, True),
        (redis_url, 0, False),
    ):
        store = open_store(url, cache_nbytes=cache_nbytes)
        assert isinstance(store, TieredStore) == tiered
        store.close()
