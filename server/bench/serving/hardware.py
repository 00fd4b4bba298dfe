"""The pace of what a server runs on: what floors are computed from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvstore.base import new_buffer

_REPEATS = 9
_COPY_NBYTES = {"cuda": 1 << 31, "cpu": 1 << 28}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Paces:
    """As measured here: ``copy``, bytes a second read and written by a plain copy within the device's memory;
    ``to_device``, bytes a second from host memory to where the model computes (pinned ones to a GPU); ``matmul``,
    operations a second of a product of large square matrices in the model's dtype."""

    copy: float
    to_device: float
    matmul: float


def measure_paces(device: torch.device, dtype: torch.dtype) -> Paces:
    """The best of 9."""
    copy = measure_copy(device)
    size = _MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    matmul = 2 * size**3 / least_s(lambda: left @ right, device)
    if device.type == "cpu":
        return Paces(copy, copy / 2, matmul)
    host = torch.ones(_COPY_NBYTES[device.type] // 4, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(host, device=device)
    return Paces(copy, host.nbytes / least_s(lambda: target.copy_(host, non_blocking=True), device), matmul)


def measure_copy(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes read and written a second by a copy of ``nbytes``, by default more than caches hold."""
    source = torch.ones(nbytes or _COPY_NBYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / least_s(lambda: target.copy_(source), device)


def least_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``work`` until the device has done it, at its best: others' work may slow it, nothing makes it faster.
    The first time is to warm up."""
    times = []
    for _ in range(_REPEATS + 1):
        synchronize(device)
        begin_s = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - begin_s)
    return min(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_disk(files: Iterable[Path]) -> float:
    """Bytes a second of plain reads of ``files``, one after the other, none of them in the page cache."""
    paths = list(files)
    drop_pages(paths)
    begin_s, nbytes = time.perf_counter(), 0
    for path in paths:
        room = memoryview(new_buffer(path.stat().st_size))
        with path.open("rb", buffering=0) as file:
            while len(room) and (count := file.readinto(room)):  # one read stops at 2 GiB
                nbytes += count
                room = room[count:]
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


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Its name and the versions that matter, for the result."""
    if device.type == "cpu":
        return {"gpu": None, "torch_threads": torch.get_num_threads()}
    return {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
