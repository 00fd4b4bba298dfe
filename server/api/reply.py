"""The JSON objects of a chat completion's answer: OpenAI's, with the evidence in ``x2l``."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads the standard library's from Python 3.12 on only

from server.engine.request import FinishReason, Outcome


class CachedTokens(TypedDict):
    """How much of the prompt was not computed again: the whole mixed cache of a video that is ready."""

    cached_tokens: int


class Usage(TypedDict):
    """OpenAI's usage; ``prompt_tokens`` counts the mixed cache, images and the text."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class EvidenceItem(TypedDict):
    """A chunk that was re-loaded in detail; ``file_id`` with several videos only."""

    file_id: NotRequired[str]
    chunk: int
    start_s: float
    end_s: float
    score: float


class FileChunks(TypedDict):
    """How many of the scores are of this file's chunks."""

    file_id: str
    num_chunks: int


class KVTokens(TypedDict):
    """KV tokens, prefix included, of the cache that was used, and with all chunks in detail or none."""

    mixed: int
    low: int
    high: int


class TimingsMs(TypedDict):
    """Milliseconds of each phase in the engine."""

    score: float
    reload: float
    prefill: float
    decode: float


class X2L(TypedDict):
    """What was looked at. ``evidence`` has the best chunk first, ``scores`` one score a chunk; ``degraded`` tells that
    an H-KV stood in for an L-KV that could not be read. ``files``, in their order in ``scores``, with several videos
    only; ``file_id`` is the first."""

    file_id: str
    files: NotRequired[list[FileChunks]]
    evidence: list[EvidenceItem]
    scores: list[float]
    kv_tokens: KVTokens
    degraded: bool
    timings_ms: TimingsMs
    reload_bytes: int


class AnswerMessage(TypedDict):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(TypedDict):
    """The one choice."""

    index: int
    message: AnswerMessage
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """OpenAI's chat completion; ``x2l`` where a video was asked about."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    x2l: NotRequired[X2L]


class ContentDelta(TypedDict, total=False):
    """What an event adds to the answer; nothing in the last one."""

    role: Literal["assistant"]
    content: str


class ChunkChoice(TypedDict):
    """The one choice, as far as it goes."""

    index: int
    delta: ContentDelta
    logprobs: None
    finish_reason: FinishReason | None


class ChatCompletionChunk(TypedDict):
    """One event of a stream; ``x2l`` comes with ``finish_reason``. ``usage`` is there only if it was asked for: null
    but in one more event at the end, which has no choice."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
    x2l: NotRequired[X2L]


class Reply:
    """Makes the objects of one answer: same id, time and model throughout."""

    def __init__(self, reply_id: str, created: int, model: str) -> None:
        self.id = reply_id
        self._created = created
        self._model = model

    def completion(self, text: str, finish_reason: FinishReason, outcome: Outcome) -> ChatCompletion:
        """The whole answer."""
        message: AnswerMessage = {"role": "assistant", "content": text, "refusal": None}
        whole: ChatCompletion = {
            "id": self.id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}],
            "usage": usage(outcome),
        }
        if outcome.files:
            whole["x2l"] = evidence(outcome)
        return whole

    def chunk(self, delta: ContentDelta, finish_reason: FinishReason | None = None) -> ChatCompletionChunk:
        """One event of a stream, without usage and evidence."""
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def last(self, outcome: Outcome) -> ChatCompletionChunk:
        """The event with the usage."""
        return {**self._chunk([]), "usage": usage(outcome)}

    def _chunk(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


def usage(outcome: Outcome) -> Usage:
    """OpenAI's ``usage``."""
    return {
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": outcome.cached_tokens},
    }


def evidence(outcome: Outcome) -> X2L:
    """The ``x2l`` object. What tells several files apart is left out where there is one."""
    several = len(outcome.files) > 1
    items: list[EvidenceItem] = []
    for found in outcome.evidence:
        item: EvidenceItem = {
            "chunk": found.chunk,
            "start_s": found.start_s,
            "end_s": found.end_s,
            "score": found.score,
        }
        items.append({"file_id": found.file_id, **item} if several else item)
    told: X2L = {
        "file_id": outcome.files[0].file_id,
        "evidence": items,
        "scores": list(outcome.scores),
        "kv_tokens": {"mixed": outcome.mixed_tokens, "low": outcome.low_tokens, "high": outcome.high_tokens},
        "degraded": outcome.degraded,
        "timings_ms": {
            "score": outcome.score_ms,
            "reload": outcome.reload_ms,
            "prefill": outcome.prefill_ms,
            "decode": outcome.decode_ms,
        },
        "reload_bytes": outcome.reload_nbytes,
    }
    if several:
        told["files"] = [{"file_id": file.file_id, "num_chunks": file.num_chunks} for file in outcome.files]
    return told
