"""Puts every method's questions to a video."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.bench.grade import is_right
from server.bench.methods import Method
from server.bench.records import Record, RunFolder
from server.bench.reply import Reply
from server.bench.rows import EVERY_METHOD
from server.bench.synthetic import Question, SyntheticVideo
from server.bench.video import AskedVideo, VideoRefused
from server.video.errors import VideoError

_log = logging.getLogger(__name__)


class Bench(Protocol):
    """What opens videos: a model in this process, or a server."""

    def open(self, path: Path) -> AbstractContextManager[AskedVideo]:
        """Raises VideoRefused, VideoError."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is left to ask of one video: the questions' indices by the method's name."""

    video: SyntheticVideo
    left: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """In chunks, because a long video takes so much longer than a short one."""
        return self.video.chunks * len(self.left)


def jobs_left(folder: RunFolder, videos: Sequence[SyntheticVideo], methods: Sequence[Method]) -> list[Job]:
    """What has no reply yet, or an error for one; videos with nothing left are not among them."""
    jobs = []
    for video in videos:
        left = {method.name: _unanswered(folder, video, method.name) for method in methods}
        if any(left.values()):
            jobs.append(Job(video, {name: indices for name, indices in left.items() if indices}))
    return jobs


def run_job(bench: Bench, job: Job, path: Path) -> Iterator[tuple[str, list[Record]]]:
    """A method's name and its records, one after the other. An error is the reply of the questions that it befell."""
    by_name = {method.name: method for method in EVERY_METHOD}
    questions = {name: [job.video.questions[index] for index in indices] for name, indices in job.left.items()}
    try:
        with bench.open(path) as opened:
            for name in job.left:
                yield name, _ask(opened, job.video, by_name[name], questions.pop(name))
    except (VideoRefused, VideoError) as error:
        refused = Reply(error=f"{type(error).__name__}: {error}")
        for name, asked in questions.items():
            yield name, [_record(job.video, by_name[name], question, refused, None) for question in asked]


def _unanswered(folder: RunFolder, video: SyntheticVideo, name: str) -> tuple[int, ...]:
    indices = range(len(video.exam))
    return tuple(index for index in indices if not folder.answered((name, video.chunks, video.seed, index)))


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
