"""Where the slices of prefills run, and how long they take there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from server.engine.ingest import Ingest

_IN_FLIGHT = 2
"""Slices that a GPU has before it at most: one to run, and one so that it need not wait for the next."""
_Mark = torch.cuda.Event | float


@dataclass(frozen=True, slots=True)
class _Slice:
    begin: _Mark
    end: _Mark
    computed: bool
    """It was the last of a chunk that has been computed."""
    at_end: bool
    """Nothing of the same chunk follows."""


class Lane:
    """Runs slices; on a GPU it only asks for them, on the stream on which everything runs, and learns later when they
    were done. Whatever questions ask for next stands behind them there: so a step's slices must not be long, but nobody
    has to wait for their KVs, and the GPU works while this thread prepares the next step.
    """

    def __init__(self, device: torch.device, on_chunk: Callable[[float], None]) -> None:
        """``on_chunk`` gets the seconds that every computed chunk took, all its slices together."""
        self._on_gpu = device.type == "cuda"
        self._on_chunk = on_chunk
        self._pending: deque[_Slice] = deque()
        self._chunk_s = 0.0
        self._took_s = 0.0
        self._num_taken = 0

    def run(self, ingest: Ingest, num_slices: int) -> None:
        """At most so many, and of one chunk only. Waits until there are few enough before them."""
        for _ in range(num_slices):
            while len(self._pending) >= max(_IN_FLIGHT, num_slices):
                self._take(wait=True)
            begin = self._mark()
            computed = ingest.step()
            self._pending.append(_Slice(begin, self._mark(), computed, not ingest.within_chunk))
            if not ingest.within_chunk:
                break

    def collect(self) -> tuple[float, int]:
        """The seconds of those that have ended since the last call, and their number. Does not wait."""
        while self._pending and self._take(wait=False):
            pass
        found = self._took_s, self._num_taken
        self._took_s, self._num_taken = 0.0, 0
        return found

    def _take(self, *, wait: bool) -> bool:
        """Takes the first of those pending, if it has ended."""
        first = self._pending[0]
        if isinstance(first.begin, torch.cuda.Event) and isinstance(first.end, torch.cuda.Event):
            if wait:
                first.end.synchronize()
            elif not first.end.query():
                return False
            took_s = first.begin.elapsed_time(first.end) / 1000
        else:
            assert isinstance(first.begin, float) and isinstance(first.end, float)
            took_s = first.end - first.begin
        self._pending.popleft()
        self._took_s += took_s
        self._num_taken += 1
        self._chunk_s += took_s
        if first.computed:
            self._on_chunk(self._chunk_s)
        if first.at_end:
            self._chunk_s = 0.0
        return True

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
