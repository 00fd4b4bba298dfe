"""The rows of the quality table: every way of compressing and re-loading that is compared, in one list."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from compression.kv import ChunkKV
from compression.methods import COMPRESSORS
from compression.score import AttentionScorer, CosineScorer, Scorer
from compression.select import Dial, fewest, peaks
from server.bench.grade import named_objects
from server.bench.local import LocalVideo
from server.bench.reply import Reply
from server.bench.synthetic import Question
from server.bench.video import AskedVideo
from server.models.memory import CHEAPER

RELOADS = (1, 2, 3, 4, 6)
UNIFORM_RATIOS = (4, 8, 16)
PEAK = 0.35
"""Chunks with this share of the best score are re-loaded after a draft of the answer."""
ENOUGH = 0.85
"""Chunks with this share of all scores are re-loaded by ``adaptive``: about as many, on average, as by default."""


class Method(Protocol):
    """One row. ``family`` is its line in the plot; a family of one stands alone there.

    ``remote`` tells whether it can be asked of a server, ``at_default`` whether it spends what the default spends.
    """

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str: ...

    @property
    def remote(self) -> bool: ...

    @property
    def at_default(self) -> bool: ...

    def answer(self, video: AskedVideo, questions: Sequence[Question]) -> list[Reply]:
        """One reply a question."""


@dataclass(frozen=True, slots=True)
class Dialled:
    """Asks as a client may: ``dial`` says what to re-load, ``scorer`` (None: the model's own) what is relevant."""

    name: str
    family: str
    dial: Callable[[AskedVideo, Question], Dial]
    scorer: Scorer | None = None
    at_default: bool = False

    @property
    def remote(self) -> bool:
        return self.scorer is None

    def answer(self, video: AskedVideo, questions: Sequence[Question]) -> list[Reply]:
        """See :class:`Method`."""
        dials = [self.dial(video, question) for question in questions]
        replies = video.ask(
            [(question.text, dial) for question, dial in zip(questions, dials, strict=True)], self.scorer
        )
        # Where the dial names the chunks itself, the scores that come with the answer chose nothing.
        named = [dial.chunks is not None or dial.mode is not None for dial in dials]
        return [replace(reply, scores=()) if own else reply for reply, own in zip(replies, named, strict=True)]


@dataclass(frozen=True, slots=True)
class Dependent(Dialled):
    """As above, but ``dial`` looks at the video's KVs to decide, so it works in this process only."""

    @property
    def remote(self) -> bool:
        return False

    def answer(self, video: AskedVideo, questions: Sequence[Question]) -> list[Reply]:
        """See :class:`Method`; the time of deciding counts as the score's."""
        assert as_local(video).high  # loaded now: where a server decides they are on the device
        jobs, decided_ms = [], []
        for question in questions:
            begin_s = time.perf_counter()
            jobs.append((question.text, self.dial(video, question)))
            decided_ms.append((time.perf_counter() - begin_s) * 1000)
        return [
            replace(reply, scores=(), times_ms={**reply.times_ms, "score": ms})
            for reply, ms in zip(video.ask(jobs, self.scorer), decided_ms, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Built:
    """A cache that the engine does not make: the KVs of ``chunks`` behind the prefix, the same for all questions."""

    name: str
    family: str
    chunks: Callable[[LocalVideo], Sequence[ChunkKV]]
    at_default: bool = False
    remote: bool = False

    def answer(self, video: AskedVideo, questions: Sequence[Question]) -> list[Reply]:
        """See :class:`Method`."""
        local = as_local(video)
        cache = local.decoder.cache(self.chunks(local))
        return local.decoder.decode([question.text for question in questions], [cache] * len(questions))


@dataclass(frozen=True, slots=True)
class BuiltForQuestion:
    """The same, with other KVs for every question."""

    name: str
    family: str
    chunks: Callable[[LocalVideo, Question], Sequence[ChunkKV]]
    at_default: bool = False
    remote: bool = False

    def answer(self, video: AskedVideo, questions: Sequence[Question]) -> list[Reply]:
        """See :class:`Method`."""
        local = as_local(video)
        caches = [local.decoder.cache(self.chunks(local, question)) for question in questions]
        return local.decoder.decode([question.text for question in questions], caches)


def as_local(video: AskedVideo) -> LocalVideo:
    """Raises TypeError for a video at a server."""
    if not isinstance(video, LocalVideo):
        raise TypeError("this method needs the model in this process")
    return video


def oracle(video: AskedVideo, question: Question) -> Dial:
    """The chunks that hold the answer, filled up with others to the default number."""
    others = [index for index in _shuffled(video, question) if index not in question.chunks]
    return Dial(chunks=(*question.chunks, *others[: max(0, video.default_reload - len(question.chunks))]))


def _random(video: AskedVideo, question: Question) -> Dial:
    return Dial(chunks=tuple(_shuffled(video, question)[: video.default_reload]))


def _drafted(video: AskedVideo, question: Question) -> Dial:
    """The default's chunks, and those that its answer, taken for a draft, looks for."""
    local = as_local(video)
    (draft,) = local.ask([(question.text, Dial())])
    wanted = local.score_over(question.text, local.high, local.model.scorer, draft.text)
    return Dial(chunks=tuple(dict.fromkeys((*draft.reloaded, *peaks(wanted, PEAK, 2 * local.default_reload)))))


def _adapted(video: AskedVideo, question: Question) -> Dial:
    """One chunk where the scores have one sharp peak, more where they are flat."""
    (scores,) = as_local(video).scores([question.text])
    return Dial(chunks=fewest(scores, ENOUGH, 2 * video.default_reload))


def _union(video: AskedVideo, question: Question) -> Dial:
    """In turn the best chunk of every object that the question names, asked about by itself."""
    names = named_objects(question.text)
    texts = [f"When does the {name} first appear?" for name in names] if len(names) > 1 else [question.text]
    ranked = [sorted(range(video.num_chunks), key=lambda i: (-one[i], i)) for one in as_local(video).scores(texts)]
    in_turn = dict.fromkeys(index for turn in zip(*ranked, strict=True) for index in turn)
    return Dial(chunks=tuple(in_turn)[: video.default_reload])


def _shuffled(video: AskedVideo, question: Question) -> list[int]:
    return Random(question.text).sample(range(video.num_chunks), video.num_chunks)


def _reloads(family: str, scorer: Scorer | None) -> list[Method]:
    """The best 1, 2, ... chunks by a scorer."""

    def best(count: int) -> Callable[[AskedVideo, Question], Dial]:
        return lambda video, question: Dial(reload=count)

    return [Dialled(f"{family}-{count}", family, best(count), scorer) for count in RELOADS]


def _uniform(ratio: int) -> Method:
    return Built(f"uniform-{ratio}", "uniform", lambda video: video.uniform(ratio))


def _evicted(name: str) -> Method:
    """A training-free method over uncompressed KVs."""
    return Built(name, name, lambda video: video.kept(name), at_default=True)


def _retrieve_by_mean_keys(video: LocalVideo, question: Question) -> list[ChunkKV]:
    """As ReKV does: the cosine of the question's mean query and the mean of a chunk's raw keys."""
    return video.kept("raw-retrieval", video.score_over(question.text, video.representatives, CosineScorer()))


def _retrieve_by_attention(video: LocalVideo, question: Question) -> list[ChunkKV]:
    """By the bi-level method's own scores: what differs is that nothing is left of the other chunks."""
    (scores,) = video.scores([question.text])
    return video.kept("raw-retrieval", scores)


def _snap_for_question(video: LocalVideo, question: Question) -> list[ChunkKV]:
    return [video.kept_for(question.text)]


def _reload_from(video: LocalVideo, question: Question, low: Sequence[ChunkKV]) -> list[ChunkKV]:
    """The default's mixed cache with other L-KVs than the store's."""
    (scores,) = video.scores([question.text])
    chosen = sorted(range(video.num_chunks), key=lambda index: (-scores[index], index))[: video.default_reload]
    return [low[index] if index in chosen else high for index, high in enumerate(video.high)]


def _variant(name: str, low: Callable[[LocalVideo], Sequence[ChunkKV]]) -> list[Method]:
    """The default, and every chunk in detail, with other L-KVs."""
    return [
        BuiltForQuestion(name, name, lambda video, asked: _reload_from(video, asked, low(video)), at_default=True),
        Built(f"{name}-low", f"{name}-low", low),
    ]


def _prefilled(mode: str) -> list[Method]:
    """The same, with what a prefill makes that sees less of earlier chunks."""
    return _variant(mode, lambda video: video.prefilled(prefill_mode=mode)[0])


PLAIN: Method = Dialled("plain", "plain", lambda video, question: Dial(), at_default=True)
"""What a server answers that is told nothing more; the only row of one that has no dials."""

METHODS: list[Method] = [
    Dialled("low", "uniform", lambda video, question: Dial(mode="low")),
    *map(_uniform, UNIFORM_RATIOS),
    Dialled("high", "uniform", lambda video, question: Dial(mode="high")),
    *_reloads("attention", None),
    *_reloads("every-head", AttentionScorer()),
    *_reloads("cosine", CosineScorer()),
    Dependent("draft", "draft", _drafted),
    Dependent("adaptive", "adaptive", _adapted),
    Dependent("union", "union", _union, at_default=True),
    Dialled("oracle", "oracle", oracle, at_default=True),
    Dialled("random", "random", _random, at_default=True),
    Built("raw", "raw", lambda video: [chunk.with_others(chunk.kv) for chunk in video.raw]),
    *(_evicted(name) for name in (*COMPRESSORS, "frames", "recency")),
    BuiltForQuestion("snap-question", "snap-question", _snap_for_question, at_default=True),
    BuiltForQuestion("raw-retrieval", "raw-retrieval", _retrieve_by_mean_keys, at_default=True),
    BuiltForQuestion("raw-retrieval-attention", "raw-retrieval-attention", _retrieve_by_attention, at_default=True),
    *_variant("int8", lambda video: video.low_int8),
    *(method for mode in CHEAPER for method in _prefilled(mode)),
]
"""A new row is one more entry. ``low`` and ``high`` are uniform compression at the model's two ratios."""
