"""One pass for many questions: what they look at, and their next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from compression.score import QueryTrace
from server.engine.question import Phase, Question
from server.engine.sampler import sample
from server.models.base import StepDecoder, VideoModel

Found = TypeVar("Found")


def draw(
    model: VideoModel, decoder: StepDecoder | None, questions: Sequence[Question], meanwhile: Callable[[], None]
) -> list[int | Exception]:
    """The next token of every question, drawn in one pass, or two where there is a ``decoder``: it takes those that
    decode. If a pass fails its questions are tried one by one, and in the place of the guilty one's token stands its
    error. ``meanwhile`` is called while a decoder's step is computed, if there is one."""
    decoding = [q for q in questions if q.phase is Phase.DECODE] if decoder is not None else []
    others = [question for question in questions if question not in decoding]
    drawn: dict[str, int | Exception] = {}
    if decoder is not None and decoding:
        drawn |= _attempt(decoding, lambda some: _step(decoder, some, meanwhile))
    if others:
        drawn |= _attempt(others, lambda some: _forward(model, some))
    return [drawn[question.id] for question in questions]


def trace(model: VideoModel, questions: Sequence[Question]) -> list[QueryTrace | Exception]:
    """What the last piece of every question's prompt looks at in its H-KVs, in one pass; errors as in :func:`draw`."""
    if not questions:
        return []
    traced = _attempt(questions, lambda some: model.trace([question.row() for question in some]))
    return [traced[question.id] for question in questions]


def _forward(model: VideoModel, questions: Sequence[Question]) -> list[int]:
    return sample(model.forward([question.row() for question in questions]), [q.sampler for q in questions])


def _step(decoder: StepDecoder, questions: Sequence[Question], meanwhile: Callable[[], None]) -> list[int]:
    tokens, logits = decoder.step([question.step() for question in questions], meanwhile)
    for place, question in enumerate(questions):
        if question.sampler.on_device is None:
            tokens[place] = question.sampler.draw(logits[place].cpu())
    return tokens


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
