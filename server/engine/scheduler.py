"""Who runs in the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from server.engine.ingest import Ingest
from server.engine.question import Phase, Question


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: at most one question is read for its scores, ``rows`` go through one forward pass together (prompts
    and decodes alike), and at most one chunk of one upload is prefilled."""

    score: Question | None
    rows: list[Question]
    ingest: Ingest | None

    def __bool__(self) -> bool:
        return bool(self.score or self.rows or self.ingest)


class Scheduler:
    """The policy. Questions take a slot in order of arrival, uploads take turns chunk by chunk, and where both want
    the engine each gets its share of the time: after a chunk of ``t`` seconds the questions run for
    ``t * (1 - share) / share`` seconds before the next. So an upload never starves a stream, nor the other way round.

    Used by the engine thread alone.
    """

    def __init__(self, *, max_batch: int, prefill_share: float) -> None:
        if max_batch < 1 or not 0 < prefill_share < 1:
            raise ValueError("max_batch must be at least 1 and prefill_share between 0 and 1")
        self._max_batch = max_batch
        self._questions_per_prefill_s = (1 - prefill_share) / prefill_share
        self._questions: dict[str, Question] = {}
        self._ingests: deque[Ingest] = deque()
        self._owed_s = 0.0

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
        score = next((question for question in questions if question.phase is Phase.SCORE), None)
        rows = [question for question in questions if question.phase in (Phase.PREFILL, Phase.DECODE)]
        wanted = bool(score or rows)
        return Plan(score, rows, None if wanted and self._owed_s > 0 else self._next_ingest())

    def account_questions(self, took_s: float) -> None:
        """Tells how long a step's questions took."""
        self._owed_s = max(0.0, self._owed_s - took_s)

    def account_prefill(self, took_s: float) -> None:
        """Tells how long a step's chunk took."""
        self._owed_s = took_s * self._questions_per_prefill_s

    def _next_ingest(self) -> Ingest | None:
        for _ in range(len(self._ingests)):
            ingest = self._ingests.popleft()
            if ingest.ended:
                continue
            self._ingests.append(ingest)
            if ingest.has_chunk:
                return ingest
        return None
