"""Bi-level KVs without training: one pass over a chunk's visual tokens, whose KVs are compressed twice."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from compression.cache import KVCache
from compression.compressor import RawChunk, both_levels, num_kept
from compression.kv import ChunkKV
from compression.methods import COMPRESSORS
from compression.score import Scorer
from server.models.base import ModelSpec, PositionLimitError
from server.models.decoder import LanguageModel, Window
from server.models.decoder_model import DecoderModel, PromptConfig, stack
from server.models.memory import Recent, num_low_in_memory
from server.video.frames import Frames

_MOST_FRAMES = 10_000_000
"""Where the limit is never met, this is long enough."""
_NUM_QUERIES = 16
"""Of a chunk's last tokens, for the compressors that look at what these attend to."""


@dataclass(frozen=True, slots=True)
class OnePassConfig:
    """How a chunk's KVs become its L-KV and its H-KV.

    ``compressor`` is one of :data:`compression.methods.COMPRESSORS`; ``prefill_mode`` tells what a chunk's pass sees of
    the chunks before it (server.models.memory). Raises ValueError for a name that does not exist, and for a low ratio
    above the high one.
    """

    low_ratio: int = 2
    high_ratio: int = 16
    compressor: str = "stride"
    prefill_mode: str = "exact"

    def __post_init__(self) -> None:
        num_low_in_memory(self.prefill_mode)
        if self.compressor not in COMPRESSORS:
            raise ValueError(f"compressor must be one of {', '.join(COMPRESSORS)}, not {self.compressor!r}")
        if not 1 <= self.low_ratio <= self.high_ratio:
            raise ValueError(f"low_ratio {self.low_ratio} must not exceed high_ratio {self.high_ratio}")


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """One chunk's visual tokens: ``features`` [steps * rows * columns, hidden], row-major.

    ``times_s`` [steps, 2] float64 is when the first and the last frame of each step were on screen, in seconds from the
    first presented frame. ``deep`` [layers, steps * rows * columns, hidden] is for the language model's first layers
    (see :class:`Window`).
    """

    features: Tensor
    rows: int
    columns: int
    times_s: NDArray[np.float64]
    deep: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """What the model reads of a chunk, and where it stands.

    Where other tokens stand among the visual ones, ``is_visual`` [tokens] tells which is which and ``others``
    [n, hidden] are the embeddings of the former, which are never compressed. ``positions`` is int64 [axes, tokens], and
    what follows goes on at ``next_position``; None: one token behind the other, the others behind the visual ones.
    """

    positions: Tensor | None = None
    next_position: int | None = None
    is_visual: Tensor | None = None
    others: Tensor | None = None


class VisionTower(Protocol):
    """What is particular to a family of models: how frames are seen and where their tokens stand."""

    @property
    def settings(self) -> object:
        """All that changes a visual token or its place, besides the weights; ``repr`` tells it."""

    def preprocess(self, frames: Frames) -> Tensor:
        """See :meth:`server.models.base.VideoModel.preprocess`."""

    def __call__(self, pixels: Tensor, times_s: NDArray[np.float64]) -> VisualTokens:
        """Preprocessed frames of one chunk, on the model's device."""

    def num_tokens(self, num_frames: int, width: int, height: int) -> int:
        """See :meth:`server.models.base.VideoModel.num_visual_tokens`."""

    def num_positions(self, num_frames: int, width: int, height: int, fps: float) -> int | None:
        """Positions that a whole video takes, or a little more; None: contiguous, so those of its KV tokens."""

    def lay_out(self, tokens: VisualTokens, start: int, next_position: int, *, last: bool) -> Layout:
        """``start`` is the position of the video's first token, ``next_position`` the one behind the chunks before;
        ``last`` tells that no chunk follows."""


class OnePassModel(DecoderModel):
    """A model of transformers' own classes, or any other whose layers :class:`LanguageModel` can run."""

    takes_images = False

    def __init__(
        self,
        spec: ModelSpec,
        decoder: LanguageModel,
        vision: VisionTower,
        compression: OnePassConfig,
        prompt: PromptConfig,
        tokenizer: PreTrainedTokenizerFast,
        scorer: Scorer,
    ) -> None:
        """Takes modules already on their device and in their dtype."""
        super().__init__(spec, decoder, prompt, tokenizer, scorer, compression.prefill_mode)
        self.vision = vision
        self.compression = compression
        self.fingerprint = self._fingerprint(spec, compression, prompt, self.dtype, self.rope, vision.settings)

    def preprocess(self, frames: Frames) -> Tensor:
        return self.vision.preprocess(frames)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, times_s: NDArray[np.float64]) -> VisualTokens:
        return self.vision(pixels, times_s)

    def num_visual_tokens(self, num_frames: int, width: int, height: int) -> int:
        return self.vision.num_tokens(num_frames, width, height)

    def prefill_modes(self, width: int, height: int, fps: float) -> tuple[tuple[str, int], ...]:
        modes: list[tuple[str, int]] = []
        for mode in dict.fromkeys((self.prefill_mode, "high-memory")):
            peaks = partial(self._num_positions, mode, width=width, height=height, fps=fps)
            longest = bisect_right(range(_MOST_FRAMES), self.spec.max_positions, lo=1, key=peaks) - 1
            if not modes or longest > modes[-1][1]:
                modes.append((mode, longest))
        return tuple(modes)

    def prefill(self, mode: str | None = None) -> OnePassPrefill:
        return OnePassPrefill(self, mode or self.prefill_mode)

    def _num_positions(self, mode: str, num_frames: int, *, width: int, height: int, fps: float) -> int:
        """Positions that the prefill of so many frames takes, at least one; it never falls as they grow more."""
        num_prefix, size, config = len(self.prompt.prefix_ids), self.spec.frames_per_chunk, self.compression
        taken = self.vision.num_positions(num_frames, width, height, fps)
        if taken is not None:
            return num_prefix + taken
        num_before = (num_frames - 1) // size
        chunk, end = (self.num_visual_tokens(n, width, height) for n in (size, num_frames - num_before * size))
        most_low = num_low_in_memory(mode)

        def memory(num_chunks: int) -> int:
            num_low = num_chunks if most_low is None else min(num_chunks, most_low)
            kept = (num_low, config.low_ratio), (num_chunks - num_low, config.high_ratio)
            return num_prefix + sum(number * num_kept(chunk, ratio) for number, ratio in kept)

        last = memory(num_before) + end + 1  # for a token that a family may put behind a video
        return max(last, memory(num_before - 1) + chunk) if num_before else last


class OnePassPrefill:
    """A chunk's pass runs over the compressed memory of the chunks before it, and over its own tokens uncompressed."""

    def __init__(self, model: OnePassModel, mode: str) -> None:
        self._model = model
        prefix = model.prefix()
        self._memory = KVCache(prefix, model.rope, capacity=2 * prefix.num_tokens)
        self._memory.append(prefix)
        self._start = self._memory.next_position
        self._recent = Recent(num_low_in_memory(mode))

    @torch.inference_mode()
    def append(self, features: VisualTokens, *, last: bool) -> tuple[ChunkKV, ChunkKV]:
        """See :meth:`server.models.base.Prefill.append`."""
        config = self._model.compression
        raw, others = self._read(features, last)
        kept = both_levels(COMPRESSORS[config.compressor], raw, config.low_ratio, config.high_ratio)
        low, high = (part.kv if others is None else part.kv.followed_by(others) for part in kept)
        self._recent.append_to(self._memory, low, high)
        return low, high

    @torch.inference_mode()
    def append_raw(self, features: VisualTokens, *, last: bool) -> RawChunk:
        """The same without compression: all that follows sees the chunk as it is.

        Raises PositionLimitError, and TypeError where other tokens stand among the visual ones.
        """
        raw, others = self._read(features, last)
        if others is not None:
            raise TypeError(
                f"{self._model.spec.name} puts text among a chunk's visual tokens: they cannot be kept alone"
            )
        self._memory.append(raw.kv)
        return raw

    @torch.inference_mode()
    def restore(self, num_visual_tokens: int, low: ChunkKV, high: ChunkKV) -> None:
        """See :meth:`server.models.base.Prefill.restore`."""
        self._recent.append_to(self._memory, low, high)

    def _read(self, tokens: VisualTokens, last: bool) -> tuple[RawChunk, ChunkKV | None]:
        """The next chunk's own KVs, those of its visual tokens and of the others. Raises PositionLimitError."""
        model, memory = self._model, self._memory
        layout = model.vision.lay_out(tokens, self._start, memory.next_position, last=last)
        window, visual = _arrange(tokens, layout, memory)
        positions = layout.positions
        if positions is None:
            start = memory.next_position
            positions = torch.arange(start, start + len(window.embeddings), device=model.device)
        if int(positions.max()) >= model.spec.max_positions:
            raise PositionLimitError(
                f"the video needs more than the {model.spec.max_positions} positions of {model.spec.name}"
            )
        _, projected = model.decoder([window])
        kv = stack(projected, None, "low", 1)
        if layout.positions is not None:
            kv = replace(kv, positions=positions.to(torch.int32)[:, None, None], next_position=layout.next_position)
        asking = visual.nonzero()[-_NUM_QUERIES:, 0]
        raw = RawChunk(
            kv=kv.take(visual),
            positions=positions[..., visual],
            queries=torch.stack([queries[:, asking] for queries, _, _ in projected]),
            query_positions=positions[..., asking],
            rope=model.rope,
            tokens_per_frame=tokens.rows * tokens.columns,
        )
        return raw, kv.take(~visual) if layout.others is not None else None


def _arrange(tokens: VisualTokens, layout: Layout, memory: KVCache) -> tuple[Window, Tensor]:
    """What the model reads of a chunk, and which of it is visual: bool [tokens]."""
    features, is_visual = tokens.features, layout.is_visual
    if is_visual is None or layout.others is None:
        window = Window(features, memory, positions=layout.positions, deep=tokens.deep)
        return window, torch.ones(len(features), dtype=torch.bool, device=features.device)
    embeddings = features.new_empty((len(is_visual), features.shape[1]))
    embeddings[is_visual], embeddings[~is_visual] = features, layout.others.to(features.dtype)
    deep = None
    if tokens.deep is not None:
        deep = features.new_zeros((len(tokens.deep), *embeddings.shape))
        deep[:, is_visual] = tokens.deep
    return Window(embeddings, memory, positions=layout.positions, deep=deep), is_visual
