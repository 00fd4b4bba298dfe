"""Kept files over every store: whole, by range, or not at all."""

from __future__ import annotations

import io
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import content as content_module
from kvstore.content import ContentStore
from kvstore.errors import CorruptBlob, MissingBlob
from kvstore.key import ContentKey

KEY = ContentKey.of("0" * 64)


@pytest.fixture
def contents(store, monkeypatch):
    monkeypatch.setattr(content_module, "PART_NBYTES", 100)
    return ContentStore(store)


@pytest.mark.parametrize("nbytes", [0, 1, 99, 100, 101, 300, 1234])
def test_round_trip(contents, nbytes):
    data = random.Random(nbytes).randbytes(nbytes)
    contents.put(KEY, io.BytesIO(data))
    kept = contents.get(KEY)
    assert kept.nbytes == nbytes
    pieces = list(kept.read())
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= 100 for piece in pieces)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(start=st.integers(-400, 400), stop=st.none() | st.integers(-400, 400))
def test_ranges_are_slices(contents, start, stop):
    data = bytes(range(251))
    contents.put(KEY, io.BytesIO(data))
    assert b"".join(contents.get(KEY).read(start, stop)) == data[start:stop]


def test_a_file_in_real_parts_read_in_dribs(store):
    class Dribs(io.BytesIO):
        def read(self, nbytes=-1, /):
            return super().read(min(nbytes, 3_000_001))

    data = random.Random(0).randbytes(17_000_000)
    contents = ContentStore(store)
    contents.put(KEY, Dribs(data))
    assert sorted(store.keys(KEY.root)) == [KEY.manifest, KEY.part(0), KEY.part(1), KEY.part(2)]
    assert b"".join(contents.get(KEY).read()) == data


def test_a_miss_is_none(contents):
    contents.put(KEY, io.BytesIO(b"mine"))
    assert contents.get(ContentKey.of("0" * 64, salt="other")) is None
    assert contents.delete(ContentKey.of("1" * 64)) is False


class Breaks(io.BytesIO):
    """A connection that is cut after 250 bytes."""

    def read(self, nbytes=-1, /):
        data = super().read(nbytes)
        if self.tell() > 250:
            raise ConnectionResetError
        return data


def test_a_source_that_breaks_leaves_nothing(contents, store):
    with pytest.raises(ConnectionResetError):
        contents.put(KEY, Breaks(bytes(400)))
    assert contents.get(KEY) is None
    assert list(store.keys()) == []


def test_a_source_that_breaks_spares_what_was_kept_before(contents):
    contents.put(KEY, io.BytesIO(bytes(400)))
    with pytest.raises(ConnectionResetError):
        contents.put(KEY, Breaks(bytes(400)))
    assert b"".join(contents.get(KEY).read()) == bytes(400)


def test_damage_is_an_error_when_it_is_reached(contents, store, damage):
    contents.put(KEY, io.BytesIO(bytes(400)))
    damage(KEY.part(1), lambda blob: blob[:-1] + b"x")
    store.delete(KEY.part(3))
    store.put(KEY.part(2), bytes(99))
    kept = contents.get(KEY)
    assert b"".join(kept.read(0, 100)) == bytes(100)
    with pytest.raises(CorruptBlob):
        list(kept.read())
    with pytest.raises(CorruptBlob, match="length"):
        list(kept.read(200))
    with pytest.raises(MissingBlob):
        list(kept.read(300))


def test_a_damaged_manifest(contents, store):
    store.put(KEY.manifest, b"{}")
    with pytest.raises(CorruptBlob):
        contents.get(KEY)


def test_a_file_of_which_a_part_is_missing_is_not_held(contents, store):
    assert not contents.holds(KEY)
    for damage in (
        lambda: store.delete(KEY.part(1)),
        lambda: store.put(KEY.part(2), b"short"),
        lambda: store.put(KEY.manifest, b"garbage"),
    ):
        contents.put(KEY, io.BytesIO(bytes(250)))
        assert contents.holds(KEY)
        damage()
        assert not contents.holds(KEY)


def test_delete(contents, store):
    contents.put(KEY, io.BytesIO(bytes(400)))
    assert contents.delete(KEY) is True
    assert contents.get(KEY) is None
    assert list(store.keys()) == []
