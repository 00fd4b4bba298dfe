from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine import lane
from server.engine.lane import Lane
from server.engine.question import Phase
from server.engine.scheduler import Scheduler


@dataclass(eq=False)
class Item:
    """What the policy sees of a question or of an upload."""

    id: str = ""
    phase: Phase = Phase.QUEUED
    has_slice: bool = True
    within_chunk: bool = False
    ended: bool = False
    num_prompt_tokens: int = 20


class Clock:
    """Simulated time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@dataclass(eq=False)
class Upload:
    """Chunks without end, each of slices that take ``slices_s``."""

    clock: Clock
    slices_s: list[float]
    ended: bool = False
    has_slice: bool = True
    spent_s: float = 0.0
    num_chunks: int = 0
    log: list[Upload] = field(default_factory=list)
    _left: Iterator[float] | None = None
    _num_left: int = 0

    @property
    def within_chunk(self) -> bool:
        return self._num_left > 0

    def step(self) -> bool:
        if not self._num_left:
            self._left, self._num_left = iter(self.slices_s), len(self.slices_s)
            self.log.append(self)
        took_s = next(self._left)
        self.clock.now_s += took_s
        self.spent_s += took_s
        self._num_left -= 1
        self.num_chunks += not self._num_left
        return not self._num_left


class Simulation:
    """The engine's loop over the real policy and the real lane, on the CPU and in simulated time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, share: float, *uploads_s: list[float]) -> None:
        self.clock = Clock()
        monkeypatch.setattr(lane, "time", self.clock)
        self.chunks_s: list[float] = []
        self.lane = Lane(torch.device("cpu"), self.chunks_s.append)
        self.log: list[Upload] = []
        self.uploads = [Upload(self.clock, slices_s, log=self.log) for slices_s in uploads_s]
        self.policy: Any = scheduler(prefill_share=share, ingests=tuple(self.uploads))
        self.questions_s = 0.0
        self.gaps_s: list[float] = []
        """What slices took in every step."""

    @property
    def prefill_s(self) -> float:
        return sum(upload.spent_s for upload in self.uploads)

    def step(self, questions_s: float) -> None:
        plan = self.policy.plan()
        if plan:
            self.clock.now_s += questions_s
            self.questions_s += questions_s
        self.policy.account(plan, questions_s if plan else 0.0, self.lane.collect())
        ingest, room = self.policy.prefill(plan)
        before_s = self.prefill_s
        if ingest:
            self.lane.run(ingest, room)
        self.gaps_s.append(self.prefill_s - before_s)


def scheduler(
    *items: Item,
    max_batch: int = 4,
    prefill_share: float = 0.5,
    prompt_tokens: int = 0,
    ingests: tuple[Item, ...] = (),
) -> Any:
    made: Any = Scheduler(max_batch=max_batch, prefill_share=prefill_share, prompt_tokens=prompt_tokens)
    for item in items:
        made.add(item)
    for ingest in ingests:
        made.add_ingest(ingest)
    return made


def test_slots_go_in_order_of_arrival_and_are_bounded() -> None:
    first, waiting, second, third = Item("a"), Item("b", Phase.WAITING), Item("c"), Item("d")
    policy = scheduler(first, waiting, second, third, max_batch=2)
    for expected in (first, second):
        assert policy.next_for_slot() is expected
        expected.phase = Phase.LOADING
    assert policy.next_for_slot() is None
    first.phase = Phase.ENDED
    policy.remove(first)
    assert policy.next_for_slot() is third


def test_prompts_and_decodes_share_a_step_and_one_question_is_scored() -> None:
    a, b, c = rows = [Item("a", Phase.DECODE), Item("b", Phase.PREFILL), Item("c", Phase.DECODE)]
    scored = [Item("d", Phase.SCORE), Item("e", Phase.SCORE)]
    plan = scheduler(*rows, *scored, Item("f", Phase.RELOADING), max_batch=8).plan()
    assert plan.prompts == [b] and plan.decoding == [a, c]
    assert plan.scored == scored[:1]


@pytest.mark.parametrize(
    ("sizes", "num_together"),
    [((16, 13, 24, 8), 4), ((16, 13, 24, 9), 3), ((17, 17, 17, 1), 2), ((64, 1), 1), ((65, 1), 1), ((20, 41, 1), 1)],
)
@pytest.mark.parametrize("phase", [Phase.SCORE, Phase.PREFILL])
def test_questions_are_scored_and_prompts_read_together_up_to_a_number_of_tokens(
    phase: Phase, sizes: tuple[int, ...], num_together: int
) -> None:
    waiting = [Item(str(place), phase, num_prompt_tokens=size) for place, size in enumerate(sizes)]
    plan = scheduler(*waiting, prompt_tokens=64).plan()
    assert (plan.scored, plan.prompts)[phase is Phase.PREFILL] == waiting[:num_together]


def test_a_postponed_question_lets_the_others_go_first() -> None:
    first, second = Item("a", Phase.SCORE), Item("b", Phase.SCORE)
    policy = scheduler(first, second)
    for expected in (first, second, first):
        assert policy.plan().scored == [expected]
        policy.postpone(expected)


def test_uploads_take_turns() -> None:
    a, b, stalled, ended = Item("a"), Item("b"), Item("c", has_slice=False), Item("d", has_slice=False, ended=True)
    policy = scheduler(ingests=(a, ended, stalled, b))
    assert [policy.prefill(policy.plan())[0] for _ in range(4)] == [a, b, a, b]


def test_an_upload_that_has_ended_is_still_let_go_of() -> None:
    """It may hold memory of the device until it gets another step."""
    ended = Item("a", ended=True)
    policy = scheduler(ingests=(ended,))
    assert policy.prefill(policy.plan())[0] is ended
    ended.has_slice = False
    assert policy.prefill(policy.plan())[0] is None
    ended.has_slice = True
    assert policy.prefill(policy.plan())[0] is None, "it is forgotten"


def test_a_chunk_is_not_interrupted_by_another_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, 0.4, [0.01] * 5, [0.02] * 3)
    a, b = simulation.uploads
    for _ in range(80):
        simulation.step(0.0)
        assert not (a.within_chunk and b.within_chunk)
    assert simulation.log == [a, b] * 10
    assert simulation.chunks_s[:3] == pytest.approx([0.05, 0.06, 0.05]), "the metric's seconds are those of one chunk"


def test_an_upload_alone_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, 0.25, [0.5, 0.01, 0.2])
    for _ in range(30):
        simulation.step(0.0)
    assert simulation.uploads[0].num_chunks == 10
    assert simulation.clock.now_s == pytest.approx(simulation.prefill_s)
    assert max(simulation.gaps_s) == 0.5, "one slice a step: whoever comes in waits for no more"


def test_a_question_that_comes_during_an_upload_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, 0.5, [1.0] * 3)
    simulation.step(0.0)
    simulation.policy.add(Item("b", Phase.SCORE))
    for _ in range(9):
        simulation.step(0.1)
    assert simulation.prefill_s == 1.0


durations_s = st.floats(0.0005, 0.2)
shares = st.floats(0.1, 0.8)


@given(
    share=shares,
    uploads_s=st.lists(st.lists(durations_s, min_size=1, max_size=12), min_size=1, max_size=3),
    step_s=durations_s,
)
def test_everybody_gets_on_and_nobody_waits_for_long(share: float, uploads_s: list[list[float]], step_s: float) -> None:
    longest_s = max(max(upload_s) for upload_s in uploads_s)
    earned_s = step_s * share / (1 - share)
    with pytest.MonkeyPatch.context() as monkeypatch:
        simulation = Simulation(monkeypatch, share, *uploads_s)
        simulation.policy.add(Item("a", Phase.DECODE))
        for _ in range(400):
            simulation.step(step_s)
    assert max(simulation.gaps_s) <= max(longest_s, earned_s) + 1e-9
    # Uploads never get more than their share, but for the slice that was begun last.
    assert simulation.prefill_s <= 400 * earned_s + longest_s + 1e-9
    # And half of it at least: a step's room holds a slice that is longer than half of it only once. The first chunks
    # run slice by slice, because nobody knows yet how long one takes.
    first_s = sum(min(slice_s, earned_s) for upload_s in uploads_s for slice_s in upload_s)
    num_first = sum(len(upload_s) for upload_s in uploads_s)
    ends = len(simulation.log)  # the last step of a chunk may have room left
    assert simulation.prefill_s >= (400 - num_first - ends) * earned_s / 2 + first_s - longest_s - 1e-9


@given(share=shares, slice_s=st.floats(0.01, 0.2), factor=st.floats(1.0, 50.0))
def test_slices_longer_than_a_steps_room_get_the_whole_share(share: float, slice_s: float, factor: float) -> None:
    step_s = slice_s / factor * (1 - share) / share
    with pytest.MonkeyPatch.context() as monkeypatch:
        simulation = Simulation(monkeypatch, share, [slice_s] * 7)
        simulation.policy.add(Item("a", Phase.DECODE))
        num_steps = int(30 * factor) + 1
        for _ in range(num_steps):
            simulation.step(step_s)
    assert simulation.prefill_s == pytest.approx(num_steps * slice_s / factor, abs=2 * slice_s)


@given(steps_s=st.lists(st.tuples(st.booleans(), durations_s), max_size=60), slices_s=st.lists(durations_s, min_size=1))
def test_what_could_not_be_spent_is_not_saved(steps_s: list[tuple[bool, float]], slices_s: list[float]) -> None:
    """After any past, a step's slices take no longer than what that step alone has earned, or one of them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        simulation = Simulation(monkeypatch, 0.5, slices_s)
        (upload,) = simulation.uploads
        question = Item("a", Phase.DECODE)
        simulation.policy.add(question)
        for upload.has_slice, step_s in steps_s:
            question.phase = Phase.DECODE if int(step_s * 1e6) % 3 else Phase.RELOADING
            simulation.step(step_s)
            assert simulation.gaps_s[-1] <= max(*slices_s, step_s, 0.0) + 1e-9


@pytest.mark.parametrize(("max_batch", "share"), [(0, 0.5), (1, 0.0), (1, 1.0)])
def test_bad_options(max_batch: int, share: float) -> None:
    with pytest.raises(ValueError):
        Scheduler(max_batch=max_batch, prefill_share=share)
