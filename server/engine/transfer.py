"""From the store's memory to the device's: beside what the engine computes, and without a wait on its thread."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from compression.kv import ChunkKV
from compression.segments import RotatedKV
from kvstore.base import NewBuffer, new_buffer
from server.models.device import await_on_device

Unread = TypeVar("Unread")

STAGING_NBYTES = 64 << 20
"""Pinned for each thread that reads: room for a chunk's L-KV, which takes 28 to 42 MB at 7B."""
_ALIGNED = 64
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """An L-KV on the device, or on its way there. ``nbytes`` of keys, values and positions were read for it."""

    kv: ChunkKV | RotatedKV
    nbytes: int
    ready: torch.cuda.Event | None = None

    def take(self) -> ChunkKV | RotatedKV:
        """The L-KV, for the calling thread's stream; on a GPU that waits for it, while the thread goes on."""
        positions = self.kv.positions if isinstance(self.kv, ChunkKV) else None
        await_on_device(self.ready, self.kv.keys, self.kv.values, *([] if positions is None else [positions]))
        return self.kv


class Transfer:
    """Takes what is read from a store to ``device``. Where that is a GPU it has pinned memory for as many threads as
    read at a time, and one stream of its own; elsewhere there is nothing to copy. For any number of threads."""

    def __init__(self, device: torch.device, num_threads: int) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._staging: queue.SimpleQueue[Staging] = queue.SimpleQueue()
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(num_threads):
                self._staging.put(Staging(STAGING_NBYTES, pinned=True))

    def bring(
        self,
        read: Callable[[NewBuffer], ChunkKV | Unread],
        prepare: Callable[[ChunkKV], ChunkKV | RotatedKV],
    ) -> Arrival | Unread:
        """On a reading thread: has ``read`` read an L-KV to the CPU, into memory that it is given or elsewhere, and
        ``prepare`` make of it, on the device, what caches see. What else ``read`` returns is returned."""
        if self._stream is None:
            kv = read(new_buffer)
            return Arrival(prepare(kv), kv.nbytes) if isinstance(kv, ChunkKV) else kv
        with self._borrowed(self._stream) as staging:
            kv = read(staging.new_buffer)
            if not isinstance(kv, ChunkKV):
                return kv
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                prepared = prepare(staging.move(kv, self._device))
                return Arrival(prepared, kv.nbytes, self._stream.record_event())

    @contextmanager
    def _borrowed(self, stream: torch.cuda.Stream) -> Iterator[Staging]:
        staging = self._staging.get()
        try:
            staging.clear()
            yield staging
        finally:
            staging.copied = stream.record_event()
            self._staging.put(staging)


class Staging:
    """Pinned memory from which a GPU copies by itself; one thread at a time uses it."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self._used = 0
        self._sources: list[Tensor] = []
        """What is being copied, wherever it lies, is referred to here until it has been."""
        self.copied: torch.cuda.Event | None = None
        """Behind the last copy."""

    def clear(self) -> None:
        """Makes all of it free, once it has been copied."""
        if self.copied is not None:
            self.copied.synchronize()
        self._sources.clear()
        self._used = 0

    def new_buffer(self, nbytes: int) -> memoryview:
        """A part of it; ordinary memory where it has not enough left."""
        room = self._take(nbytes)
        return new_buffer(nbytes) if room is None else room.numpy().data

    def move(self, kv: ChunkKV, device: torch.device) -> ChunkKV:
        """``kv`` on ``device``, copied by the current stream; nobody waits for that if there is room here, or ``kv``
        lies here already, or in other pinned memory."""
        positions = None if kv.positions is None else self._moved(kv.positions, device)
        keys, values = self._moved(kv.keys, device), self._moved(kv.values, device)
        return replace(kv, keys=keys, values=values, positions=positions)

    def _moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        if not tensor.is_pinned():
            room = self._take(tensor.nbytes)
            if room is None:
                return tensor.to(device, copy=True)
            # As torch would copy it, but on this thread alone: others read beside it.
            np.copyto(room.numpy(), tensor.reshape(-1).view(torch.uint8).numpy())
            tensor = room.view(tensor.dtype).view(tensor.shape)
        self._sources.append(tensor)
        return tensor.to(device, copy=True, non_blocking=True)

    def _take(self, nbytes: int) -> Tensor | None:
        """uint8 [nbytes]"""
        begin, end = self._used, self._used + nbytes
        if end > len(self._memory):
            return None
        self._used = -(-end // _ALIGNED) * _ALIGNED  # past the end, if need be: then even nothing has no room
        return self._memory[begin:end]
