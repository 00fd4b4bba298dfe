"""Video-XL (arXiv 2409.14485) with Video-X2L's bi-level prefill and mixed caches (arXiv 2506.21184)."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from compression.cache import KVCache
from compression.interleave import interleave
from compression.kv import ChunkKV, Level
from compression.mixed import MixedCache
from compression.score import QueryTrace, Scorer
from server.models.base import ModelSpec, PositionLimitError, Row, Turn, VideoModel
from server.models.decoder import QKV, Decoder, Window
from server.video.frames import Frames


class FrameEncoder(Protocol):
    """A vision tower with its projector: frames in, visual tokens in the language model's space out."""

    def preprocess(self, frames: Frames) -> Tensor:
        """See :meth:`VideoModel.preprocess`."""

    def __call__(self, pixels: Tensor, times_s: NDArray[np.float64]) -> Tensor:
        """See :meth:`VideoModel.encode`."""


@dataclass(frozen=True, slots=True)
class CompressionConfig:
    """How visual tokens become VSTs (Video-X2L, section 2).

    ``edge_ratio`` is the ratio of the first and the last chunk at BOTH levels (2 in Video-X2L; None: no edge rule, as
    in Video-XL). ``carry`` tells whether visual tokens behind a chunk's last VST count towards the next chunk's first.
    ``prefill_mode`` tells what a chunk's L pass sees of the chunks before it: ``exact`` is their L-KVs, as published;
    ``high-memory`` their H-KVs, as an answer sees them, which keeps the L pass cheap however long the video is;
    ``recent-N`` the L-KVs of the last N and the H-KVs of the others. Raises ValueError for another name.
    """

    low_ratio: int = 2
    high_ratio: int = 32
    edge_ratio: int | None = 2
    carry: Literal["across", "reset"] = "across"
    prefill_mode: str = "exact"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"exact|high-memory|recent-[1-9]\d*", self.prefill_mode):
            raise ValueError(f"prefill_mode must be exact, high-memory or recent-N, not {self.prefill_mode!r}")

    @property
    def low_memory(self) -> int | None:
        """How many of the last chunks the L pass sees as L-KVs; None is all."""
        if self.prefill_mode == "exact":
            return None
        return int(self.prefill_mode.removeprefix("recent-")) if self.prefill_mode != "high-memory" else 0


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """The fixed text before the video, the template of what follows it, and the tokens that end an answer."""

    prefix_ids: tuple[int, ...]
    chat_template: str
    end_ids: frozenset[int]


class VideoXL(VideoModel):
    """One model class for the public 7B checkpoint and for the bundled tiny one; the encoder makes the difference."""

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
        self.spec = spec
        self.decoder = decoder.eval().requires_grad_(False)
        self.encoder = encoder
        self.compression = compression
        self.prompt = prompt
        if tokenizer is not None:
            self.tokenizer = tokenizer
        self.scorer = scorer
        self.rope = decoder.config.rope
        self.device = decoder.embed_tokens.weight.device
        self.dtype = decoder.embed_tokens.weight.dtype
        self.end_ids = prompt.end_ids
        self.prefill_mode = compression.prefill_mode
        self.fingerprint = self._fingerprint()
        self._prefix: ChunkKV | None = None

    def preprocess(self, frames: Frames) -> Tensor:
        return self._encoder().preprocess(frames)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, times_s: NDArray[np.float64]) -> Tensor:
        return self._encoder()(pixels, times_s)

    @torch.inference_mode()
    def prefix(self) -> ChunkKV:
        if self._prefix is None:
            ids = torch.tensor(self.prompt.prefix_ids, device=self.device)
            empty = KVCache(self.no_tokens(), self.rope, capacity=len(ids))
            _, projected = self.decoder([Window(self.decoder.embed_tokens(ids), empty)])
            self._prefix = _stack(projected, None, "prefix", 1)
        return self._prefix

    def prefill(self) -> VideoXLPrefill:
        return VideoXLPrefill(self)

    def tokenize(self, turns: Sequence[Turn]) -> list[int]:
        messages = [{"role": turn.role, "content": self._plain(turn.text)} for turn in turns]
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.prompt.chat_template, tokenize=False, add_generation_prompt=True
        )
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> Tensor:
        windows = [self._window(row) for row in rows]
        hidden, _ = self.decoder(windows)
        sizes = [len(window.embeddings) for window in windows]
        for row, size in zip(rows, sizes, strict=True):
            row.cache.advance(size)
        return self.decoder.logits(hidden[torch.tensor(sizes).cumsum(0) - 1])

    @torch.inference_mode()
    def trace(self, ids: Tensor, cache: MixedCache) -> QueryTrace:
        window = Window(self.decoder.embed_tokens(ids), cache)
        _, projected = self.decoder([window], self.scorer.num_layers)
        return QueryTrace(torch.stack([queries for queries, _, _ in projected]), cache.length)

    def no_tokens(self) -> ChunkKV:
        """A KV of zero tokens: the shape of this model's caches."""
        spec = self.spec
        shape = (spec.num_layers, spec.num_kv_heads, 0, spec.head_dim)
        empty = torch.empty(shape, dtype=self.dtype, device=self.device)
        return ChunkKV(empty, empty, "prefix", 1)

    def num_image_tokens(self, pixels: Tensor) -> int:
        """All visual tokens, and a VST behind every ``low_ratio`` of them."""
        num_visual = super().num_image_tokens(pixels)
        return num_visual if self.compression.low_ratio == 1 else len(self._image_vsts(num_visual))

    def place_vsts(self, features: Tensor, is_vst: Tensor) -> Tensor:
        """Visual tokens ``[n, hidden]`` and VSTs where ``is_vst`` [window] is True -> the window's embeddings."""
        window = features.new_empty((len(is_vst), features.shape[1]))
        window[~is_vst] = features
        window[is_vst] = self.decoder.beacon_embed_tokens.weight[0]
        return window

    def _window(self, row: Row) -> Window:
        embeddings: Tensor = self.decoder.embed_tokens(row.ids)
        if row.image is None:
            return Window(embeddings, row.cache)
        if self.compression.low_ratio == 1:
            return Window(torch.cat([row.image, embeddings]), row.cache)
        # Nothing of an image is compressed away. VSTs stand among its visual tokens all the same: a model that has
        # only ever answered from VSTs cannot read plain ones (the bundled one does not even notice them).
        is_vst = self._image_vsts(len(row.image)).to(row.image.device)
        image = self.place_vsts(row.image, is_vst)
        return Window(
            torch.cat([image, embeddings]), row.cache, torch.nn.functional.pad(is_vst, (0, len(row.ids)), value=False)
        )

    def _image_vsts(self, num_visual: int) -> Tensor:
        return interleave(num_visual, self.compression.low_ratio, 0, close=True)[0]

    def _plain(self, text: str) -> str:
        """A client's text may name special tokens, but never makes one."""
        for token in self.tokenizer.added_tokens_decoder.values():
            text = text.replace(str(token), " ")
        return text

    def _encoder(self) -> FrameEncoder:
        if self.encoder is None:
            raise RuntimeError(f"{self.spec.name} was built without a vision tower")
        return self.encoder

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.spec, self.compression, self.prompt, self.dtype)).encode())
        for module in (self.decoder, self.encoder):
            if isinstance(module, nn.Module):
                for name, tensor in sorted(module.state_dict().items()):
                    digest.update(name.encode())
                    digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class VideoXLPrefill:
    """Both passes over one video: the L pass sees L memory, the H pass H memory (Video-X2L, section 3).

    In other prefill modes than ``exact`` the L pass sees H-KVs of the chunks further back.
    """

    def __init__(self, model: VideoXL) -> None:
        self._model = model
        prefix = model.prefix()
        memory = KVCache(prefix, model.rope, capacity=2 * prefix.num_tokens)
        memory.append(prefix)
        self._low = self._high = _Pass(memory)
        self._recent: deque[tuple[ChunkKV, ChunkKV]] = deque()
        """L-KV and H-KV of the last chunks in the L pass's memory that are to be replaced there later."""
        self._num_chunks = 0

    @torch.inference_mode()
    def append(self, features: Tensor, *, last: bool) -> tuple[ChunkKV, ChunkKV]:
        """See :meth:`server.models.base.Prefill.append`."""
        compression = self._model.compression
        low_ratio, high_ratio = compression.low_ratio, compression.high_ratio
        if compression.edge_ratio is not None and (last or self._num_chunks == 0):
            low_ratio = high_ratio = compression.edge_ratio
        self._begin_chunk(low_ratio, high_ratio)
        low = self._compress(self._low, features, low_ratio, "low")
        one = self._high is self._low
        high = replace(low, level="high") if one else self._compress(self._high, features, high_ratio, "high")
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
            self._high = _Pass(self._low.memory.copy(), self._low.carry)
        self._num_chunks += 1

    def _remember(self, low: ChunkKV, high: ChunkKV) -> None:
        memory, most = self._low.memory, self._model.compression.low_memory
        memory.append(low)
        if self._high is self._low:
            return
        self._high.memory.append(high)
        if most is None:
            return
        self._recent.append((low, high))
        if len(self._recent) > most:
            # All that stands behind the chunk that changes its level moves.
            memory.length -= sum(recent.num_tokens for recent, _ in self._recent)
            memory.append(self._recent.popleft()[1])
            for recent, _ in self._recent:
                memory.append(recent)

    def _place_vsts(self, state: _Pass, num_visual_tokens: int, ratio: int) -> Tensor | None:
        """Where the VSTs stand in the next window; None where every token stays."""
        if ratio == 1:
            return None
        reset = self._model.compression.carry == "reset"
        is_vst, state.carry = interleave(num_visual_tokens, ratio, state.carry, close=reset)
        return is_vst

    def _compress(self, state: _Pass, features: Tensor, ratio: int, level: Level) -> ChunkKV:
        model = self._model
        window, is_vst = features, self._place_vsts(state, len(features), ratio)
        if is_vst is not None:
            is_vst = is_vst.to(features.device)
            window = model.place_vsts(features, is_vst)
        if state.memory.length + len(window) > model.spec.max_positions:
            raise PositionLimitError(
                f"the video needs more than the {model.spec.max_positions} positions of {model.spec.name}"
            )
        _, projected = model.decoder([Window(window, state.memory, is_vst)])
        return _stack(projected, is_vst, level, ratio)


@dataclass(slots=True)
class _Pass:
    """One pass: what later chunks see, and the visual tokens not yet counted towards a VST."""

    memory: KVCache
    carry: int = 0


def _stack(projected: Sequence[QKV], kept: Tensor | None, level: Level, ratio: int) -> ChunkKV:
    """Every layer's keys and values, of the tokens where ``kept`` is True (None: all of them)."""
    choose = slice(None) if kept is None else kept
    keys = torch.stack([k[:, choose] for _, k, _ in projected])
    values = torch.stack([v[:, choose] for _, _, v in projected])
    return ChunkKV(keys, values, level, ratio)


def read_compression(config: dict[str, Any]) -> CompressionConfig:
    """The compression part of ``config.json``; what it leaves open is Video-X2L's published setting."""
    default = CompressionConfig()
    return CompressionConfig(
        low_ratio=config.get("low_cmpr_ratio", default.low_ratio),
        high_ratio=config.get("high_cmpr_ratio", default.high_ratio),
        edge_ratio=config.get("edge_ratio", default.edge_ratio),
        carry=config.get("carry", default.carry),
        prefill_mode=config.get("prefill_mode", default.prefill_mode),
    )
