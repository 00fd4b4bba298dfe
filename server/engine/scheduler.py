"""Who runs in the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from server.engine.ingest import Ingest
from server.engine.question import Phase, Question

_TILE = 8
"""Prompts count by so many tokens, as kernels read them: what does not fit into a pass would need one of its own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The questions' part of a step: those that are ``scored``, those whose ``prompts`` are read, and those that are
    ``decoding``."""

    scored: list[Question]
    prompts: list[Question]
    decoding: list[Question]

    def __bool__(self) -> bool:
        return bool(self.scored or self.prompts or self.decoding)


@dataclass(frozen=True, slots=True)
class Room:
    """For slices of a prefill in a step: seconds of the device, and of the engine's thread, which has nothing else to
    do while the device computes the questions' part."""

    device_s: float
    host_s: float


class Scheduler:
    """The policy. Questions take a slot in order of arrival, and uploads take turns chunk by chunk.

    Where both want the engine, each gets its share of the time, and in every single step: questions that ran for ``t``
    seconds earn the uploads ``t * share / (1 - share)``. A slice of a chunk's prefill runs as soon as anything is
    earned, and others behind it as far as they fit; one that is longer than that is paid for by the next steps, which
    then have none. So a stream waits for what its share says, or for one slice. Uploads get less where the engine's
    thread needs longer to ask the device for slices than that needs for them.

    Used by the engine thread alone.
    """

    def __init__(self, *, max_batch: int, prefill_share: float, prompt_tokens: int = 0) -> None:
        """In a step so many questions are scored as have ``prompt_tokens`` together, or one; and of so many others the
        prompts are read (0: all)."""
        if max_batch < 1 or not 0 < prefill_share < 1:
            raise ValueError("max_batch must be at least 1 and prefill_share between 0 and 1")
        self._max_batch = max_batch
        self._prompt_tokens = prompt_tokens
        self._prefill_per_question_s = prefill_share / (1 - prefill_share)
        self._questions: dict[str, Question] = {}
        self._ingests: deque[Ingest] = deque()
        self._turn: Ingest | None = None
        self._earned_s = 0.0
        self._questions_s = 0.0

    def add(self, question: Question) -> None:
        self._questions[question.id] = question

    def remove(self, question: Question) -> None:
        self._questions.pop(question.id, None)

    def postpone(self, question: Question) -> None:
        """Lets the others go first in the next step."""
        self._questions[question.id] = self._questions.pop(question.id)

    def add_ingest(self, ingest: Ingest) -> None:
        self._ingests.append(ingest)

    def __iter__(self) -> Iterator[Question]:
        """All questions in order of arrival; a copy, so that they may be removed meanwhile."""
        return iter(list(self._questions.values()))

    @property
    def num_running(self) -> int:
        """Questions that hold a slot. May be asked for from any thread."""
        return sum(question.phase.running for question in self)

    def next_for_slot(self) -> Question | None:
        """The first question that waits for a slot, if one is free."""
        if self.num_running >= self._max_batch:
            return None
        return next((q for q in self._questions.values() if q.phase is Phase.QUEUED), None)

    def plan(self) -> Plan:
        questions = self._questions.values()
        waiting = [question for question in questions if question.phase is Phase.SCORE]
        prompts = [question for question in questions if question.phase is Phase.PREFILL]
        decoding = [question for question in questions if question.phase is Phase.DECODE]
        return Plan(self._together(waiting), self._together(prompts) if self._prompt_tokens else prompts, decoding)

    def _together(self, questions: list[Question]) -> list[Question]:
        """The first ones, whose prompts go into one pass."""
        ends = accumulate(-(-question.num_prompt_tokens // _TILE) * _TILE for question in questions)
        return questions[: max(1, sum(end <= self._prompt_tokens for end in ends))]

    def account(self, plan: Plan, questions_s: float, prefill_s: float) -> None:
        """Tells how long a step's questions took, and all the slices that have ended since the last step's."""
        if not plan:
            self._earned_s = 0.0
            return
        self._questions_s = questions_s
        earned_s = questions_s * self._prefill_per_question_s
        # What could not be spent is no reason to hold the questions up for longer later on.
        self._earned_s = min(self._earned_s - prefill_s + earned_s, earned_s)

    def prefill(self, plan: Plan) -> tuple[Ingest | None, Room | None]:
        """Whose slices follow a step's questions, and for how long; None where one slice a step will do, because nobody
        waits for the end of the step."""
        if not plan:
            return self._next_ingest(), None
        host_s = self._earned_s
        if not plan.scored and not plan.prompts:
            # Otherwise the thread has waited for these, and the device has hardly anything left to do.
            host_s = max(host_s, self._questions_s)
        room = Room(self._earned_s, host_s)
        return (self._next_ingest() if self._earned_s > 0 else None), room

    def _next_ingest(self) -> Ingest | None:
        """The one whose turn it is, until its chunk ends; then the next that has something to do."""
        if self._turn is not None and self._turn.within_chunk:
            return self._turn
        self._turn = None
        for _ in range(len(self._ingests)):
            ingest = self._ingests.popleft()
            has_slice = ingest.has_slice
            if has_slice or not ingest.ended:
                self._ingests.append(ingest)
            if has_slice:
                self._turn = ingest
                break
        return self._turn
