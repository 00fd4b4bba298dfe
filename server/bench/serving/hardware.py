"""The pace of what a server runs on, and how much a step of its model has to read: what floors are computed from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kvstore.base import new_buffer

_REPEATS = 9
_NBYTES = {"cuda": 1 << 31, "cpu": 1 << 28}
_NOT_IN_A_STEP = ("embed_tokens", "beacon", "vision", "visual", "projector", "newline", "encoder.")
"""In names of tensors that a step over text does not read: of the embeddings it reads a row each."""


@dataclass(frozen=True)
class Paces:
    """Bytes a second, as measured here. ``copy`` counts reads and writes of the device's memory (of a plain copy),
    ``to_device`` the bytes that come from host memory to where the model computes: pinned ones to a GPU."""

    copy: float
    to_device: float


def measure_paces(device: torch.device) -> Paces:
    """Medians of 9 copies, of more bytes than caches hold."""
    nbytes = _NBYTES[device.type]
    within = nbytes / _copy_s(torch.ones(nbytes, dtype=torch.uint8, device=device), device)
    if device.type == "cpu":
        return Paces(2 * within, within)
    host = torch.ones(nbytes // 4, dtype=torch.uint8).pin_memory()
    to_device = host.nbytes / _copy_s(host, device)
    torch.cuda.empty_cache()  # the server needs it
    return Paces(2 * within, to_device)


def measure_disk(files: Iterable[Path]) -> float:
    """Bytes a second of plain reads of ``files``, one after the other, none of them in the page cache."""
    paths = list(files)
    drop_pages(paths)
    begin_s, nbytes = time.perf_counter(), 0
    for path in paths:
        room = new_buffer(path.stat().st_size)
        with path.open("rb", buffering=0) as file:
            nbytes += file.readinto(room) or 0
    return nbytes / (time.perf_counter() - begin_s)


def drop_pages(files: Iterable[Path]) -> None:
    """Has the system forget what it keeps of ``files`` in memory, as far as it takes the advice."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # only what is on the disk can be forgotten
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def num_step_weights(folder: Path) -> int:
    """Weights that a step over text reads, once each: those of the language model's layers and of its head, by the
    names in the headers of the folder's safetensors."""
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    read = [shape for name, shape in shapes.items() if not any(part in name for part in _NOT_IN_A_STEP)]
    if not any("lm_head" in name for name in shapes):  # tied: the embeddings are the head
        read += [shape for name, shape in shapes.items() if name.endswith(".embed_tokens.weight")]
    return sum(prod(shape) for shape in read)


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Its name and the versions that matter, for the result."""
    if device.type == "cpu":
        return {"gpu": None, "torch_threads": torch.get_num_threads()}
    return {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}


def _copy_s(source: Tensor, device: torch.device) -> float:
    target = torch.empty_like(source, device=device)
    times = []
    for _ in range(_REPEATS + 1):
        _synchronize(device)
        begin_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        _synchronize(device)
        times.append(time.perf_counter() - begin_s)
    return median(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
