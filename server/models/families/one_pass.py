"""Bi-level KVs without training: one pass over a chunk's visual tokens, whose KVs are compressed twice."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

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
from server.models.base import ModelSpec, PositionLimitError, check_ratios
from server.models.device import indices, to_device
from server.models.lm.decoder import LanguageModel, Window
from server.models.lm.decoder_model import DecoderModel, PromptConfig, stack
from server.models.memory import CHEAPER, Memory, Past, longest_videos, room_to_ask
from server.models.slices import Slices, whole
from server.video.frames import Frames

_MOST_FRAMES = 10_000_000
"""Where the limit is never met, this is long enough."""
_NUM_QUERIES = 16
"""Of a chunk's last tokens, for the compressors that look at what these attend to."""


@dataclass(frozen=True, slots=True)
class OnePassConfig:
    """How a chunk's KVs become its L-KV and its H-KV.

    The defaults are measured (tests/benchmarks/results/quality-qwen2_5-vl.json): a model that was not trained for it
    loses a fifth to a half of its answers with every second token, so what is detailed is not compressed at all.
    ``compressor`` is one of :data:`compression.methods.COMPRESSORS`; ``prefill_mode`` tells what a chunk's pass sees of
    the chunks before it (server.models.memory). Raises ValueError for a name that does not exist, and for a low ratio
    above the high one.
    """

    low_ratio: int = 1
    high_ratio: int = 16
    compressor: str = "stride"
    prefill_mode: str = "exact"

    def __post_init__(self) -> None:
        Past.of(self.prefill_mode)
        if self.compressor not in COMPRESSORS:
            raise ValueError(f"compressor must be one of {', '.join(COMPRESSORS)}, not {self.compressor!r}")
        check_ratios(self.low_ratio, self.high_ratio)


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """A chunk's or an image's visual tokens: ``features`` [steps * rows * columns, hidden], row-major.

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
    """What the model reads of a chunk or an image, and where it stands.

    Where other tokens stand among the visual ones, ``is_visual`` [tokens] tells which is which and ``others``
    [n, hidden] are the embeddings of the former, which are never compressed. ``positions`` is int64 [axes, tokens], and
    what follows goes on at ``next_position``; None: one token behind the other, the others behind the visual ones.
    All but ``others`` lies on the CPU.
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

    def see(self, pixels: Tensor, times_s: NDArray[np.float64]) -> Slices[VisualTokens]:
        """Preprocessed frames of one chunk, on the model's device."""

    def num_tokens(self, num_frames: int, width: int, height: int) -> int:
        """See :meth:`server.models.base.VideoModel.num_visual_tokens`."""

    def num_positions(self, num_frames: int, width: int, height: int, fps: float) -> int | None:
        """Positions that a whole video takes, or a little more; None: contiguous, so those of its KV tokens."""

    def lay_out(self, tokens: VisualTokens, start: int, next_position: int, *, last: bool) -> Layout:
        """``start`` is the position of the video's first token, ``next_position`` the one behind the chunks before;
        ``last`` tells that no chunk follows."""

    def preprocess_image(self, frame: Frames, *, alone: bool) -> Any:
        """See :meth:`server.models.base.VideoModel.preprocess_image`."""

    def num_image_tokens(self, image: Any) -> int:
        """See :meth:`server.models.base.VideoModel.num_image_tokens`: with all that stands around it."""

    def see_image(self, image: Any) -> VisualTokens:
        """A preprocessed image."""

    def lay_out_image(self, tokens: VisualTokens, next_position: int) -> Layout:
        """What the model reads of an image whose first token stands at ``next_position``."""


class OnePassModel(DecoderModel):
    """A model of transformers' own classes, or any other whose layers :class:`LanguageModel` can run."""

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
        self.fingerprint = self._fingerprint(spec, compression, CHEAPER, prompt, self.dtype, self.rope, vision.settings)

    def preprocess(self, frames: Frames) -> Tensor:
        return self.vision.preprocess(frames)

    @torch.inference_mode()
    def encoding(self, pixels: Tensor, times_s: NDArray[np.float64]) -> Slices[VisualTokens]:
        return (yield from self.vision.see(pixels, times_s))

    def num_visual_tokens(self, num_frames: int, width: int, height: int) -> int:
        return self.vision.num_tokens(num_frames, width, height)

    def preprocess_image(self, frame: Frames, *, alone: bool) -> Any:
        return self.vision.preprocess_image(frame, alone=alone)

    def num_image_tokens(self, image: Any) -> int:
        return self.vision.num_image_tokens(image)

    @torch.inference_mode()
    def encode_image(self, image: Any) -> VisualTokens:
        return self.vision.see_image(image)

    def prefill_modes(self, width: int, height: int, fps: float) -> tuple[tuple[str, int], ...]:
        def longest(mode: str) -> int:
            peaks = partial(self._num_positions, Past.of(mode), width=width, height=height, fps=fps)
            return bisect_right(range(_MOST_FRAMES), self.spec.max_positions, lo=1, key=peaks) - 1

        return longest_videos(self.prefill_mode, longest)

    def prefill(self, mode: str | None = None, num_chunks: int = 0) -> OnePassPrefill:
        return OnePassPrefill(self, mode or self.prefill_mode, num_chunks)

    def num_remembered(self, mode: str, num_visual: int, num_chunks: int) -> int:
        config = self.compression
        return Past.of(mode).num_tokens(num_visual, num_chunks, config.low_ratio, config.high_ratio)

    def _image_window(self, image: VisualTokens, cache: KVCache) -> Window:
        return _arrange(image, self.vision.lay_out_image(image, cache.next_position), cache)[0]

    def _num_positions(self, past: Past, num_frames: int, *, width: int, height: int, fps: float) -> int:
        """Positions that so many frames need, at least one, for their prefill and for a question about them; it never
        falls as they grow more."""
        num_prefix, size, config = len(self.prompt.prefix_ids), self.spec.frames_per_chunk, self.compression
        taken = self.vision.num_positions(num_frames, width, height, fps)
        room = room_to_ask(self.spec.max_positions)
        if taken is not None:
            return num_prefix + taken + room
        num_before = (num_frames - 1) // size
        chunk, end = (self.num_visual_tokens(n, width, height) for n in (size, num_frames - num_before * size))
        low, high = num_kept(chunk, config.low_ratio), num_kept(chunk, config.high_ratio)

        def memory(num_chunks: int) -> int:
            num_low, num_high = past.seen(num_chunks)
            return num_prefix + num_low * low + num_high * high

        # One more for a token that a family may put behind a video.
        last = memory(num_before) + end + 1
        asking = num_prefix + num_before * high + num_kept(end, config.high_ratio) + 1 + room
        return max(last, asking, memory(num_before - 1) + chunk if num_before else 0)


class OnePassPrefill:
    """A chunk's pass runs over the compressed memory of the chunks before it, and over its own tokens uncompressed."""

    def __init__(self, model: OnePassModel, mode: str, num_chunks: int = 0) -> None:
        self._model = model
        prefix, past = model.prefix(), Past.of(mode)
        cache = KVCache(prefix, model.rope, capacity=2 * prefix.num_tokens)
        cache.append(prefix)
        self._start = cache.next_position
        self._memory = Memory(cache, past)
        self._expected = num_chunks if past.num_low is None else 0
        """Chunks whose L-KVs there is to be room for."""

    def append(self, features: VisualTokens, *, last: bool) -> tuple[ChunkKV, ChunkKV]:
        """See :meth:`server.models.base.Prefill.append`."""
        return whole(self.appending(features, last=last))

    @torch.inference_mode()
    def appending(self, features: VisualTokens, *, last: bool) -> Slices[tuple[ChunkKV, ChunkKV]]:
        """See :meth:`server.models.base.Prefill.appending`."""
        config = self._model.compression
        raw = yield from self._read(features, last)
        yield
        kept = both_levels(COMPRESSORS[config.compressor], raw, config.low_ratio, config.high_ratio)
        low, high = (raw.with_others(part.kv) for part in kept)
        self._remember(low, high)
        return low, high

    @torch.inference_mode()
    def append_raw(self, features: VisualTokens, *, last: bool) -> RawChunk:
        """The same without compression: all that follows sees the chunk as it is. Raises PositionLimitError."""
        raw = whole(self._read(features, last))
        kept = raw.with_others(raw.kv)
        self._memory.append(kept, kept)
        return raw

    @torch.inference_mode()
    def restore(self, num_visual_tokens: int, low: ChunkKV, high: ChunkKV) -> None:
        """See :meth:`server.models.base.Prefill.restore`."""
        self._remember(low, high)

    def _remember(self, low: ChunkKV, high: ChunkKV) -> None:
        # To make room for an hour's KVs bit by bit is to hold most of them twice for a while.
        if self._expected:
            self._memory.cache.reserve((self._expected + self._model.compression.low_ratio) * low.num_tokens)
            self._expected = 0
        self._memory.append(low, high)

    def _read(self, tokens: VisualTokens, last: bool) -> Slices[RawChunk]:
        """The next chunk's own KVs. Raises PositionLimitError."""
        model, memory = self._model, self._memory.cache
        layout = model.vision.lay_out(tokens, self._start, memory.next_position, last=last)
        window, is_visual = _arrange(tokens, layout, memory)
        positions = layout.positions
        if positions is None:
            positions = torch.arange(len(is_visual)) + memory.next_position
        if int(positions.max()) >= model.spec.max_positions:
            raise PositionLimitError(
                f"the video needs more than the {model.spec.max_positions} positions of {model.spec.name}"
            )
        projected = yield from model.decoder.slices([window])
        kv = stack(projected, None, "low", 1)
        positions = to_device(positions, model.device)
        if layout.positions is not None:
            kv = replace(kv, positions=positions.to(torch.int32)[:, None, None], next_position=layout.next_position)
        visual = indices(is_visual, model.device)
        asking = visual[-_NUM_QUERIES:]
        return RawChunk(
            kv=kv.take(visual),
            positions=positions[..., visual],
            queries=torch.stack([queries[:, asking] for queries, _, _ in projected]),
            query_positions=positions[..., asking],
            rope=model.rope,
            tokens_per_frame=tokens.rows * tokens.columns,
            others=kv.take(indices(~is_visual, model.device)) if layout.others is not None else None,
        )


def _arrange(tokens: VisualTokens, layout: Layout, cache: KVCache) -> tuple[Window, Tensor]:
    """What the model reads of a chunk or an image, and which of it is visual: bool [tokens] on the CPU."""
    features, is_visual, device = tokens.features, layout.is_visual, tokens.features.device
    positions = None if layout.positions is None else to_device(layout.positions, device)
    placed = partial(Window, cache=cache, positions=positions, next_position=layout.next_position)
    if is_visual is None or layout.others is None:
        return placed(features, deep=tokens.deep), torch.ones(len(features), dtype=torch.bool)
    embeddings = features.new_empty((len(is_visual), features.shape[1]))
    visual, others = indices(is_visual, device), indices(~is_visual, device)
    embeddings[visual], embeddings[others] = features, layout.others.to(features.dtype)
    deep = None
    if tokens.deep is not None:
        deep = features.new_zeros((len(tokens.deep), *embeddings.shape))
        deep[:, visual] = tokens.deep
    return placed(embeddings, deep=deep), is_visual
