"""Puts every method's questions to every video, and keeps what comes of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from server.bench.grade import is_right
from server.bench.methods import Method
from server.bench.records import Record, RunFolder
from server.bench.reply import Reply
from server.bench.synthetic import Question, SyntheticVideo
from server.bench.video import AskedVideo, VideoRefused
from server.video.errors import VideoError

_log = logging.getLogger(__name__)


class Bench(Protocol):
    """What opens videos: a model in this process, or a server."""

    def open(self, path: Path) -> AbstractContextManager[AskedVideo]:
        """Raises VideoRefused, VideoError."""


def run_all(
    bench: Bench,
    videos: Sequence[SyntheticVideo],
    methods: Sequence[Method],
    folder: RunFolder,
    path_of: Callable[[SyntheticVideo], Path],
    tell: Callable[[SyntheticVideo, str], None],
) -> None:
    """Asks what is not yet answered. ``tell`` is called before a video is opened (with "") and after every method.

    An error is the reply of the questions that it befell, and the run goes on.
    """
    for video in videos:
        left = [(method, unanswered(folder, video, method)) for method in methods]
        left = [(method, questions) for method, questions in left if questions]
        if not left:
            continue
        tell(video, "")
        try:
            with bench.open(path_of(video)) as opened:
                for method, questions in left:
                    folder.add(_ask(opened, video, method, questions))
                    tell(video, method.name)
        except (VideoRefused, VideoError) as error:
            refused = Reply(error=f"{type(error).__name__}: {error}")
            for method, questions in left:
                folder.add(_record(video, method, question, refused, None) for question in questions)
                tell(video, method.name)


def unanswered(folder: RunFolder, video: SyntheticVideo, method: Method) -> list[Question]:
    """The questions that have no reply yet, or an error for one."""
    name = method.name
    return [one for one in video.questions if not folder.answered((name, video.chunks, video.seed, one.index))]


def _ask(opened: AskedVideo, video: SyntheticVideo, method: Method, questions: Sequence[Question]) -> list[Record]:
    """The first question is asked alone, so that its times are its own; the others all together."""
    records: list[Record] = []
    for together in (questions[:1], questions[1:]):
        if not together:
            continue
        try:
            replies = method.answer(opened, together)
        except Exception as error:
            _log.warning("%s failed", method.name, exc_info=error)
            replies = [Reply(error=f"{type(error).__name__}: {error}")] * len(together)
        prefill_s = None if records else opened.prefill_s
        records += [
            _record(video, method, question, reply, prefill_s)
            for question, reply in zip(together, replies, strict=True)
        ]
    return records


def _record(video: SyntheticVideo, method: Method, question: Question, reply: Reply, prefill_s: float | None) -> Record:
    order = sorted(range(len(reply.scores)), key=lambda index: (-reply.scores[index], index))
    return Record(
        method=method.name,
        chunks=video.chunks,
        seed=video.seed,
        index=question.index,
        type=question.type,
        answer=question.answer,
        reply=reply.text,
        right=reply.error is None and is_right(question.type, question.answer, reply.text),
        error=reply.error,
        truth=question.chunks,
        reloaded=reply.reloaded,
        ranks=tuple(order.index(chunk) for chunk in question.chunks) if order else None,
        contained=_contained(question, reply) if reply.reloaded else None,
        kv_tokens=reply.kv_tokens,
        kv_nbytes=reply.kv_nbytes,
        reload_nbytes=reply.reload_nbytes,
        times_ms=None if prefill_s is None else {phase: round(ms, 2) for phase, ms in reply.times_ms.items()},
        prefill_s=prefill_s,
    )


def _contained(question: Question, reply: Reply) -> bool | None:
    """Whether the re-loaded spans cover the answer's, where that lies within one chunk."""
    if len(question.chunks) != 1 or question.start_s is None or question.end_s is None:
        return None
    reached_s = question.start_s
    for start_s, end_s in sorted(reply.spans_s):
        if start_s <= reached_s:
            reached_s = max(reached_s, end_s)
    return reached_s >= question.end_s
