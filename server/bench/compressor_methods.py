"""The rows of models that leave compression to this server: each of its compressors, uniform and bi-level."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compression.kv import ChunkKV
from compression.methods import COMPRESSORS
from server.bench.local import LocalVideo
from server.bench.methods import UNIFORM_RATIOS, Built, Method, as_local, oracle
from server.bench.reply import Reply
from server.bench.synthetic import Question
from server.bench.video import AskedVideo

BEST = (1, 2, 6)
"""Chunks re-loaded, besides the default number."""


@dataclass(frozen=True, slots=True)
class BiLevel:
    """A compressor's L-KVs of the best ``count`` chunks (None: the default number) amid its H-KVs of the others.

    The chunks are those that the model's own scorer finds with these H-KVs; with ``told``, those with the answer.
    """

    name: str
    compressor: str
    count: int | None = None
    told: bool = False
    remote: bool = False

    @property
    def family(self) -> str:
        return self.name if self.told else f"{self.compressor}-bilevel"

    @property
    def at_default(self) -> bool:
        return self.count is None

    def answer(self, video: AskedVideo, questions: Sequence[Question]) -> list[Reply]:
        """See :class:`server.bench.methods.Method`."""
        local = as_local(video)
        low, high = local.prefilled(compressor=self.compressor)
        count = local.default_reload if self.count is None else self.count
        caches, scored, times_ms = [], [], []
        for question in questions:
            begin_s = time.perf_counter()
            scores: Sequence[float] = ()
            if self.told:
                chosen = set(oracle(local, question).chunks or ())
            else:
                scores = local.score_over(question.text, high, local.model.scorer)
                chosen = set(sorted(range(len(high)), key=lambda index: (-scores[index], index))[:count])
            times_ms.append((time.perf_counter() - begin_s) * 1000)
            mixed = [low[index] if index in chosen else high[index] for index in range(len(high))]
            caches.append(local.decoder.cache(mixed))
            scored.append(tuple(scores))
        replies = local.decoder.decode([question.text for question in questions], caches)
        return [
            replace(reply, scores=scores, times_ms={**reply.times_ms, "score": ms})
            for reply, scores, ms in zip(replies, scored, times_ms, strict=True)
        ]


def _uniform(compressor: str, ratio: int) -> Method:
    def chunks(video: LocalVideo) -> Sequence[ChunkKV]:
        return video.prefilled(ratio, ratio, compressor=compressor)[0]

    return Built(f"{compressor}-uniform-{ratio}", f"{compressor}-uniform", chunks)


def _level(compressor: str, index: int) -> Method:
    def chunks(video: LocalVideo) -> Sequence[ChunkKV]:
        return video.prefilled(compressor=compressor)[index]

    return Built(f"{compressor}-{('low', 'high')[index]}", f"{compressor}-uniform", chunks)


def _rows(compressor: str) -> list[Method]:
    return [
        _level(compressor, 0),
        *(_uniform(compressor, ratio) for ratio in UNIFORM_RATIOS),
        _level(compressor, 1),
        *(BiLevel(f"{compressor}-bilevel-{count}", compressor, count) for count in BEST),
        BiLevel(f"{compressor}-bilevel", compressor),
        BiLevel(f"{compressor}-oracle", compressor, told=True),
    ]


COMPRESSOR_METHODS: list[Method] = [row for compressor in COMPRESSORS for row in _rows(compressor)]
"""What a compressor makes of the default's budget without levels is in METHODS, under its name alone."""
