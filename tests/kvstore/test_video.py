"""A video's KVs over every store: committed by the manifest, read back whole, damage told apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore import envelope
from kvstore.errors import CorruptBlob, FormatVersionError, MissingBlob
from kvstore.key import KVKey, SampledKey
from kvstore.manifest import Manifest
from kvstore.open import open_store
from kvstore.video import VideoStore


@pytest.fixture
def videos(store):
    return VideoStore(store)


def flip_last_byte(blob):
    return blob[:-1] + bytes([blob[-1] ^ 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(videos, make, dtype):
    key = make.key()
    prefix = make.kv("prefix", dtype=dtype)
    lows = [make.kv("low", 6, dtype, seed) for seed in range(3)]
    highs = [make.kv("high", 2, dtype, seed) for seed in range(3)]
    videos.write_prefix(key, prefix)
    for index in range(3):
        videos.write_chunk(key, index, lows[index], highs[index], b"jpeg %d" % index)
    videos.commit(key, make.manifest(3))
    assert videos.manifest(key) == make.manifest(3)
    high = videos.read_high(key)
    assert make.same(high.prefix, prefix)
    assert all(map(make.same, high.chunks, highs))
    assert len(high.chunks) == 3
    read = videos.read_low(key, [2, 0])
    assert make.same(read[0], lows[2])
    assert make.same(read[1], lows[0])
    assert videos.read_low(key, []) == []
    of_any = videos.read_low_of([(key, 2), (make.key(1), 0), (key, 0)])
    assert make.same(of_any[0], read[0]) and make.same(of_any[2], read[1]) and isinstance(of_any[1], MissingBlob)
    assert videos.thumbnail(key, 1) == b"jpeg 1"
    assert videos.thumbnail(key, 3) is None


def test_l_kvs_as_int8(store, make):
    """Only the L-KVs are, and whoever reads them need not know."""
    key = make.key()
    make.write(VideoStore(store, "int8"), key, 2)
    videos = VideoStore(store)
    assert make.same(videos.read_high(key).prefix, make.kv("prefix"))
    assert make.same(videos.read_high(key).chunks[1], make.kv("high", seed=2))
    exact, (low,) = make.kv("low", seed=2), videos.read_low(key, [1])
    assert 0 < (low.keys - exact.keys).abs().max() < exact.keys.abs().max() / 250
    assert low.keys.dtype == exact.keys.dtype


@pytest.mark.parametrize("blob", ["low", "high", "thumbnail"])
@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_chunk_is_read_back_whole_or_not_at_all(videos, store, make, damage, blob, how):
    key = make.key()
    low, high = make.kv("low", 6), make.kv("high", 2)
    videos.write_chunk(key, 0, low, high, b"jpeg")
    read = videos.read_chunk(key, 0)
    assert make.same(read[0], low)
    assert make.same(read[1], high)
    name = getattr(key, blob)(0)
    if how == "gone":
        store.delete(name)
    else:
        damage(name, flip_last_byte)
    assert videos.read_chunk(key, 0) is None


def test_nothing_is_visible_before_the_commit(videos, make):
    key = make.key()
    videos.write_prefix(key, make.kv("prefix"))
    videos.write_chunk(key, 0, make.kv("low"), make.kv("high"), b"jpeg")
    assert videos.manifest(key) is None
    assert videos.read_high(key) is None
    videos.commit(key, make.manifest(1))
    assert videos.manifest(key) is not None
    assert videos.read_high(key) is not None


def test_another_tenants_video_is_a_miss(videos, make):
    make.write(videos, make.key(salt="one"), 1)
    assert videos.manifest(make.key(salt="two")) is None
    assert videos.read_high(make.key()) is None


def test_missing_and_corrupt_are_told_apart_and_the_rest_still_serves(videos, store, make, damage):
    key = make.key()
    make.write(videos, key, 4)
    store.delete(key.low(1))
    damage(key.low(2), flip_last_byte)
    good, missing, corrupt, last = videos.read_low(key, range(4))
    assert make.same(good, make.kv("low", seed=1))
    assert isinstance(missing, MissingBlob)
    assert isinstance(corrupt, CorruptBlob)
    assert make.same(last, make.kv("low", seed=4))
    videos.write_chunk(key, 2, make.kv("low", seed=3), make.kv("high", seed=3), b"jpeg 2")
    assert make.same(videos.read_low(key, [2])[0], make.kv("low", seed=3))


@pytest.mark.parametrize("blob", ["prefix", "high"])
def test_high_kvs_are_whole_or_an_error(videos, store, make, damage, blob):
    key = make.key()
    make.write(videos, key, 2)
    name = key.prefix if blob == "prefix" else key.high(1)
    damage(name, flip_last_byte)
    with pytest.raises(CorruptBlob, match=name):
        videos.read_high(key)
    store.delete(name)
    with pytest.raises(MissingBlob, match=name):
        videos.read_high(key)


def test_a_damaged_manifest(videos, make, damage):
    key = make.key()
    make.write(videos, key, 1)
    damage(key.manifest, flip_last_byte)
    with pytest.raises(CorruptBlob):
        videos.manifest(key)


def test_a_newer_manifest_is_an_error_and_nothing_is_deleted(videos, store, make, monkeypatch):
    key = make.key()
    make.write(videos, key, 1)
    with monkeypatch.context() as newer:
        newer.setattr(envelope, "FORMAT_VERSION", envelope.FORMAT_VERSION + 1)
        videos.commit(key, make.manifest(1))
    before = sorted(store.keys())
    for call in (videos.manifest, videos.read_high):
        with pytest.raises(FormatVersionError):
            call(key)
    assert sorted(store.keys()) == before


def test_delete_removes_this_video_alone(videos, store, make):
    make.write(videos, make.key(1), 2)
    make.write(videos, make.key(2), 2)
    assert videos.delete(make.key(1)) is True
    assert videos.delete(make.key(1)) is False
    assert list(store.keys(make.key(1).root)) == []
    assert videos.read_high(make.key(2)) is not None


def test_all_that_was_made_of_a_video_goes_together(videos, store, make):
    ours, theirs = SampledKey.of("1" * 64, 1, None), SampledKey.of("1" * 64, 1, None, "tenant")
    for name, sampled in ((1, ours), (2, ours), (3, theirs)):
        videos.note(make.key(name), sampled)
        make.write(videos, make.key(name), 2)
    videos.note(make.key(4), ours)  # begun, and cut off
    videos.write_prefix(make.key(4), make.kv("prefix"))
    videos.note(make.key(5), ours)  # not even begun, or removed since
    videos.delete_made_of(ours)
    left = {key.split("/")[1] for key in store.keys("")}
    assert left == {make.key(3).digest, theirs.digest}
    assert videos.read_high(make.key(3)) is not None
    videos.delete_made_of(theirs)
    assert list(store.keys()) == []


def test_delete_takes_the_manifest_first(videos, store, make, monkeypatch):
    key = make.key()
    make.write(videos, key, 2)
    deleted = []
    delete = store.delete
    monkeypatch.setattr(store, "delete", lambda blob: deleted.append(blob) or delete(blob))
    videos.delete(key)
    assert deleted[0] == key.manifest
    assert len(deleted) == 1 + 1 + 3 * 2


def test_a_restart_from_disk(make, tmp_path: Path):
    key = make.key()
    store = open_store(f"disk:{tmp_path}")
    make.write(VideoStore(store), key, 2)
    store.close()
    store = open_store(f"disk:{tmp_path}")
    videos = VideoStore(store)
    assert videos.manifest(key) == make.manifest(2)
    assert make.same(videos.read_high(key).chunks[1], make.kv("high", seed=2))
    store.close()


def test_manifest_json(make):
    manifest = make.manifest(2)
    assert Manifest.from_json(manifest.to_json()) == manifest
    empty = replace(manifest, records=(), fingerprint=replace(manifest.fingerprint, max_frames=7))
    assert Manifest.from_json(bytearray(empty.to_json())) == empty
    placed = replace(manifest, next_position=190)
    assert Manifest.from_json(placed.to_json()) == placed


def test_a_manifest_from_before_videos_had_positions(make):
    content = json.loads(make.manifest(2).to_json())
    del content["next_position"]
    assert Manifest.from_json(json.dumps(content).encode()) == make.manifest(2)


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b'{"records": 3}', b"\xff", b"[" * 100_000])
def test_what_is_no_manifest(data):
    with pytest.raises(CorruptBlob):
        Manifest.from_json(data)


def test_kvs_that_another_model_made_are_not_taken_for_its_own(videos, store, make):
    """Blobs copied under another model's key, as they lie there."""
    theirs = make.key()
    ours = KVKey.of(f"{0:064x}", replace(make.fingerprint, model="other-1"))
    make.write(videos, theirs, 2)
    for key in list(store.keys(theirs.root)):
        store._write(ours.root + key.removeprefix(theirs.root), *store._read(key))
    before = sorted(store.keys())
    for read in (videos.manifest, videos.read_high):
        with pytest.raises(CorruptBlob):
            read(ours)
    assert isinstance(videos.read_low(ours, [0])[0], CorruptBlob)
    assert sorted(store.keys()) == before
    assert make.same(videos.read_low(theirs, [0])[0], make.kv("low", seed=1))
