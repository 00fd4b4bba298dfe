"""Decoding on a device, one step ahead of what is known of it here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.engine.question import Question
from server.models.base import Drawn, StepDecoder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A step that the device has been asked for."""

    questions: Sequence[Question]
    tokens: Drawn
    begin_s: float


class Steps:
    """The next tokens are asked for before the last ones are known here: the device draws them meanwhile, and never
    waits for what is done with a token (text, stop strings, clients). A token that was asked for behind the end of an
    answer is dropped.
    """

    def __init__(self, decoder: StepDecoder, on_step: Callable[[int, float], None]) -> None:
        """``on_step`` gets the rows of every step and the seconds from its begin, or the end of the one before, to
        where its tokens are known."""
        self._decoder = decoder
        self._on_step = on_step
        self._asked: _Asked | None = None
        self._failed = False
        self._end_s = 0.0

    def turn(self, questions: Sequence[Question]) -> list[tuple[Question, int | Exception]]:
        """Asks for one more token of all ``questions`` that want one, and waits for those that were asked for in the
        last turn: the tokens, or in the place of one the error that has cost it."""
        wanting = [question for question in questions if question.wants_token]
        if self._failed:  # then all tokens are known
            self._failed = False
            return [(question, self._alone(question)) for question in wanting]
        last, self._asked = self._asked, None
        if wanting:
            try:
                self._asked = self._ask(wanting)
            except Exception as error:
                # Whose fault it is shows when each is asked for alone; next, when what they begin with is known.
                _log.warning("a step of %d rows has failed, each is tried alone: %s", len(wanting), error)
                self._failed = True
        return [] if last is None else list(zip(last.questions, self._wait(last), strict=True))

    def _ask(self, questions: Sequence[Question]) -> _Asked:
        begin_s = time.perf_counter()
        tokens = self._decoder.step([question.step() for question in questions])
        for row, question in enumerate(questions):
            question.asked(row)
        return _Asked(questions, tokens, begin_s)

    def _alone(self, question: Question) -> int | Exception:
        try:
            asked = self._ask([question])
        except Exception as error:
            return error
        return self._wait(asked)[0]

    def _wait(self, asked: _Asked) -> Sequence[int | Exception]:
        try:
            tokens = asked.tokens.wait()
        except Exception as error:
            return [error] * len(asked.questions)
        before_s, self._end_s = self._end_s, time.perf_counter()
        self._on_step(len(asked.questions), self._end_s - max(before_s, asked.begin_s))
        return tokens
