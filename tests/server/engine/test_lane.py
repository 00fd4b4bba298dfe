"""Streams beside an upload on a GPU, in simulated time: the real policy and the real lane, asked one step ahead."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from server.engine import lane
from server.engine.lane import Lane
from server.engine.question import Phase
from server.engine.scheduler import Scheduler


class Gpu:
    """Does what it is asked for in order, while the host goes on."""

    def __init__(self) -> None:
        self.now_s = self.free_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def ask(self, took_s: float, host_s: float) -> None:
        self.now_s += host_s
        self.free_s = max(self.free_s, self.now_s) + took_s

    def event(self, *, enable_timing: bool = True) -> Event:
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._at_s = 0.0

    def record(self, stream: object) -> None:
        self._at_s = max(self._gpu.free_s, self._gpu.now_s)

    def query(self) -> bool:
        return self._gpu.now_s >= self._at_s

    def synchronize(self) -> None:
        self._gpu.now_s = max(self._gpu.now_s, self._at_s)

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end._at_s - self._at_s)


class Upload:
    """Chunks without end; of each slice, what it takes on the GPU and on the host."""

    def __init__(self, gpu: Gpu, slices_s: list[tuple[float, float]]) -> None:
        self._gpu, self._slices_s = gpu, slices_s
        self._left: list[tuple[float, float]] = []
        self.ended, self.has_slice, self.spent_s = False, True, 0.0

    @property
    def within_chunk(self) -> bool:
        return bool(self._left)

    def step(self) -> bool:
        self._left = self._left or self._slices_s[::-1]
        took_s, host_s = self._left.pop()
        self._gpu.ask(took_s, host_s)
        self.spent_s += took_s
        return not self._left


class Stream:
    id, phase, num_prompt_tokens = "stream", Phase.DECODE, 20


LAYERS_S = [(0.0013, 0.001), (0.0006, 0.0006)] * 28
SLICES_S = [(0.003, 0.002)] * 6 + LAYERS_S + [(0.003, 0.004)]
"""A chunk at 7B: vision tower, layers, what becomes of it. Telling a GPU takes about as long as it takes."""
HELD_UP_S = [(0.0003, 0.004)] + [(0.0009, 0.003)] * 12 + LAYERS_S
"""The same in more slices, when other threads of the interpreter are in the way of telling."""
STEP_S, ASK_S, TELL_S = 0.006, 0.0008, 0.0004


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Lane, "_mark", lambda self: recorded(gpu))
    monkeypatch.setattr(lane, "time", gpu)
    return gpu


def recorded(gpu: Gpu) -> Event:
    event = Event(gpu)
    event.record(None)
    return event


@pytest.mark.parametrize("slices_s", [SLICES_S, HELD_UP_S])
@pytest.mark.parametrize("share", [0.2, 0.4])
def test_streams_go_on_evenly_and_the_upload_gets_its_share(
    gpu: Gpu, share: float, slices_s: list[tuple[float, float]]
) -> None:
    slices, policy = Lane(torch.device("cpu"), lambda took_s: None), Scheduler(max_batch=4, prefill_share=share)
    upload: Any = Upload(gpu, slices_s)
    policy.add_ingest(upload)
    policy.add(Stream())  # type: ignore[arg-type]
    told_s: list[float] = []
    last, lap_s = None, 0.0
    for _ in range(2000):
        plan = policy.plan()
        gpu.ask(STEP_S, ASK_S)
        following = recorded(gpu)
        if last is not None:
            last.synchronize()
            told_s.append(gpu.now_s)
        last = following
        gpu.now_s += TELL_S
        before_s, lap_s = lap_s, gpu.now_s
        prefill_s = slices.collect()
        policy.account(plan, max(0.0, lap_s - before_s - prefill_s), prefill_s)
        ingest, room = policy.prefill(plan)
        if ingest:
            slices.run(ingest, room)
    gaps_s = sorted(end - begin for begin, end in pairwise(told_s[100:]))
    even_s, longest_s = STEP_S / (1 - share), max(took_s for took_s, _ in slices_s)
    assert gaps_s[len(gaps_s) // 2] < 1.05 * even_s
    assert gaps_s[int(0.99 * len(gaps_s))] < max(1.1 * even_s, 1.01 * (STEP_S + longest_s))
    assert upload.spent_s / gpu.now_s > 0.65 * share


def test_alone_an_upload_keeps_the_gpu_busy_without_piling_up(gpu: Gpu) -> None:
    slices = Lane(torch.device("cpu"), lambda took_s: None)
    upload: Any = Upload(gpu, [(took_s, took_s / 4) for took_s, _ in SLICES_S])
    most_s = 0.0
    for _ in range(500):
        slices.run(upload, None)
        most_s = max(most_s, gpu.free_s - gpu.now_s)
    assert upload.spent_s > 0.98 * gpu.free_s
    assert most_s <= 2 * max(took_s for took_s, _ in SLICES_S), "a question that comes now waits no longer"
