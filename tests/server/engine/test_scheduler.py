from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from server.engine.question import Phase
from server.engine.scheduler import Scheduler


@dataclass(eq=False)
class Item:
    """What the policy sees of a question or of an upload."""

    id: str = ""
    phase: Phase = Phase.QUEUED
    has_chunk: bool = True
    ended: bool = False


def scheduler(*items: Item, max_batch: int = 4, prefill_share: float = 0.5, ingests: tuple[Item, ...] = ()) -> Any:
    made: Any = Scheduler(max_batch=max_batch, prefill_share=prefill_share)
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


def test_prompts_and_decodes_share_a_pass_and_one_question_is_scored() -> None:
    rows = [Item("a", Phase.DECODE), Item("b", Phase.PREFILL), Item("c", Phase.DECODE)]
    scored = [Item("d", Phase.SCORE), Item("e", Phase.SCORE)]
    plan = scheduler(*rows, *scored, Item("f", Phase.RELOADING), max_batch=8).plan()
    assert plan.rows == rows
    assert plan.score is scored[0]
    assert plan.ingest is None


def test_a_postponed_question_lets_the_others_go_first() -> None:
    first, second = Item("a", Phase.SCORE), Item("b", Phase.SCORE)
    policy = scheduler(first, second)
    for expected in (first, second, first):
        assert policy.plan().score is expected
        policy.postpone(expected)


def test_uploads_take_turns() -> None:
    a, b, stalled, ended = Item("a"), Item("b"), Item("c", has_chunk=False), Item("d", ended=True)
    policy = scheduler(ingests=(a, ended, stalled, b))
    assert [policy.plan().ingest for _ in range(4)] == [a, b, a, b]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_a_busy_engine_divides_its_time(share: float) -> None:
    """However long chunks and steps take, both sides get their part."""
    policy = scheduler(Item("a", Phase.DECODE), ingests=(Item("b"),), prefill_share=share)
    spent = {"questions": 0.0, "prefill": 0.0}
    for _ in range(1000):
        plan = policy.plan()
        policy.account_questions(0.02)
        spent["questions"] += 0.02
        if plan.ingest:
            policy.account_prefill(0.5)
            spent["prefill"] += 0.5
    assert spent["prefill"] / sum(spent.values()) == pytest.approx(share, abs=0.05)


def test_an_upload_alone_never_waits() -> None:
    policy = scheduler(ingests=(Item("a"),))
    for _ in range(5):
        assert policy.plan().ingest is not None
        policy.account_prefill(1.0)


def test_a_question_that_comes_during_an_upload_goes_first() -> None:
    policy = scheduler(ingests=(Item("a"),))
    policy.plan()
    policy.account_prefill(1.0)
    policy.add(Item("b", Phase.SCORE))
    assert policy.plan().ingest is None


@pytest.mark.parametrize(("max_batch", "share"), [(0, 0.5), (1, 0.0), (1, 1.0)])
def test_bad_options(max_batch: int, share: float) -> None:
    with pytest.raises(ValueError):
        Scheduler(max_batch=max_batch, prefill_share=share)
