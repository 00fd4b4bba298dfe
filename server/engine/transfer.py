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

Unread = TypeVar("Unread")

BLOB_NBYTES = 64 << 20
"""The largest blob that is read straight into pinned memory: a chunk's L-KV at 7B takes 28 to 42 MB."""
PIECE_NBYTES = 4 << 20
"""What lies elsewhere goes through pinned memory in pieces of this size, one filled while the other is copied."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """An L-KV on the device, or on its way there. ``nbytes`` of keys, values and positions were read for it."""

    kv: ChunkKV | RotatedKV
    nbytes: int
    ready: torch.cuda.Event | None = None

    def take(self) -> ChunkKV | RotatedKV:
        """The L-KV, for the calling thread's stream; on a GPU that waits for it, while the thread goes on."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.kv.keys.device)
            stream.wait_event(self.ready)
            positions = self.kv.positions if isinstance(self.kv, ChunkKV) else None
            for tensor in (self.kv.keys, self.kv.values, positions):
                if tensor is not None:
                    tensor.record_stream(stream)  # its memory must outlive what that stream does with it
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
                self._staging.put(Staging(BLOB_NBYTES, PIECE_NBYTES, pinned=True))

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
        with self._borrowed() as staging:
            kv = read(staging.new_buffer)
            if not isinstance(kv, ChunkKV):
                return kv
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                prepared = prepare(staging.move(kv, self._device))
                return Arrival(prepared, kv.nbytes, self._stream.record_event())

    @contextmanager
    def _borrowed(self) -> Iterator[Staging]:
        staging = self._staging.get()
        try:
            yield staging
        finally:
            self._staging.put(staging)


class Staging:
    """Pinned memory through which one thread at a time has a GPU copy: room for one blob, and for two pieces of what
    lies elsewhere. Nothing in it is changed before it has been copied."""

    def __init__(self, blob_nbytes: int, piece_nbytes: int, *, pinned: bool) -> None:
        self._blob = torch.empty(blob_nbytes, dtype=torch.uint8, pin_memory=pinned)
        self._pieces = [torch.empty(piece_nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._left: dict[int, torch.cuda.Event] = {}
        """Behind the last copy out of each: by 0 and 1 of the pieces, by 2 of the blob."""

    def new_buffer(self, nbytes: int) -> memoryview:
        """The room for a blob, in the place of the last one; ordinary memory if that is too small."""
        if nbytes > len(self._blob):
            return new_buffer(nbytes)
        self._wait(2)
        return self._blob.numpy()[:nbytes].data

    def move(self, kv: ChunkKV, device: torch.device) -> ChunkKV:
        """``kv`` on ``device``, copied there by the current stream; the thread waits for its own memory at most."""
        positions = None if kv.positions is None else self._moved(kv.positions, device)
        keys, values = self._moved(kv.keys, device), self._moved(kv.values, device)
        return replace(kv, keys=keys, values=values, positions=positions)

    def _moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        there = torch.empty_like(tensor, device=device)
        begin = self._blob.data_ptr()
        if begin <= tensor.data_ptr() < begin + len(self._blob):
            there.copy_(tensor, non_blocking=True)
            self._note(2, device)
            return there
        source, target = (flat.reshape(-1).view(torch.uint8) for flat in (tensor, there))
        size = len(self._pieces[0])
        for number, start in enumerate(range(0, len(source), size)):
            self._wait(number % 2)
            piece = self._pieces[number % 2][: len(source) - start]
            # As torch would copy it, but on this thread alone, of which there are several.
            np.copyto(piece.numpy(), source[start : start + size].numpy())
            target[start : start + size].copy_(piece, non_blocking=True)
            self._note(number % 2, device)
        return there

    def _note(self, place: int, device: torch.device) -> None:
        if device.type == "cuda":
            self._left[place] = torch.cuda.current_stream(device).record_event()

    def _wait(self, place: int) -> None:
        event = self._left.pop(place, None)
        if event is not None:
            event.synchronize()
