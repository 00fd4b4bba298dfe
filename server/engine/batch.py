"""One forward pass for many questions."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.question import Question
from server.engine.sampler import sample
from server.models.base import VideoModel


def draw(model: VideoModel, questions: Sequence[Question]) -> list[int | Exception]:
    """The next token of every question, drawn in one pass. If that fails they are tried one by one, and in the place
    of the guilty one's token stands its error."""
    rows = [question.row() for question in questions]
    ends = [(row.cache.length, row.cache.next_position) for row in rows]
    try:
        return list(sample(model.forward(rows), [question.sampler for question in questions]))
    except Exception as error:
        if len(questions) == 1:
            return [error]
        for row, end in zip(rows, ends, strict=True):
            row.cache.rewind(*end)
    # Not in the handler, where the error still holds what the failed pass had allocated.
    return [outcome for question in questions for outcome in draw(model, [question])]
