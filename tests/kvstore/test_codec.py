"""Bit for bit there and back, and garbage never gets further than CorruptBlob."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression.kv import ChunkKV
from kvstore import codec
from kvstore.errors import CorruptBlob
from kvstore.int8 import RELATIVE_ERROR, quantize

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


POSITIONS = {
    "for all": (3, 1, 1, 5),
    "of each layer": (3, 2, 1, 5),
    "of each head": (3, 2, 3, 5),
    "one axis": (1, 1, 1, 5),
}


def placed(make, shape, dtype=torch.bfloat16):
    positions = torch.randint(0, 2**31 - 1, shape, dtype=torch.int32)
    return replace(make.kv(tokens=shape[3], dtype=dtype), positions=positions, next_position=77)


@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("shape", [*POSITIONS.values(), (3, 1, 1, 0)], ids=[*POSITIONS, "of none"])
def test_positions_survive(make, shape, precision):
    kv = placed(make, shape)
    data = codec.encode(kv, precision)
    decoded = codec.decode(data)
    assert decoded.positions.dtype == torch.int32 and torch.equal(decoded.positions, kv.positions)
    assert decoded.next_position == 77
    assert precision == "int8" or make.same(decoded, kv)
    assert 0 < len(data) - codec.stored_nbytes(kv, precision) < 1000
    assert sorted(safetensors.torch.load(bytes(data)))[-2 if precision == "exact" else -3] == "positions"


@pytest.mark.parametrize("shape", [(3, 1, 1, 4), (3, 3, 1, 5), (3, 1, 2, 5)])
def test_positions_of_other_tokens_are_refused(make, shape):
    kv = replace(placed(make, shape), **{name: getattr(make.kv(tokens=5), name) for name in ("keys", "values")})
    with pytest.raises(CorruptBlob, match="positions"):
        codec.decode(codec.encode(kv))


def test_how_many_tokens_are_not_visual_survives(make):
    kv = replace(make.kv(tokens=5), num_others=2)
    assert codec.decode(codec.encode(kv)).num_others == 2
    assert codec.decode(codec.encode(replace(kv, num_others=0))).num_others == 0
    for number in (-1, 6):
        with pytest.raises(CorruptBlob, match="of 5 tokens"):
            codec.decode(codec.encode(replace(kv, num_others=number)))


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


@pytest.mark.parametrize("precision", ["exact", "int8"])
@given(data=st.data())
def test_a_wrong_header(make, precision, data):
    """Any field replaced by any value: CorruptBlob, or a KV that lies within the data."""
    encoded = codec.encode(placed(make, data.draw(st.sampled_from(list(POSITIONS.values())))), precision)
    length = int.from_bytes(encoded[:8], "little")
    header = json.loads(bytes(encoded[8 : 8 + length]))
    part = header[data.draw(st.sampled_from(sorted(header)))]
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(json_values)
    text = json.dumps(header).encode()
    try:
        kv = codec.decode(bytearray(len(text).to_bytes(8, "little") + text + encoded[8 + length :]))
    except CorruptBlob:
        return
    assert kv.keys.shape == kv.values.shape
    kv.keys.sum() + kv.values.sum()
    if kv.positions is not None:
        kv.positions.expand(-1, *kv.keys.shape[:3]).sum()


@given(st.data())
def test_a_truncated_kv(make, data):
    encoded = codec.encode(make.kv())
    with pytest.raises(CorruptBlob):
        codec.decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


def within_the_bound(before, after):
    """The stated bound, and half a step of the dtype on top for the way back into it."""
    scales = quantize(before)[1].unsqueeze(2).double()
    exact, found = before.double(), after.double()
    step = torch.finfo(before.dtype)
    allowed = RELATIVE_ERROR * scales + step.eps / 2 * found.abs() + step.smallest_normal * step.eps
    return bool(((found - exact).abs() <= allowed).all())


tensors = st.tuples(
    st.sampled_from(DTYPES), st.integers(0, 9), st.integers(0, 2**32), st.sampled_from([1e-30, 1e-6, 1.0, 50.0])
)


@given(tensors)
def test_int8_stays_within_its_bound(drawn):
    dtype, tokens, seed, size = drawn
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 3, tokens, 8, generator=generator) * size for _ in range(2))
    keys[:, :, :, 0] *= 100  # channels that differ, as those of keys do
    values[:, 1, :, 3] = 0
    kv = ChunkKV(keys.to(dtype), values.to(dtype), "low", 2)
    data = codec.encode(kv, "int8")
    decoded = codec.decode(data)
    assert (decoded.level, decoded.ratio, decoded.keys.dtype) == ("low", 2, dtype)
    assert decoded.keys.shape == kv.keys.shape
    assert within_the_bound(kv.keys, decoded.keys)
    assert within_the_bound(kv.values, decoded.values)
    assert not decoded.values[:, 1, :, 3].any()
    again = codec.decode(codec.encode(decoded, "int8"))
    assert within_the_bound(decoded.keys, again.keys)


def test_int8_is_plain_safetensors_and_half_as_large(make):
    kv = make.kv(tokens=400, dtype=torch.bfloat16)
    data = codec.encode(kv, "int8")
    assert len(data) < 0.55 * len(codec.encode(kv))
    assert 0 < len(data) - codec.stored_nbytes(kv, "int8") < 1000
    assert 0 < len(codec.encode(kv)) - codec.stored_nbytes(kv) < 1000
    tensors = safetensors.torch.load(bytes(data))
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        "keys": (torch.int8, (2, 3, 400, 8)),
        "values": (torch.int8, (2, 3, 400, 8)),
        "keys.scales": (torch.float32, (2, 3, 8)),
        "values.scales": (torch.float32, (2, 3, 8)),
    }
    assert tensors["keys"].abs().amax(dim=2).eq(127).all(), "a channel does not use its whole range"


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_int8_refuses_what_is_not_finite(make, number):
    kv = make.kv()
    kv.values[0, 1, 2, 3] = number
    with pytest.raises(ValueError, match="finite"):
        codec.encode(kv, "int8")
