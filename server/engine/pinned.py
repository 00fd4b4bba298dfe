"""Pinned memory for what a store keeps in host memory: a GPU copies it from where it lies."""

from __future__ import annotations

import logging
import threading
import weakref
from bisect import insort
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.base import NewBuffer, new_buffer

_log = logging.getLogger(__name__)

_PIECE_NBYTES = (1 << 26, 1 << 32)
"""Least and most. Torch rounds up to powers of two, so that pieces are such; no part lies in two."""
_BEING_READ_NBYTES = 1 << 28
"""Beside what a store keeps: for what is read before another goes for it, and what has gone and is still copied."""
_ALIGNED = 64
"""Bytes."""


def kept_buffers(device: torch.device, kept_nbytes: int) -> NewBuffer:
    """Makes buffers for a store that keeps up to ``kept_nbytes`` in memory; where ``device`` is a GPU they are pinned.
    That is done now, for all of them: a gigabyte may take a second, in which all of the GPU's work may have to wait."""
    if device.type != "cuda":
        return new_buffer
    return PinnedMemory(kept_nbytes + min(kept_nbytes, _BEING_READ_NBYTES), pinned=True).new_buffer


class PinnedMemory:
    """Lends parts of ``nbytes``, or of less if not so many can be pinned, to any number of threads.

    A part comes back when no buffer, array or tensor refers to it any more. What a GPU has yet to copy out of it does
    not refer to it: whoever asks for that holds the tensor until it is done.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        least, most = _PIECE_NBYTES
        self._pieces: list[_Piece] = []
        try:
            while nbytes >= least:
                size = min(most, 1 << (nbytes.bit_length() - 1))
                self._pieces.append(_Piece(torch.empty(size, dtype=torch.uint8, pin_memory=pinned).numpy()))
                nbytes -= size
        except RuntimeError as error:
            _log.warning("%d bytes of the store's cache cannot be pinned and are slower to re-load: %s", nbytes, error)
        self._lock = threading.Lock()
        self._returned: deque[tuple[_Piece, int, int]] = deque()
        """A part may go at any time on any thread, also on one that is in :meth:`new_buffer`: no lock is taken then."""

    def new_buffer(self, nbytes: int) -> memoryview:
        """A part of it; ordinary memory where none is as long."""
        with self._lock:
            while self._returned:
                piece, begin, end = self._returned.popleft()
                piece.put(begin, end)
            for piece in self._pieces:
                taken = piece.take(max(1, nbytes))
                if taken is not None:
                    part = piece.memory[taken[0] :][:nbytes]
                    weakref.finalize(part, self._returned.append, (piece, *taken)).atexit = False
                    return part.data
        return new_buffer(nbytes)


class _Piece:
    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory = memory
        self._free = [(0, len(memory))]
        """Ranges, in order; no two touch."""

    def take(self, nbytes: int) -> tuple[int, int] | None:
        """The first range that is long enough, rounded up."""
        nbytes = -(-nbytes // _ALIGNED) * _ALIGNED
        for index, (begin, end) in enumerate(self._free):
            middle = begin + nbytes
            if middle <= end:
                self._free[index : index + 1] = [(middle, end)] if middle < end else []
                return begin, middle
        return None

    def put(self, begin: int, end: int) -> None:
        """Makes a range free again."""
        for first, last in [free for free in self._free if free[1] == begin or free[0] == end]:
            self._free.remove((first, last))
            begin, end = min(begin, first), max(end, last)
        insort(self._free, (begin, end))
