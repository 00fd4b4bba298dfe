"""Two different things never share a name; the same thing always has the same one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.key import ContentKey, Fingerprint, KVKey, SampledKey

sha256s = st.sampled_from(["0" * 64, "1" * 64, "a" * 64])
texts = st.text(alphabet='ab",:[]{}\\ \né😀', max_size=6)
fingerprints = st.builds(
    Fingerprint,
    model=texts,
    low_ratio=st.integers(1, 3),
    high_ratio=st.integers(1, 3),
    dtype=texts,
    fps=st.sampled_from([1, 1.0, 0.5, 2]),
    max_frames=st.none() | st.integers(1, 3),
    low_precision=st.sampled_from(["exact", "int8"]),
    format_version=st.integers(1, 2),
)
parts = st.tuples(sha256s, fingerprints, texts)


@given(parts, parts)
def test_keys_are_equal_exactly_when_everything_is(a, b):
    assert (KVKey.of(*a) == KVKey.of(*b)) == (a == b)
    assert (KVKey.of(*a).root == KVKey.of(*b).root) == (a == b)


@given(parts)
def test_every_field_takes_part(part):
    content, fingerprint, salt = part
    key = KVKey.of(content, fingerprint, salt)
    assert key == KVKey.of(*part)
    assert key != KVKey.of(content, fingerprint, salt + "x")
    assert key != KVKey.of("b" * 64, fingerprint, salt)
    for name, other in {
        "model": fingerprint.model + "x",
        "low_ratio": 9,
        "high_ratio": 9,
        "dtype": fingerprint.dtype + "x",
        "fps": 0.25,
        "max_frames": 9,
        "low_precision": "other",
        "format_version": 9,
    }.items():
        assert key != KVKey.of(content, replace(fingerprint, **{name: other}), salt), name


@given(st.tuples(sha256s, texts), st.tuples(sha256s, texts))
def test_a_tenant_never_meets_anothers_content(a, b):
    assert (ContentKey.of(*a) == ContentKey.of(*b)) == (a == b)


samplings = st.tuples(sha256s, st.sampled_from([1, 1.0, 0.5, 2]), st.none() | st.integers(1, 3), texts)


@given(samplings, samplings)
def test_a_tenant_or_another_sampling_never_meets_what_was_made_of_this_one(a, b):
    assert (SampledKey.of(*a) == SampledKey.of(*b)) == (a == b)


def test_names(make):
    key = make.key()
    assert len(key.digest) == 64
    assert key.manifest == f"kv/{key.digest}/manifest"
    assert key.prefix == f"kv/{key.digest}/prefix"
    assert key.low(3) == f"kv/{key.digest}/low/00003"
    assert key.high(3) == f"kv/{key.digest}/high/00003"
    assert key.thumbnail(3) == f"kv/{key.digest}/thumb/00003"
    content = ContentKey.of("0" * 64)
    assert content.manifest == f"content/{content.digest}/manifest"
    sampled = SampledKey.of("0" * 64, 1, None)
    assert sampled.note(key) == f"made/{sampled.digest}/{key.digest}"
    assert content.part(12) == f"content/{content.digest}/part/00012"


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n"])
def test_a_shortened_or_odd_hash_is_refused(make, digest):
    for call in (
        KVKey,
        ContentKey,
        ContentKey.of,
        SampledKey,
        lambda digest: SampledKey.of(digest, 1, None),
        lambda digest: KVKey.of(digest, make.fingerprint),
    ):
        with pytest.raises(ValueError, match="SHA-256"):
            call(digest)


@pytest.mark.parametrize("fps", [0, -1.0, math.nan, math.inf])
def test_no_sampling_without_a_rate(fps):
    with pytest.raises(ValueError, match="fps"):
        Fingerprint("m", 2, 16, "float32", fps, None)
