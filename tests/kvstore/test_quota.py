"""Whole videos go, least recently used first, never one in use."""

from __future__ import annotations

import io

import pytest

from kvstore import quota as quota_module
from kvstore.content import ContentStore
from kvstore.errors import QuotaExceeded
from kvstore.key import ContentKey, PartKey
from kvstore.quota import Quota
from kvstore.video import VideoStore


@pytest.fixture
def videos(store, make):
    """Three committed videos of one size, made in the order 0, 1, 2."""
    videos = VideoStore(store)
    for name in range(3):
        make.write(videos, make.key(name), 2)
    return videos


@pytest.fixture
def nbytes_each(videos, store, make):
    return store.nbytes(make.key(0).root)


def test_under_the_limit_nothing_goes(store, videos, nbytes_each):
    assert Quota(store, 3 * nbytes_each).make_room() == []
    assert Quota(store, 4 * nbytes_each).make_room(nbytes_each) == []


def test_the_oldest_goes_first_and_whole(store, videos, nbytes_each, make):
    assert Quota(store, 3 * nbytes_each).make_room(1) == [make.key(0)]
    assert list(store.keys(make.key(0).root)) == []
    assert store.nbytes() == 2 * nbytes_each


def test_a_use_counts(store, videos, nbytes_each, make):
    videos.touch(make.key(0))
    assert Quota(store, 2 * nbytes_each).make_room() == [make.key(1)]
    videos.touch(make.key(2))
    assert Quota(store, nbytes_each).make_room() == [make.key(0)]
    assert videos.read_high(make.key(2)) is not None


def test_what_is_in_use_stays(store, videos, nbytes_each, make):
    in_use = {make.key(0), make.key(1)}
    assert Quota(store, 2 * nbytes_each).make_room(0, in_use) == [make.key(2)]


def test_no_room_removes_nothing(store, videos, nbytes_each, make):
    for look in (Quota.make_room, Quota.check_room):
        with pytest.raises(QuotaExceeded, match="quota"):
            look(Quota(store, 2 * nbytes_each), nbytes_each + 1, {make.key(0)})
        with pytest.raises(QuotaExceeded):
            look(Quota(store, nbytes_each), nbytes_each + 1)
    Quota(store, nbytes_each).check_room(nbytes_each)
    assert store.nbytes() == 3 * nbytes_each


def test_kept_files_count_and_go_by_their_own_use(store, videos, nbytes_each, make):
    contents, content = ContentStore(store), ContentKey.of("0" * 64)
    contents.put(content, io.BytesIO(bytes(nbytes_each - 200)))
    contents.touch(content)
    quota = Quota(store, 2 * nbytes_each)
    assert len(quota.make_room()) == 2
    assert contents.get(content) is not None
    videos.touch(make.key(2))
    assert quota.make_room(nbytes_each) == [content]
    assert list(store.keys(content.root)) == []


def test_what_is_being_written_stays(store, videos, nbytes_each, make):
    videos.write_chunk(make.key(9), 0, make.kv("low"), make.kv("high"), b"jpeg")
    for name in range(3):
        videos.touch(make.key(name))
    assert Quota(store, 3 * nbytes_each).make_room() == [make.key(0)]
    with pytest.raises(QuotaExceeded):
        Quota(store, 10).make_room()


def test_leavings_of_a_crash_go_in_their_turn(store, videos, nbytes_each, make, monkeypatch):
    monkeypatch.setattr(quota_module, "WRITING_S", 0)
    videos.write_chunk(make.key(9), 0, make.kv("low"), make.kv("high"), b"jpeg")
    for name in range(3):
        videos.touch(make.key(name))
    assert Quota(store, 3 * nbytes_each).make_room() == [make.key(9)]


def test_uploads_in_parts_count_and_stay(store, videos, nbytes_each, make):
    part = PartKey("upload_1", "part_1")
    ContentStore(store).put(part, io.BytesIO(bytes(nbytes_each - 200)))
    assert Quota(store, 3 * nbytes_each).make_room() == [make.key(0)]
    with pytest.raises(QuotaExceeded):
        Quota(store, nbytes_each - 200).make_room()
    assert ContentStore(store).get(part) is not None


def test_other_blobs_are_not_the_quotas_business(store, videos, nbytes_each):
    store.put("files/a", bytes(10_000))
    Quota(store, 0).make_room()
    assert list(store.keys()) == ["files/a"]
