"""One pass for many questions: what they look at, and their next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from compression.score import QueryTrace
from server.engine.question import Question
from server.engine.sampler import sample
from server.models.base import VideoModel

Found = TypeVar("Found")


def draw(model: VideoModel, questions: Sequence[Question]) -> list[int | Exception]:
    """The next token of every question, drawn in one pass. If it fails they are tried one by one, and in the place of
    the guilty one's token stands its error."""
    drawn = _attempt(questions, lambda some: _forward(model, some))
    return [drawn[question.id] for question in questions]


def trace(model: VideoModel, questions: Sequence[Question]) -> list[QueryTrace | Exception]:
    """What the last piece of every question's prompt looks at in its H-KVs, in one pass; errors as in :func:`draw`."""
    if not questions:
        return []
    traced = _attempt(questions, lambda some: model.trace([question.row() for question in some]))
    return [traced[question.id] for question in questions]


def _forward(model: VideoModel, questions: Sequence[Question]) -> list[int]:
    return sample(model.forward([question.row() for question in questions]), [q.sampler for q in questions])


def _attempt(
    questions: Sequence[Question], pass_over: Callable[[Sequence[Question]], Sequence[Found]]
) -> dict[str, Found | Exception]:
    caches = [question.cache for question in questions if question.cache is not None]
    ends = [(cache.length, cache.next_position) for cache in caches]
    try:
        return dict(zip((question.id for question in questions), pass_over(questions), strict=True))
    except Exception as error:
        if len(questions) == 1:
            return {questions[0].id: error}
        for cache, end in zip(caches, ends, strict=True):
            cache.rewind(*end)
    # Not in the handler, where the error still holds what the failed pass had allocated.
    return {name: found for question in questions for name, found in _attempt([question], pass_over).items()}
