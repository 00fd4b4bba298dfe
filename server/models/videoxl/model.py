"""Video-XL (arXiv 2409.14485) with Video-X2L's bi-level prefill and mixed caches (arXiv 2506.21184)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from compression.cache import KVCache
from compression.interleave import interleave
from compression.kv import ChunkKV, Level
from compression.score import Scorer
from server.models.base import ModelSpec, PositionLimitError
from server.models.lm.decoder import Decoder, Places, Window
from server.models.lm.decoder_model import DecoderModel, PromptConfig, stack
from server.models.memory import Memory, Past, longest_videos
from server.models.positions import longest_video
from server.models.slices import Slices, whole
from server.models.videoxl.compression_config import CompressionConfig
from server.video.frames import Frames


class FrameEncoder(Protocol):
    """A vision tower with its projector: frames in, visual tokens in the language model's space out."""

    def preprocess(self, frames: Frames) -> Tensor:
        """See :meth:`VideoModel.preprocess`."""

    def see(self, pixels: Tensor, times_s: NDArray[np.float64]) -> Slices[Tensor]:
        """See :meth:`VideoModel.encoding`."""


class VideoXL(DecoderModel):
    """One model class for the public 7B checkpoint and for the bundled tiny one; the encoder makes the difference."""

    decoder: Decoder

    def __init__(
        self,
        spec: ModelSpec,
        decoder: Decoder,
        encoder: FrameEncoder | None,
        compression: CompressionConfig,
        prompt: PromptConfig,
        tokenizer: PreTrainedTokenizerFast | None,
        scorer: Scorer,
    ) -> None:
        """Takes modules already on their device and in their dtype. Without ``encoder`` it takes visual tokens only,
        without ``tokenizer`` token ids only."""
        super().__init__(spec, decoder, prompt, tokenizer, scorer, compression.prefill_mode)
        self.encoder = encoder
        self.compression = compression
        self._modes = self._longest_videos()
        modules = [module.extra_repr() for module in (decoder, encoder) if isinstance(module, nn.Module)]
        # With the modes and their reach, a key stands for one mode: the same video always gets the same.
        self.fingerprint = self._fingerprint(spec, compression, self._modes, prompt, self.dtype, modules)

    def preprocess(self, frames: Frames) -> Tensor:
        return self._encoder().preprocess(frames)

    @torch.inference_mode()
    def encoding(self, pixels: Tensor, times_s: NDArray[np.float64]) -> Slices[Tensor]:
        return (yield from self._encoder().see(pixels, times_s))

    def prefill(self, mode: str | None = None, num_chunks: int = 0) -> VideoXLPrefill:
        # Positions are few, and so is what is remembered: it may grow.
        return VideoXLPrefill(self, mode or self.compression.prefill_mode)

    def num_remembered(self, mode: str, num_visual: int, num_chunks: int) -> int:
        past, ratios = Past.of(mode), (self.compression.low_ratio, self.compression.high_ratio)
        return sum(one.num_tokens(num_visual, num_chunks, *ratios) for one in (past, past.in_high_pass))

    def prefill_modes(self, width: int, height: int, fps: float) -> tuple[tuple[str, int], ...]:
        return self._modes

    def _longest_videos(self) -> tuple[tuple[str, int], ...]:
        def longest(mode: str) -> int:
            compression = replace(self.compression, prefill_mode=mode)
            return longest_video(self.spec, compression, len(self.prompt.prefix_ids))

        return longest_videos(self.prefill_mode, longest)

    def num_image_tokens(self, image: Tensor) -> int:
        """All visual tokens, and a VST behind every ``low_ratio`` of them."""
        num_visual = super().num_image_tokens(image)
        return num_visual if self.compression.low_ratio == 1 else len(self._image_vsts(num_visual))

    def place_vsts(self, features: Tensor, is_vst: Tensor) -> Tensor:
        """Visual tokens ``[n, hidden]`` and VSTs where ``is_vst`` [window], on the CPU, is True -> the window's
        embeddings."""
        window = features.new_empty((len(is_vst), features.shape[1]))
        places = Places.of(is_vst, features.device)
        window.index_copy_(0, places.others, features)
        window[places.vsts] = self.decoder.beacon_embed_tokens.weight[0]
        return window

    def _image_window(self, image: Tensor, cache: KVCache) -> Window:
        if self.compression.low_ratio == 1:
            return Window(image, cache)
        # Nothing of an image is compressed away. VSTs stand among its visual tokens all the same: a model that has
        # only ever answered from VSTs cannot read plain ones (the bundled one does not even notice them).
        is_vst = self._image_vsts(len(image))
        return Window(self.place_vsts(image, is_vst), cache, is_vst)

    def _image_vsts(self, num_visual: int) -> Tensor:
        return interleave(num_visual, self.compression.low_ratio, 0, close=True)[0]

    def _encoder(self) -> FrameEncoder:
        if self.encoder is None:
            raise RuntimeError(f"{self.spec.name} was built without a vision tower")
        return self.encoder


class VideoXLPrefill:
    """Both passes over one video: the L pass sees L memory, the H pass H memory (Video-X2L, section 3).

    In other prefill modes than ``exact`` the L pass sees H-KVs of the chunks further back; where these are forgotten,
    in both passes.
    """

    def __init__(self, model: VideoXL, mode: str) -> None:
        self._model = model
        self._compression = replace(model.compression, prefill_mode=mode)
        prefix = model.prefix()
        cache = KVCache(prefix, model.rope, capacity=2 * prefix.num_tokens)
        cache.append(prefix)
        self._low = self._high = _Pass(Memory(cache, self._compression.past))
        self._num_chunks = 0

    def append(self, features: Tensor, *, last: bool) -> tuple[ChunkKV, ChunkKV]:
        """See :meth:`server.models.base.Prefill.append`."""
        return whole(self.appending(features, last=last))

    @torch.inference_mode()
    def appending(self, features: Tensor, *, last: bool) -> Slices[tuple[ChunkKV, ChunkKV]]:
        """See :meth:`server.models.base.Prefill.appending`."""
        low_ratio, high_ratio = self._compression.ratios(first=self._num_chunks == 0, last=last)
        self._begin_chunk(low_ratio, high_ratio)
        low = yield from self._compress(self._low, features, low_ratio, "low")
        yield
        if self._high is self._low:
            high = replace(low, level="high")
        else:
            high = yield from self._compress(self._high, features, high_ratio, "high")
            yield
        self._remember(low, high)
        return low, high

    @torch.inference_mode()
    def restore(self, num_visual_tokens: int, low: ChunkKV, high: ChunkKV) -> None:
        """See :meth:`server.models.base.Prefill.restore`."""
        self._begin_chunk(low.ratio, high.ratio)
        self._place_vsts(self._low, num_visual_tokens, low.ratio)
        if self._high is not self._low:
            self._place_vsts(self._high, num_visual_tokens, high.ratio)
        self._remember(low, high)

    def _begin_chunk(self, low_ratio: int, high_ratio: int) -> None:
        # As long as both passes have had the same ratios their memories are one: the first chunk under the edge
        # rule, or the whole video where both levels are set alike.
        if self._high is self._low and low_ratio != high_ratio:
            memory = self._low.memory.fork(self._compression.past.in_high_pass)
            self._high = _Pass(memory, self._low.carry)
        self._num_chunks += 1

    def _remember(self, low: ChunkKV, high: ChunkKV) -> None:
        self._low.memory.append(low, high)
        if self._high is not self._low:
            self._high.memory.append(low, high)

    def _place_vsts(self, state: _Pass, num_visual_tokens: int, ratio: int) -> Tensor | None:
        """Where the VSTs stand in the next window; None where every token stays."""
        if ratio == 1:
            return None
        reset = self._compression.carry == "reset"
        is_vst, state.carry = interleave(num_visual_tokens, ratio, state.carry, close=reset)
        return is_vst

    def _compress(self, state: _Pass, features: Tensor, ratio: int, level: Level) -> Slices[ChunkKV]:
        model = self._model
        window, is_vst = features, self._place_vsts(state, len(features), ratio)
        if is_vst is not None:
            window = model.place_vsts(features, is_vst)
        if state.memory.cache.length + len(window) > model.spec.max_positions:
            raise PositionLimitError(
                f"the video needs more than the {model.spec.max_positions} positions of {model.spec.name}"
            )
        projected = yield from model.decoder.slices([Window(window, state.memory.cache, is_vst)])
        yield
        return stack(projected, is_vst, level, ratio)


@dataclass(slots=True)
class _Pass:
    """One pass: what later chunks see, and the visual tokens not yet counted towards a VST."""

    memory: Memory
    carry: int = 0
