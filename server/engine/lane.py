"""Where the slices of prefills run, and how long they take there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from server.engine.ingest import Ingest

_IN_FLIGHT = 2
"""Slices that a GPU has before it at most: one to run, and one so that it need not wait for the next."""
_Mark = torch.cuda.Event | float


@dataclass(slots=True)
class _Chunk:
    """One chunk's slices: how many were run, and the seconds of those that are known to have ended."""

    num_run: int = 0
    times_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Slice:
    ingest: Ingest
    chunk: _Chunk
    begin: _Mark
    end: _Mark
    computed: bool
    """It was the last of a chunk that has been computed."""


class Lane:
    """Runs slices; on a GPU it only asks for them, on the stream on which everything runs, and learns later when they
    were done. Whatever questions ask for next stands behind them there: so a step's slices must not be long, but nobody
    has to wait for their KVs, and the GPU works while this thread prepares the next step.
    """

    def __init__(self, device: torch.device, on_chunk: Callable[[float], None]) -> None:
        """``on_chunk`` gets the seconds that every computed chunk took, all its slices together."""
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._on_chunk = on_chunk
        self._pending: deque[_Slice] = deque()
        self._took_s = 0.0
        self._chunk = _Chunk()
        self._last: WeakKeyDictionary[Ingest, list[float]] = WeakKeyDictionary()
        """The times of the last chunk that was computed: those of the next one's slices will be about the same."""

    def run(self, ingest: Ingest, room_s: float) -> None:
        """One slice, and as many more of the same chunk as are expected to end within ``room_s`` with it; none where
        nobody waits for the end of the step. Then a GPU is not asked for more than it needs."""
        while not room_s and len(self._pending) >= _IN_FLIGHT:
            self._take(wait=True)
        expected_s = self._expected_s(ingest)
        self._run(ingest)
        while ingest.within_chunk and (expected_s := expected_s + self._expected_s(ingest)) <= room_s:
            self._run(ingest)

    def collect(self) -> float:
        """The seconds of the slices that have ended since the last call. Does not wait."""
        self._take_ended()
        took_s, self._took_s = self._took_s, 0.0
        return took_s

    def _expected_s(self, ingest: Ingest) -> float:
        """Of the next slice: what the same one of the chunk before took; a first chunk's may take any time."""
        last = self._last.get(ingest, [])
        place = self._chunk.num_run
        return last[place] if place < len(last) else max(last, default=float("inf"))

    def _run(self, ingest: Ingest) -> None:
        chunk = self._chunk
        begin = self._mark()
        computed = ingest.step()
        self._pending.append(_Slice(ingest, chunk, begin, self._mark(), computed))
        chunk.num_run += 1
        if not ingest.within_chunk:
            self._chunk = _Chunk()
        self._take_ended()

    def _take_ended(self) -> None:
        while self._pending and self._take(wait=False):
            pass

    def _take(self, *, wait: bool) -> bool:
        """Takes the first of those pending, if it has ended."""
        first = self._pending[0]
        if isinstance(first.begin, torch.cuda.Event) and isinstance(first.end, torch.cuda.Event):
            if wait:
                first.end.synchronize()
            elif not first.end.query():  # type: ignore[no-untyped-call]
                return False
            took_s = first.begin.elapsed_time(first.end) / 1000
        else:
            assert isinstance(first.begin, float) and isinstance(first.end, float)
            took_s = first.end - first.begin
        self._pending.popleft()
        self._took_s += took_s
        first.chunk.times_s.append(took_s)
        if first.computed:
            self._last[first.ingest] = first.chunk.times_s
            self._on_chunk(sum(first.chunk.times_s))
        return True

    def _mark(self) -> _Mark:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event
