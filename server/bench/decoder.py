"""Greedy answers over caches that are given, without the engine: for what a server has no dial for."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from server.bench.reply import MAX_TOKENS, Reply
from server.engine.detokenize import Detokenizer
from server.models.base import Row, Turn, VideoModel

_BATCH = 16
_BATCH_NBYTES = 1 << 30
"""Of the caches that are decoded together."""
_ROOM = 128
"""Tokens of a question and its answer; a cache grows where this is too little."""


class CacheDecoder:
    """A model that answers questions over mixed caches of any KVs."""

    def __init__(self, model: VideoModel) -> None:
        self.model = model

    def prompt(self, text: str) -> Tensor:
        """The token ids of a question, on the model's device."""
        return torch.tensor(self.model.tokenize([Turn("user", text)]), device=self.model.device)

    def cache(self, chunks: Sequence[ChunkKV]) -> MixedCache:
        """Prefix and ``chunks``, ready for :meth:`decode`."""
        return MixedCache(self.model.prefix(), chunks, self.model.rope, room=_ROOM)

    def decode(self, texts: Sequence[str], caches: Sequence[MixedCache]) -> list[Reply]:
        """Greedy answers over caches that hold prefix and video, one a text; several texts may share one cache.

        The caches themselves stay as they are.
        """
        largest = max((cache.num_mixed * self.model.token_nbytes for cache in caches), default=1)
        size = max(1, min(_BATCH, _BATCH_NBYTES // largest))
        replies: list[Reply] = []
        for start in range(0, len(texts), size):
            replies += self._decode_batch(texts[start : start + size], caches[start : start + size])
        return replies

    @torch.inference_mode()
    def _decode_batch(self, texts: Sequence[str], caches: Sequence[MixedCache]) -> list[Reply]:
        model = self.model
        rows = [Row(self.prompt(text), cache.copy()) for text, cache in zip(texts, caches, strict=True)]
        said: list[list[int]] = [[] for _ in rows]
        begin_s = time.perf_counter()
        tokens = model.forward(rows).argmax(-1).tolist()
        prefilled_s = time.perf_counter()
        going = list(range(len(rows)))
        for _ in range(MAX_TOKENS):
            going = [row for row, token in zip(going, tokens, strict=True) if token not in model.end_ids]
            tokens = [token for token in tokens if token not in model.end_ids]
            for row, token in zip(going, tokens, strict=True):
                said[row].append(token)
            if not going:
                break
            step = [Row(torch.tensor([said[row][-1]], device=model.device), rows[row].cache) for row in going]
            tokens = model.forward(step).argmax(-1).tolist()
        ended_s = time.perf_counter()
        times_ms = {"prefill": (prefilled_s - begin_s) * 1000, "decode": (ended_s - prefilled_s) * 1000}
        return [
            Reply(
                text=self._text(ids),
                kv_tokens=cache.num_mixed,
                kv_nbytes=cache.num_mixed * self.model.token_nbytes,
                times_ms=times_ms,
            )
            for ids, cache in zip(said, caches, strict=True)
        ]

    def _text(self, ids: Sequence[int]) -> str:
        words = Detokenizer(self.model.tokenizer)
        return "".join(map(words.push, ids)) + words.flush()
