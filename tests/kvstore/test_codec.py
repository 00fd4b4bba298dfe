"""Bit for bit there and back, and garbage never gets further than CorruptBlob."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression.kv import ChunkKV
from kvstore import codec
from kvstore.errors import CorruptBlob

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ["prefix", "low", "high"])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_round_trip(make, dtype, level, tokens):
    kv = make.kv(level, tokens, dtype)
    assert make.same(codec.decode(codec.encode(kv)), kv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_survives(make, dtype):
    """NaNs with payloads, infinities, denormals and negative zeros included."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    bits = patterns.to(torch.int16) if dtype.itemsize == 2 else patterns * 65_537
    tensor = bits.view(dtype).view(4, 2, -1, 8)
    kv = ChunkKV(tensor, tensor.flip(2), "low", 2)
    assert make.same(codec.decode(codec.encode(kv)), kv)


def test_views_are_stored_as_what_they_show(make):
    memory = torch.randn(2, 2, 3, 10, 8, requires_grad=True)
    kv = ChunkKV(memory[0].transpose(0, 1)[:, :, 2:7], memory[1].transpose(0, 1)[:, :, 2:7], "high", 16)
    decoded = codec.decode(codec.encode(kv))
    assert torch.equal(decoded.keys, kv.keys)
    assert torch.equal(decoded.values, kv.values)
    assert not decoded.keys.requires_grad


def test_decoding_copies_nothing(make):
    data = codec.encode(make.kv())
    decoded = codec.decode(data)
    data[-4:] = b"\0\0\0\0"
    assert decoded.values[-1, -1, -1, -1] == 0


def test_the_bytes_are_plain_safetensors(make):
    kv = make.kv(dtype=torch.bfloat16)
    tensors = safetensors.torch.load(bytes(codec.encode(kv)))
    assert sorted(tensors) == ["keys", "values"]
    assert torch.equal(tensors["keys"], kv.keys)
    assert torch.equal(tensors["values"], kv.values)
    theirs = safetensors.torch.save(tensors, metadata={"level": "low", "ratio": "2"})
    assert make.same(codec.decode(bytearray(theirs)), kv)


def test_other_dtypes_are_refused():
    tensor = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        codec.encode(ChunkKV(tensor, tensor, "low", 2))


@given(st.binary(max_size=200))
def test_garbage(data):
    with pytest.raises(CorruptBlob):
        codec.decode(bytearray(data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.sampled_from(["F32", "low", "2", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape"]), inner),
    max_leaves=6,
)


@given(st.data())
def test_a_wrong_header(make, data):
    """Any field replaced by any value: CorruptBlob, or a KV that lies within the data."""
    encoded = codec.encode(make.kv())
    length = int.from_bytes(encoded[:8], "little")
    header = json.loads(encoded[8 : 8 + length])
    part = header[data.draw(st.sampled_from(sorted(header)))]
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(json_values)
    text = json.dumps(header).encode()
    try:
        kv = codec.decode(bytearray(len(text).to_bytes(8, "little") + text + encoded[8 + length :]))
    except CorruptBlob:
        return
    assert kv.keys.shape == kv.values.shape
    kv.keys.sum() + kv.values.sum()


@given(st.data())
def test_a_truncated_kv(make, data):
    encoded = codec.encode(make.kv())
    with pytest.raises(CorruptBlob):
        codec.decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])
