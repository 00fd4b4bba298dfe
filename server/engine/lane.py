"""Where the slices of prefills run, and how long they take there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from server.engine.ingest import Ingest
from server.engine.scheduler import Room

_IN_FLIGHT = 2
"""Slices that a GPU has before it at most: one to run, and one so that it need not wait for the next."""
_Mark = torch.cuda.Event | float


@dataclass(slots=True)
class _Chunk:
    """One chunk's slices: the seconds that it took to ask for each, and on the device those that are known to have
    ended."""

    hosts_s: list[float] = field(default_factory=list)
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
        self._last: WeakKeyDictionary[Ingest, _Chunk] = WeakKeyDictionary()
        """The last chunk that was computed: the next one's slices will take about the same."""

    def run(self, ingest: Ingest, room: Room | None) -> None:
        """One slice, and as many more of the same chunk as are expected to have ``room`` with it; none more without,
        where nobody waits for the end of the step. Then a GPU is not asked for more than it needs."""
        while room is None and len(self._pending) >= _IN_FLIGHT:
            self._take(wait=True)
        begin_s = time.perf_counter()
        expected_s, _ = self._expected_s(ingest)
        self._run(ingest)
        while room is not None and ingest.within_chunk:
            more_s, host_s = self._expected_s(ingest)
            expected_s += more_s
            if expected_s > room.device_s or time.perf_counter() - begin_s + host_s > room.host_s:
                break
            self._run(ingest)

    def collect(self) -> float:
        """The seconds of the slices that have ended since the last call. Does not wait."""
        self._take_ended()
        took_s, self._took_s = self._took_s, 0.0
        return took_s

    def _expected_s(self, ingest: Ingest) -> tuple[float, float]:
        """Of the next slice, on the device and on this thread: what the same one of the chunk before took; a first
        chunk's may take any time."""
        last, place = self._last.get(ingest, _Chunk()), len(self._chunk.hosts_s)
        if place < len(last.times_s):
            return last.times_s[place], last.hosts_s[place]
        return max(last.times_s, default=float("inf")), max(last.hosts_s, default=float("inf"))

    def _run(self, ingest: Ingest) -> None:
        chunk = self._chunk
        begin, begin_s = self._mark(), time.perf_counter()
        computed = ingest.step()
        chunk.hosts_s.append(time.perf_counter() - begin_s)
        self._pending.append(_Slice(ingest, chunk, begin, self._mark(), computed))
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
            self._last[first.ingest] = first.chunk
            self._on_chunk(sum(first.chunk.times_s))
        return True

    def _mark(self) -> _Mark:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event
