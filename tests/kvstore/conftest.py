"""One ``store`` fixture over every backend, and small videos to put into it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from redis_servers import RedisServer, make_certificate, redis_cluster, tls_before

from compression.chunk import Chunk
from compression.kv import ChunkKV, Level
from kvstore.base import Store
from kvstore.key import Fingerprint, KVKey
from kvstore.manifest import ChunkRecord, Manifest
from kvstore.open import open_store
from kvstore.redis import RedisStore
from kvstore.resident import HighKV
from kvstore.video import VideoStore


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), password="secret word") as server:
        yield server


@pytest.fixture(scope="session")
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url.replace(" ", "%20")


@pytest.fixture(scope="session")
def rediss_url(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    certificate, key = make_certificate(tmp_path_factory.mktemp("tls"))
    with tls_before(redis_server.port, certificate, key) as port:
        yield f"rediss://:secret%20word@127.0.0.1:{port}/1?ssl_ca_certs={certificate}"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes
    with warnings.catch_warnings():  # a cluster's client leaves it to the collector to close what was cut
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="session")
def cluster_url(cluster: list[RedisServer]) -> str:
    return f"{cluster[0].url}?cluster=true"


BACKENDS = ["memory", "disk", "redis", "rediss", "cluster", "tiered-disk", "tiered-redis"]


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    tier, _, kind = request.param.rpartition("-")
    if kind in ("memory", "disk"):
        url = {"memory": "memory://", "disk": f"disk:{tmp_path / 'store'}"}[kind]
    else:
        url = request.getfixturevalue(f"{kind}_url")
        empty(url)
    store = open_store(url, cache_nbytes=50_000 if tier else 0)
    yield store
    store.close()


def empty(url: str) -> None:
    store = RedisStore(url)
    store._client.flushall()
    store.close()


@pytest.fixture
def damage(store: Store) -> Callable[[str, Callable[[bytes], bytes]], None]:
    """Rewrites the bytes that lie under a key, header included, behind the store's back."""

    def rewrite(key: str, change: Callable[[bytes], bytes]) -> None:
        header, payload = store._read(key)
        changed = change(bytes(header) + bytes(payload))
        store._write(key, changed[:24], changed[24:])

    return rewrite


class Make:
    """Small videos and their parts."""

    fingerprint = Fingerprint("tiny-1", low_ratio=2, high_ratio=16, dtype="float32", fps=1.0, max_frames=None)

    def key(self, name: int = 0, salt: str = "") -> KVKey:
        return KVKey.of(f"{name:064x}", self.fingerprint, salt)

    def kv(self, level: Level = "low", tokens: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0) -> ChunkKV:
        generator = torch.Generator().manual_seed(seed)
        keys, values = (torch.randn(2, 3, tokens, 8, generator=generator).to(dtype) for _ in range(2))
        return ChunkKV(keys, values, level, {"prefix": 1, "low": 2, "high": 16}[level])

    def high(self, tokens_each: Sequence[int] = (4, 2, 2)) -> HighKV:
        prefix, *chunks = tokens_each
        return HighKV(self.kv("prefix", prefix), tuple(self.kv("high", tokens) for tokens in chunks))

    def manifest(self, num_chunks: int) -> Manifest:
        records = tuple(
            ChunkRecord(Chunk(index, index * 8.0, index * 8.0 + 8.0, 8), 80, 40, 5, 40 * 96, 5 * 96)
            for index in range(num_chunks)
        )
        return Manifest(self.fingerprint, num_chunks * 8.0, 320, 240, num_chunks * 8, records, 4, 384, 1.25, "packed")

    def write(self, videos: VideoStore, key: KVKey, num_chunks: int) -> Manifest:
        """A whole video, committed. The seed of chunk i is i + 1."""
        videos.write_prefix(key, self.kv("prefix"))
        for index in range(num_chunks):
            low, high = (self.kv(level, seed=index + 1) for level in ("low", "high"))
            videos.write_chunk(key, index, low, high, b"jpeg %d" % index)
        manifest = self.manifest(num_chunks)
        videos.commit(key, manifest)
        return manifest

    def same(self, a: ChunkKV, b: ChunkKV) -> bool:
        """Bit for bit, whatever the bits mean."""

        def bits(kv: ChunkKV) -> list[object]:
            return [
                (t.dtype, t.shape, t.cpu().contiguous().view(torch.uint8).numpy().tobytes())
                for t in (kv.keys, kv.values)
            ]

        return (a.level, a.ratio) == (b.level, b.ratio) and bits(a) == bits(b)


@pytest.fixture(scope="session")
def make() -> Make:
    return Make()
