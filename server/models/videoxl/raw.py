"""The prefill of a video without compression: every visual token keeps its own KV."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compression.cache import KVCache
from compression.compressor import RawChunk
from compression.kv import ChunkKV
from server.models.base import PositionLimitError
from server.models.lm.decoder import Window

if TYPE_CHECKING:
    from server.models.videoxl.model import VideoXL


class RawPrefill:
    """Later chunks see the raw KVs of all earlier ones, as in a plain video language model.

    The state of one video; nothing of it lives on the model.
    """

    def __init__(self, model: VideoXL, *, num_queries: int = 16) -> None:
        """Keeps the queries of each chunk's last ``num_queries`` tokens for the compressors that look at them."""
        self._model = model
        self._num_queries = num_queries
        prefix = model.prefix()
        self._memory = KVCache(prefix, model.rope, capacity=2 * prefix.num_tokens)
        self._memory.append(prefix)

    @torch.inference_mode()
    def append(self, features: Tensor) -> RawChunk:
        """The next chunk's visual tokens ``[n, hidden]``. Raises :class:`PositionLimitError`."""
        model, start = self._model, self._memory.length
        if start + len(features) > model.spec.max_positions:
            raise PositionLimitError(
                f"the video needs more than the {model.spec.max_positions} positions of {model.spec.name}"
            )
        _, projected = model.decoder([Window(features, self._memory)])
        keys, values = (torch.stack([layer[part] for layer in projected]) for part in (1, 2))
        self._memory.advance(len(features))
        positions = torch.arange(start, self._memory.length, device=features.device)
        return RawChunk(
            kv=ChunkKV(keys, values, "low", 1),
            positions=positions,
            queries=torch.stack([queries[:, -self._num_queries :] for queries, _, _ in projected]),
            query_positions=positions[-self._num_queries :],
            rope=model.rope,
            tokens_per_frame=model.spec.tokens_per_frame,
        )
