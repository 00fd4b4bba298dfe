"""ChunkKV as safetensors bytes and back. Nothing here can run code that came with the data."""

from __future__ import annotations

import json
import math
import struct
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from compression.kv import ChunkKV, Level
from kvstore.base import new_buffer
from kvstore.errors import CorruptBlob
from kvstore.int8 import dequantize, quantize

Precision = Literal["exact", "int8"]
"""How numbers are stored: bit for bit, or within the bound that kvstore.int8 states, in half the bytes of bfloat16."""

_DTYPE_OF_NAME = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAME_OF_DTYPE = {dtype: name for name, dtype in _DTYPE_OF_NAME.items()}
_STORED = _DTYPE_OF_NAME | {"I8": torch.int8, "I32": torch.int32}
_NAME_OF_STORED = {dtype: name for name, dtype in _STORED.items()}
_LENGTH = struct.Struct("<Q")


def encode(kv: ChunkKV, precision: Precision = "exact") -> memoryview:
    """``kv`` as one safetensors file: tensors ``keys`` and ``values`` [layers, kv_heads, tokens, head_dim].

    ``level`` and ``ratio`` stand in its metadata. With int8, ``keys.scales`` and ``values.scales`` stand beside them,
    and the dtype to come back to in the metadata; with positions, int32 ``positions`` [axes, layers or 1, kv_heads or
    1, tokens], and ``next_position`` in the metadata; and ``num_others`` there unless it is 0. Raises ValueError for a
    dtype other than float32, float16, bfloat16, and with int8 for numbers that are not finite.
    """
    metadata = {"level": kv.level, "ratio": str(kv.ratio)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in (("keys", kv.keys), ("values", kv.values)):
        if tensor.dtype not in _NAME_OF_DTYPE:
            raise ValueError(f"cannot store {name} of dtype {tensor.dtype}")
        if precision == "int8":
            tensors[name], tensors[f"{name}.scales"] = quantize(tensor)
        else:
            tensors[name] = tensor.detach()
    if precision == "int8":
        metadata["dtype"] = _NAME_OF_DTYPE[kv.keys.dtype]
    if kv.num_others:
        metadata["num_others"] = str(kv.num_others)
    if kv.positions is not None:
        metadata["next_position"] = str(kv.next_position)
        tensors["positions"] = kv.positions
    return _pack(metadata, {name: tensors[name] for name in sorted(tensors, key=lambda name: -tensors[name].itemsize)})


def stored_nbytes(kv: ChunkKV, precision: Precision = "exact") -> int:
    """Bytes of keys, values and positions as ``encode`` writes them, scales included."""
    if precision == "exact":
        return kv.nbytes
    layers, heads, _, head_dim = kv.keys.shape
    integers = 2 * (kv.keys.numel() + layers * heads * head_dim * torch.float32.itemsize)
    return kv.nbytes - kv.keys.nbytes - kv.values.nbytes + integers


def decode(data: bytearray | memoryview) -> ChunkKV:
    """What ``encode`` was given, on the CPU. Unless it is int8 its tensors lie in ``data`` itself, which must not be
    changed any more.

    Raises CorruptBlob for anything that ``encode`` cannot have written.
    """
    try:
        (length,) = _LENGTH.unpack_from(data)
        start = _LENGTH.size + length
        if start > len(data):
            raise ValueError("header past the end")
        header = json.loads(bytes(data[_LENGTH.size : start]))
        metadata = header["__metadata__"]
        level, ratio = metadata["level"], int(metadata["ratio"])
        if level not in get_args(Level):
            raise ValueError(f"level {level!r}")
        keys, values = _numbers(data, start, header, "keys"), _numbers(data, start, header, "values")
        if keys.shape != values.shape or keys.dtype != values.dtype:
            raise ValueError(f"keys {list(keys.shape)} {keys.dtype}, values {list(values.shape)} {values.dtype}")
        positions, next_position = _positions(data, start, header, keys.shape)
        num_others = int(metadata.get("num_others", 0))
        if not 0 <= num_others <= keys.shape[2]:
            raise ValueError(f"{num_others} of {keys.shape[2]} tokens")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, struct.error) as error:
        raise CorruptBlob(f"not a stored KV: {error!r}") from error
    return ChunkKV(keys, values, cast(Level, level), ratio, positions, next_position, num_others)


def _pack(metadata: dict[str, str], tensors: dict[str, Tensor]) -> memoryview:
    """A safetensors file. Tensors of wider numbers must come first, so that all are aligned."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAME_OF_STORED[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    # A bytearray would be zeroed first, while no other thread may run.
    data = new_buffer(_LENGTH.size + len(text) + offset)
    data[: _LENGTH.size + len(text)] = _LENGTH.pack(len(text)) + text
    start = _LENGTH.size + len(text)
    for tensor in tensors.values():
        if tensor.numel():
            room = torch.frombuffer(data, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            room.view(tensor.shape).copy_(tensor)
        start += tensor.nbytes
    return data


def _numbers(data: bytearray | memoryview, start: int, header: Any, name: str) -> Tensor:
    """The numbers [layers, kv_heads, tokens, head_dim] called ``name``, in the dtype they had before storing."""
    tensor = _tensor(data, start, header[name], 4)
    if tensor.dtype != torch.int8:
        return tensor
    scales = _tensor(data, start, header[f"{name}.scales"], 3)
    if scales.dtype != torch.float32 or scales.shape != (*tensor.shape[:2], tensor.shape[3]):
        raise ValueError(f"scales {list(scales.shape)} {scales.dtype} for {list(tensor.shape)}")
    return dequantize(tensor, scales, _DTYPE_OF_NAME[header["__metadata__"]["dtype"]])


def _positions(
    data: bytearray | memoryview, start: int, header: Any, shape: torch.Size
) -> tuple[Tensor | None, int | None]:
    """The positions, and the one behind them, of keys of ``shape``; None where they are contiguous."""
    if "positions" not in header:
        return None, None
    positions = _tensor(data, start, header["positions"], 4)
    layers, heads, tokens, _ = shape
    _, for_layers, for_heads, for_tokens = positions.shape
    fits = for_layers in (1, layers) and for_heads in (1, heads) and for_tokens == tokens
    if positions.dtype != torch.int32 or not fits:
        raise ValueError(f"positions {list(positions.shape)} {positions.dtype} for {list(shape)}")
    return positions, int(header["__metadata__"]["next_position"])


def _tensor(data: bytearray | memoryview, start: int, entry: Any, num_dims: int) -> Tensor:
    """The tensor that ``entry`` of the header describes, a view of ``data``; its offsets count from ``start``."""
    dtype, shape, (begin, end) = _STORED[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if len(shape) != num_dims or not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape}, offsets {begin}, {end}")
    count = math.prod(shape)
    if end - begin != count * dtype.itemsize or start + end > len(data):
        raise ValueError(f"shape {shape} does not fill its {end - begin} bytes")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin).view(shape)
