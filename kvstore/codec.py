"""ChunkKV as safetensors bytes and back, bit for bit. Nothing here can run code that came with the data."""

from __future__ import annotations

import json
import math
import struct
from typing import Any, cast, get_args

import torch
from torch import Tensor

from compression.kv import ChunkKV, Level
from kvstore.errors import CorruptBlob

_DTYPE_OF_NAME = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAME_OF_DTYPE = {dtype: name for name, dtype in _DTYPE_OF_NAME.items()}
_LENGTH = struct.Struct("<Q")


def encode(kv: ChunkKV) -> bytearray:
    """``kv`` as one safetensors file: tensors ``keys`` and ``values`` [layers, kv_heads, tokens, head_dim].

    ``level`` and ``ratio`` stand in its metadata. Raises ValueError for a dtype other than float32, float16, bfloat16.
    """
    header: dict[str, object] = {"__metadata__": {"level": kv.level, "ratio": str(kv.ratio)}}
    offset = 0
    for name, tensor in (("keys", kv.keys), ("values", kv.values)):
        if tensor.dtype not in _NAME_OF_DTYPE:
            raise ValueError(f"cannot store {name} of dtype {tensor.dtype}")
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAME_OF_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    data = bytearray(_LENGTH.size + len(text) + offset)
    data[: _LENGTH.size + len(text)] = _LENGTH.pack(len(text)) + text
    start = _LENGTH.size + len(text)
    for tensor in (kv.keys, kv.values):
        if tensor.numel():
            room = torch.frombuffer(data, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            room.view(tensor.shape).copy_(tensor.detach())
        start += tensor.nbytes
    return data


def decode(data: bytearray | memoryview) -> ChunkKV:
    """What ``encode`` was given, on the CPU. Its tensors lie in ``data`` itself, which must not be changed any more.

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
        keys, values = _tensor(data, start, header["keys"]), _tensor(data, start, header["values"])
        if keys.shape != values.shape or keys.dtype != values.dtype:
            raise ValueError(f"keys {list(keys.shape)} {keys.dtype}, values {list(values.shape)} {values.dtype}")
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise CorruptBlob(f"not a stored KV: {error!r}") from error
    return ChunkKV(keys=keys, values=values, level=cast(Level, level), ratio=ratio)


def _tensor(data: bytearray | memoryview, start: int, entry: Any) -> Tensor:
    """The tensor that ``entry`` of the header describes, a view of ``data``; its offsets count from ``start``."""
    dtype, shape, (begin, end) = _DTYPE_OF_NAME[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if len(shape) != 4 or not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape}, offsets {begin}, {end}")
    count = math.prod(shape)
    if end - begin != count * dtype.itemsize or start + end > len(data):
        raise ValueError(f"shape {shape} does not fill its {end - begin} bytes")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin).view(shape)
