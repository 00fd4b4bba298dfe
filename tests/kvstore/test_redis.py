"""What only a Redis can do to its store: refusals, evictions, kills, TLS, nodes that go."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
import warnings
from pathlib import Path

import pytest
from redis_servers import RedisServer, free_port, make_certificate, tls_before

from kvstore import redis as redis_module
from kvstore.errors import FormatVersionError, InvalidStoreURL, StoreError, StoreFull, StoreUnavailable
from kvstore.open import open_store
from kvstore.redis import RedisStore
from kvstore.video import VideoStore

LARGE = random.Random(0).randbytes(20_000_003)


@pytest.fixture
def server(tmp_path):
    """A server that a test may kill or fill."""
    with RedisServer(tmp_path, "--appendonly", "no") as server:
        yield server


@pytest.fixture
def parts_of_1000(monkeypatch):
    monkeypatch.setattr(redis_module, "PART_NBYTES", 1000)


def collect() -> None:
    """A cluster's client leaves it to the collector to close what was cut."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def fds() -> set[str]:
    """What is open. A socket has a number of its own, so that one in another's place is seen too."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.add(f"{path.name} {path.readlink()}")
    return found


@pytest.mark.parametrize("backend", ["redis", "rediss", "cluster"])
def test_large_blobs_go_in_parts(request, backend):
    store = RedisStore(request.getfixturevalue(f"{backend}_url"))
    store._client.flushall()
    for key in ("kv/a/low/1", "kv/a/low/2"):
        store.put(key, LARGE)
        lengths = [len(value) for value in store._client.hvals(f"x2l:{{{key}}}")]
        assert sorted(lengths)[-3:] == [20_000_003 - (16 << 20), 8 << 20, 8 << 20]
    assert store.get("kv/a/low/1") == LARGE
    assert store.get_many(["kv/a/low/2", "kv/a/low/1"]) == [LARGE, LARGE]
    assert store.nbytes("kv/a/") == 2 * len(LARGE)
    store.put("kv/a/low/1", b"small")
    assert store.get("kv/a/low/1") == b"small"
    for key in ("kv/a/low/1", "kv/a/low/2"):
        assert store.delete(key)
    assert list(store._client.scan_iter(match="x2l:{*")) == []
    store.close()


def test_leaves_nothing_open(redis_url):
    collect()  # what earlier tests left
    before = fds()
    store = RedisStore(redis_url)
    store.put("a", LARGE)
    store.get_many(["a", "a"])
    store.delete("a")
    store.close()
    store.close()
    assert not fds() - before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("x2l-redis")]


@pytest.mark.parametrize("password", ["", ":wrong@", "user:wrong@"])
@pytest.mark.parametrize("option", ["", "?cluster=true"])
def test_a_wrong_password_is_told_at_once(redis_server, password, option):
    collect()  # what earlier tests left
    before = fds()
    with pytest.raises(InvalidStoreURL, match="refuses the user or password") as caught:
        open_store(f"redis://{password}127.0.0.1:{redis_server.port}{option}", wait_s=60)
    assert "wrong" not in str(caught.value)
    assert not fds() - before


@pytest.mark.parametrize("option", ["", "?cluster=true"])
def test_an_unreachable_server_fails_fast(option):
    begin_s = time.monotonic()
    with pytest.raises(StoreUnavailable, match="cannot open the store") as caught:
        open_store(f"redis://:secret@127.0.0.1:{free_port()}{option}")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin_s < 5


def test_waiting_for_a_server(tmp_path):
    port = free_port()
    server = RedisServer(tmp_path, port=port)
    timer = threading.Timer(1.0, server.start)
    timer.start()
    try:
        open_store(server.url, wait_s=60).close()
    finally:
        timer.join()
        server.kill()


def test_no_cluster_where_one_is_asked_for(redis_url):
    with pytest.raises(StoreUnavailable):
        open_store(f"{redis_url}?cluster=true")


def test_a_cluster_asked_like_a_single_server(cluster):
    for node in cluster:  # the one that holds the layout's key opens, and refuses others
        with pytest.raises(InvalidStoreURL, match="cluster=true"):
            store = open_store(node.url)
            try:
                for index in range(20):
                    store.put(f"a/{index}", b"x")
            finally:
                store.close()


def test_a_certificate_that_nobody_vouches_for(redis_server, tmp_path):
    with tls_before(redis_server.port, *make_certificate(tmp_path)) as port:
        with pytest.raises(StoreUnavailable, match="certificate"):
            open_store(f"rediss://:secret%20word@127.0.0.1:{port}")
        open_store(f"rediss://:secret%20word@127.0.0.1:{port}?ssl_cert_reqs=none&ssl_check_hostname=false").close()


@pytest.mark.parametrize(
    "rest",
    ["", ":6379", "host:port", "host:99999", "host/x", "host/-1", "host?x=1", "host?cluster=maybe",
     "host?ssl_ca_certs=/x", "host/1?cluster=true", "host?cluster"],
)  # fmt: skip
def test_bad_urls(rest):
    with pytest.raises(InvalidStoreURL):
        open_store(f"redis://{rest}")


def test_a_newer_layout_is_refused_and_left_alone(server):
    store = RedisStore(server.url)
    store.put("a", b"x")
    store.close()
    with server.client() as client:
        client.set("x2l:layout", 2)
        with pytest.raises(FormatVersionError, match="version 2"):
            RedisStore(server.url)
        assert sorted(client.keys()) == [b"x2l:layout", b"x2l:{a}"]


def test_a_killed_server_is_an_error_and_its_return_needs_no_restart(server):
    store = RedisStore(server.url)
    store.put("a", b"x")
    server.kill()
    begin_s = time.monotonic()
    for call in (
        lambda: store.get("a"),
        lambda: store.get_many(["a", "b", "c"]),
        lambda: store.put("a", b"y"),
        lambda: store.delete("a"),
        lambda: store.stat("a"),
        lambda: store.touch("a"),
        lambda: list(store.keys()),
        lambda: list(store.stats()),
        lambda: store.acquire_lock("a", "me", 1.0),
        lambda: store.release_lock("a", "me"),
    ):
        with pytest.raises(StoreUnavailable):
            call()
    assert time.monotonic() - begin_s < 10
    server.start()
    assert store.get("a") is None
    store.put("a", LARGE)
    assert store.get_many(["a"]) == [LARGE]
    store.close()


def test_a_full_server_is_an_error_and_changes_nothing(server):
    with server.client() as client:
        client.config_set("maxmemory", "60mb")
        store = RedisStore(server.url)
        store.put("kept", b"k" * 1000)
        with pytest.raises(StoreFull):
            for index in range(10):
                store.put(f"fill/{index}", LARGE)
        with pytest.raises(StoreFull):
            store.put("kept", LARGE)
        assert store.get("kept") == b"k" * 1000
        full = list(store.keys("fill/"))
        assert 1 <= len(full) <= 3
        assert store.get_many(full) == [LARGE] * len(full)
        assert len(client.keys("x2l:{*")) == len(full) + 1, "something half written was left"
        RedisStore(server.url).close()  # a full server can be opened
        client.config_set("maxmemory", "1mb")
        with pytest.raises(StoreFull):
            store.acquire_lock("a", "owner", 1.0)
        client.config_set("maxmemory", "60mb")
        for key in full:
            assert store.delete(key)
        store.put("kept", LARGE)
        store.close()


def test_evictions_are_misses(server, make):
    """allkeys-lru under more videos than fit: every blob is whole or gone."""
    with server.client() as client:
        client.config_set("maxmemory", "30mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        store = RedisStore(server.url)
        data = {f"kv/{index}": bytes([index]) * 3_000_000 for index in range(30)}
        for key, payload in data.items():
            store.put(key, payload)
        found = store.get_many(list(data))
        assert 3 <= sum(payload is not None for payload in found) <= 12
        for payload, original in zip(found, data.values(), strict=True):
            assert payload is None or payload == original
        assert {key for key, _ in store.stats("kv/")} <= set(data)
        videos = VideoStore(store)
        key = make.key()
        make.write(videos, key, 3)
        assert make.same(videos.read_high(key).chunks[2], make.kv("high", seed=3))
        with pytest.raises(StoreFull):  # never fits
            store.put("huge", bytes(60_000_000))
        store.close()


def test_a_blob_evicted_while_it_is_written(server, parts_of_1000, monkeypatch):
    store = RedisStore(server.url)
    store.put("a", b"before")
    hset = store._client.hset

    def evict_then_set(name, field, value):
        if field != "data":
            store._client.unlink(name)
        return hset(name, field, value)

    monkeypatch.setattr(store._client, "hset", evict_then_set)
    with pytest.raises(StoreFull, match="evicts"):
        store.put("a", bytes(3500))
    assert store.get("a") == b"before"
    with server.client() as client:
        assert len(client.keys("x2l:{*")) == 1
    store.close()


def test_what_a_dead_writer_left_expires(server, parts_of_1000, monkeypatch):
    store = RedisStore(server.url)
    monkeypatch.setattr(store._client, "hset", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(store._client, "unlink", lambda *_: 0)  # as if killed
    with pytest.raises(KeyboardInterrupt):
        store.put("a", bytes(3500))
    with server.client() as client:
        (aside,) = client.keys("x2l:{a}:*")
        assert 0 < client.ttl(aside) <= 3600
    assert list(store.keys()) == []
    store.close()


def test_readers_of_a_blob_that_is_replaced_in_mid_read(server, parts_of_1000):
    """Blobs of many parts under constant change: old or new, never a mixture, never damaged."""
    store, other = RedisStore(server.url), RedisStore(server.url)
    stop = threading.Event()

    def write():
        fill = 0
        while not stop.is_set():
            fill = fill % 250 + 1
            other.put("a", bytes([fill]) * 4500)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen = set()
        for _ in range(150):
            for found in (store.get("a"), *store.get_many(["a", "a"])):
                if found is not None:
                    assert len(set(found)) == 1
                    assert len(found) == 4500
                    seen.add(found[0])
        assert len(seen) > 3
    finally:
        stop.set()
        thread.join()
        store.close()
        other.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"header": b""},
        {"nbytes": b"many"},
        {"nbytes": b"9" * 30},
        {"nbytes": b"-5"},
        {"data": b""},
        {"nbytes": b"3001"},
    ],
)
def test_fields_that_are_not_ours(server, parts_of_1000, fields):
    store = RedisStore(server.url)
    store.put("a", bytes(3000))
    with server.client() as client:
        client.hset("x2l:{a}", mapping=fields)
        with pytest.raises(StoreError):
            store.get("a")
        client.hdel("x2l:{a}", *fields)
        with pytest.raises(StoreError):
            store.get("a")
        client.set("x2l:{b}", b"no hash")
    with pytest.raises(StoreUnavailable):
        store.get("b")
    store.close()


def test_a_cluster_spreads_chunks_and_survives_a_lost_connection(cluster, cluster_url, make):
    store = RedisStore(cluster_url)
    store._client.flushall()
    key = make.key()
    make.write(VideoStore(store), key, 12)
    counts = []
    for node in cluster:
        with node.client() as client:
            counts.append(len(client.keys("x2l:{*")))
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert min(counts) > 0
    assert sum(counts) == 2 + 3 * 12
    assert make.same(VideoStore(store).read_high(key).chunks[11], make.kv("high", seed=12))
    assert len(list(store.stats(key.root))) == 2 + 3 * 12
    assert VideoStore(store).delete(key)
    assert list(store.keys()) == []
    store.close()
    del store
    collect()


def test_two_stores_share(redis_url, make):
    one, other = RedisStore(redis_url), RedisStore(redis_url)
    key = make.key()
    make.write(VideoStore(one), key, 2)
    assert make.same(VideoStore(other).read_high(key).chunks[1], make.kv("high", seed=2))
    assert one.acquire_lock("a", "one", 5.0)
    assert not other.acquire_lock("a", "other", 5.0)
    assert VideoStore(other).delete(key)
    assert VideoStore(one).manifest(key) is None
    one.close()
    other.close()


def test_the_password_in_no_error(redis_server):
    store = RedisStore(redis_server.url.replace(" ", "%20"))
    with redis_server.client() as client:
        client.config_set("requirepass", "changed")
        try:
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            with pytest.raises(InvalidStoreURL) as caught:
                store.get("a")
            assert "secret" not in str(caught.value)
        finally:
            client.config_set("requirepass", redis_server.password)
    assert store.get("a") is None
    store.close()
