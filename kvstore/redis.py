"""Blobs in Redis, or in a Redis Cluster, which several servers may share.

    x2l:{<key>}             one hash a blob: header, nbytes, used_s, token, data (the first part), <token>:1, <token>:2
    x2l:{<key>}:<token>     a blob being written; it expires by itself if its writer dies
    x2l:lock:{<name>}       a lock: its owner, expiring
    x2l:layout              the version of this layout

A blob is written aside in parts and renamed into place. As it is one key, a reader finds all of it or nothing, also
where Redis evicts keys on its own. The braces make a cluster put what belongs to one blob on one node, and different
chunks of a video on different nodes. A blob is as durable as the server's own persistence makes it.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np
import redis
from redis.backoff import ConstantBackoff
from redis.cluster import RedisCluster
from redis.exceptions import MovedError, RedisClusterException
from redis.retry import Retry

from kvstore.base import BlobStat, Data, NewBuffer, Sealed, Store, Tier, new_buffer
from kvstore.errors import FormatVersionError, InvalidStoreURL, StoreFull, StoreUnavailable

PART_NBYTES = 8 << 20
"""Larger values slow Redis and its clients down, and one over 512 MB resets the connection."""

_LAYOUT_VERSION = 1
CONNECTIONS = 3
READ_NBYTES = 1 << 20  # a call for 32 KiB, which is the client's default, spends its time in calls
_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 3.0
_ASIDE_EXPIRES_MS = 3_600_000
_SCAN_COUNT = 1000
_WRITE_ATTEMPTS = 5
_TLS_OPTIONS = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"})

_T = TypeVar("_T")

_CREATE = """
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""
# All its fields are there, or the reply to an earlier attempt was lost, or parts went before the blob was whole.
_PLACE = """
if redis.call('HLEN', KEYS[1]) == tonumber(ARGV[1]) then
    redis.call('PERSIST', KEYS[1])
    redis.call('RENAME', KEYS[1], KEYS[2])
    return 1
end
return redis.call('HGET', KEYS[2], 'token') == ARGV[2] and 1 or 0
"""
_TOUCH = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'used_s', ARGV[1])
return 1
"""
_ACQUIRE = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""


@dataclass(slots=True)
class _Blob:
    """A blob of which the first part has come; the others are as long, and ``token`` is in their names."""

    header: bytes
    token: str
    payload: memoryview
    part_nbytes: int

    @property
    def other_parts(self) -> range:
        return range(1, -(-len(self.payload) // self.part_nbytes))


class RedisStore(Store):
    """A store at ``redis://[USER:PASSWORD@]HOST[:PORT][/DB]``, with TLS at ``rediss://``.

    ``?cluster=true`` means a Redis Cluster, of which HOST is any node. ``rediss://`` takes the options ``ssl_ca_certs``
    (a file), ``ssl_certfile`` and ``ssl_keyfile`` (of the client), ``ssl_cert_reqs`` ("none" checks nothing) and
    ``ssl_check_hostname``. Raises InvalidStoreURL, also for a refused password, StoreUnavailable, and
    FormatVersionError if a newer version laid the store out.
    """

    def __init__(self, url: str) -> None:
        address = _Address.parse(url)
        self._name = address.name
        with self._errors("cannot open the store"):
            self._client = address.connect()
        self._threads = ThreadPoolExecutor(CONNECTIONS, "x2l-redis")
        try:
            with self._errors("cannot open the store"):
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        version = self._client.get("x2l:layout")
        if version is None:
            with suppress(redis.OutOfMemoryError):  # a full store can be read all the same
                self._client.set("x2l:layout", _LAYOUT_VERSION, nx=True)
        elif version != b"%d" % _LAYOUT_VERSION:
            raise FormatVersionError(
                f"{self._name} has layout version {version[:20].decode(errors='replace')}, "
                f"this software knows version {_LAYOUT_VERSION}"
            )

    def tier(self, key: str) -> Tier:
        return "redis"

    def close(self) -> None:
        self._threads.shutdown()
        self._client.close()

    def _read(self, key: str) -> Sealed | None:
        token = None
        with self._errors(f"cannot read {key}"):
            while (blob := self._read_first(key)) is not None:
                if all(self._read_part(key, blob, index) for index in blob.other_parts):
                    return blob.header, blob.payload
                if blob.token == token:  # not replaced in mid-read, so its parts are missing: its length will tell
                    return blob.header, blob.payload[:0]
                token = blob.token
        return None

    def _read_many(self, keys: Sequence[str], buffer: NewBuffer) -> Iterator[Sealed | None]:
        """The parts of all the blobs, over a few connections at a time. Into memory of its own, and into the caller's
        from there: when one read fails others may go on for a while."""
        futures: list[Future[Any]] = []

        def submit(work: Callable[..., _T], *arguments: object) -> Future[_T]:
            futures.append(self._threads.submit(work, *arguments))
            return futures[-1]

        try:
            with self._errors("cannot read"):
                firsts = [submit(self._read_first, key) for key in keys]
                reads = []
                for key, first in zip(keys, firsts, strict=True):
                    blob = first.result()
                    others = blob.other_parts if blob else ()
                    reads.append((key, blob, [submit(self._read_part, key, blob, index) for index in others]))
                for key, blob, parts in reads:
                    if not all(part.result() for part in parts):
                        sealed = self._read(key)  # replaced meanwhile
                    else:
                        sealed = None if blob is None else (blob.header, blob.payload)
                    yield _moved(sealed, buffer)
        finally:
            for future in futures:
                future.cancel()

    def _read_first(self, key: str) -> _Blob | None:
        header, token, nbytes, data = self._client.hmget(_name(key), "header", "token", "nbytes", "data")
        if header is token is nbytes is data is None:
            return None
        try:
            blob = _Blob(bytes(header), token.decode(), new_buffer(int(nbytes)), max(1, len(data)))
            _copy(data, blob.payload[: len(data)])
        except (AttributeError, TypeError, ValueError, MemoryError):  # not as this class writes it
            return _Blob(b"", "", new_buffer(0), 1)
        return blob

    def _read_part(self, key: str, blob: _Blob, index: int) -> bool:
        """Whether the part is there: not if the blob was replaced since its first part was read."""
        data = self._client.hget(_name(key), f"{blob.token}:{index}")
        room = blob.payload[index * blob.part_nbytes :][: blob.part_nbytes]
        if data is None or len(data) != len(room):
            return False
        _copy(data, room)
        return True

    def _read_headers(self, keys: Sequence[str]) -> list[bytes | None]:
        return [header for (header,) in self._hmget_each(keys, "header")]

    def _write(self, key: str, header: bytes, payload: Data) -> None:
        view = memoryview(payload).cast("B")
        with self._errors(f"cannot write {key}"):
            for _ in range(_WRITE_ATTEMPTS):
                if self._write_once(key, header, view):
                    return
        raise StoreFull(f"cannot write {key}: {self._name} evicts it before it is whole")

    def _write_once(self, key: str, header: bytes, payload: memoryview) -> bool:
        """Whether all of it lay there in the end: a Redis that evicts keys may take one that is being written."""
        token = uuid.uuid4().hex
        name, aside = _name(key), f"{_name(key)}:{token}"
        fields = {"header": header, "token": token, "nbytes": len(payload), "used_s": time.time()}
        try:
            self._client.eval(_CREATE, 1, aside, _ASIDE_EXPIRES_MS, *chain(*fields.items()))
            num_parts = max(1, -(-len(payload) // PART_NBYTES))
            for index in range(num_parts):
                part = bytes(payload[index * PART_NBYTES : (index + 1) * PART_NBYTES])
                self._client.hset(aside, f"{token}:{index}" if index else "data", part)
            placed = bool(self._client.eval(_PLACE, 2, aside, name, len(fields) + num_parts, token))
        except BaseException:
            self._drop(aside)
            raise
        if not placed:
            self._drop(aside)
        return placed

    def _drop(self, aside: str) -> None:
        with suppress(redis.RedisError, RedisClusterException):  # if not now, it expires
            self._client.unlink(aside)

    def _delete(self, key: str) -> bool:
        with self._errors(f"cannot delete {key}"):
            return bool(self._client.unlink(_name(key)))

    def _stat(self, key: str) -> BlobStat | None:
        with self._errors(f"cannot look up {key}"):
            return _stat_of(*self._client.hmget(_name(key), "nbytes", "used_s"))

    def _touch(self, key: str) -> bool:
        with self._errors(f"cannot touch {key}"):
            return bool(self._client.eval(_TOUCH, 1, _name(key), time.time()))

    def _keys(self, prefix: str) -> Iterator[str]:
        with self._errors("cannot list the store"):
            seen = set()  # a scan may tell a key twice
            for name in self._client.scan_iter(match=f"x2l:{{{prefix}*}}", count=_SCAN_COUNT):
                if name not in seen:
                    seen.add(name)
                    yield name.decode()[len("x2l:{") : -1]

    def stats(self, prefix: str = "") -> Iterator[tuple[str, BlobStat]]:
        keys = self.keys(prefix)
        while batch := list(islice(keys, _SCAN_COUNT)):
            for key, values in zip(batch, self._hmget_each(batch, "nbytes", "used_s"), strict=True):
                stat = _stat_of(*values)
                if stat is not None:
                    yield key, stat

    def _hmget_each(self, keys: Sequence[str], *fields: str) -> list[list[Any]]:
        with self._errors("cannot look up blobs"), self._client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.hmget(_name(key), *fields)
            return cast(list[list[Any]], pipeline.execute())

    def _acquire_lock(self, name: str, owner: str, ttl_s: float) -> bool:
        with self._errors(f"cannot lock {name}"):
            ttl_ms = max(1, round(ttl_s * 1000))
            return bool(self._client.eval(_ACQUIRE, 1, f"x2l:lock:{{{name}}}", owner, ttl_ms))

    def _release_lock(self, name: str, owner: str) -> bool:
        with self._errors(f"cannot unlock {name}"):
            return bool(self._client.eval(_RELEASE, 1, f"x2l:lock:{{{name}}}", owner))

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """Turns what the client says into an error of the tree."""
        try:
            yield
        except (redis.RedisError, RedisClusterException, OSError) as error:
            # The client of a cluster wraps what a node has said.
            if isinstance(error, redis.AuthenticationError) or isinstance(error.__cause__, redis.AuthenticationError):
                message = f"{action}: {self._name} refuses the user or password of the store URL"
                raise InvalidStoreURL(message) from error
            if isinstance(error, MovedError):
                raise InvalidStoreURL(f"{action}: {self._name} is a node of a cluster: add ?cluster=true") from error
            # A script's own error hides that of its command in servers before 7.
            if isinstance(error, redis.OutOfMemoryError) or "OOM command not allowed" in str(error):
                raise StoreFull(f"{action}: {self._name} is out of memory") from error
            raise StoreUnavailable(f"{action}: {self._name}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Address:
    """A store URL taken apart. ``name`` is what may be shown of it: no password."""

    name: str
    url: str
    cluster: bool

    @classmethod
    def parse(cls, url: str) -> _Address:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or 6379
            options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        except ValueError:
            raise InvalidStoreURL("not a Redis URL: the port or an option is malformed") from None
        cluster = options.pop("cluster", "false")
        unknown = sorted(set(options) - (_TLS_OPTIONS if parts.scheme == "rediss" else frozenset()))
        if not host:
            raise InvalidStoreURL("not a Redis URL: it names no host")
        if unknown or cluster not in ("true", "false"):
            raise InvalidStoreURL(f"not a Redis URL: unknown option {unknown[0] if unknown else 'cluster'!r}")
        database = parts.path.strip("/")
        if database and not re.fullmatch("[0-9]{1,9}", database):
            raise InvalidStoreURL("not a Redis URL: the database is a number")
        if cluster == "true" and int(database or 0):
            raise InvalidStoreURL("not a Redis URL: a cluster has database 0 only")
        return cls(
            f"{parts.scheme}://{host}:{port}", urlunsplit(parts._replace(query=urlencode(options))), cluster == "true"
        )

    def connect(self) -> Any:
        """A client; that of a cluster has asked a node for the others already."""
        options: dict[str, Any] = {
            "protocol": 3,
            "socket_timeout": _TIMEOUT_S,
            "socket_connect_timeout": _CONNECT_TIMEOUT_S,
            "socket_keepalive": True,
            "socket_read_size": READ_NBYTES,
            # Once more, for connections that a restart of the server has cut; what times out is not tried again.
            "retry": Retry(ConstantBackoff(0.1), 1, (redis.ConnectionError,)),
        }
        if self.cluster:
            return RedisCluster.from_url(self.url, **options)
        return redis.Redis.from_url(self.url, **options)


def _moved(sealed: Sealed | None, buffer: NewBuffer) -> Sealed | None:
    """Into the caller's memory, where that is any other."""
    if sealed is None or buffer is new_buffer:
        return sealed
    header, payload = sealed
    room = buffer(len(payload))
    _copy(payload, room)
    return header, room


def _copy(data: Data, room: memoryview) -> None:
    """As ``room[:] = data``, but other threads run meanwhile."""
    np.copyto(np.frombuffer(room, np.uint8), np.frombuffer(data, np.uint8))


def _name(key: str) -> str:
    return f"x2l:{{{key}}}"


def _stat_of(nbytes: bytes | None, used_s: bytes | None) -> BlobStat | None:
    return None if nbytes is None or used_s is None else BlobStat(int(nbytes), float(used_s))
