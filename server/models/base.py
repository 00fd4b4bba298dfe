"""What the engine asks of a model: encode frames, prefill chunks at both levels, answer over mixed caches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from compression.kv import ChunkKV
from compression.mixed import MixedCache
from compression.rope import Rope
from compression.score import QueryTrace, Scorer
from server.models.slices import Slices, whole
from server.models.tensors import CheckpointError
from server.video.frames import Frames

TYPICAL_PIXELS = 1280, 720
"""Of a frame, where it is not known yet."""

Role = Literal["system", "user", "assistant"]


class PositionLimitError(ValueError):
    """A video or a prompt needs more positions than the model was trained for."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One text turn of a conversation. Videos and images stand before all turns (the prefix is fixed per model)."""

    role: Role
    text: str


def check_ratios(low_ratio: int, high_ratio: int) -> None:
    """Raises ValueError, naming the options of ``x2l serve``, unless H-KVs are at most as many as L-KVs."""
    if not 1 <= low_ratio <= high_ratio:
        raise ValueError(
            f"low ratio {low_ratio} must not exceed high ratio {high_ratio} (--low-ratio and --high-ratio; the model's "
            "own where one is not given)"
        )


def check_scorer_heads(heads: Sequence[Sequence[int]], num_layers: int, num_heads: int) -> None:
    """Raises CheckpointError for a (layer, head) pair that a language model does not have."""
    for layer, head in heads:
        if not (0 <= layer < num_layers and 0 <= head < num_heads):
            known = f"{num_layers} layers of {num_heads} heads, counted from 0"
            raise CheckpointError(f"config.json: scorer_heads names [{layer}, {head}], but there are {known}")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the server must know of a model besides its weights."""

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tokens_per_frame: int
    frames_per_chunk: int
    low_ratio: int
    high_ratio: int
    max_positions: int
    max_duration_s: float | None
    """Longest video that the model can tell the time of; None where time is not embedded."""
    fps: float
    default_reload: int
    temperature: float
    """Generation default, used when a request names none; 0 is greedy."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a forward pass: ``ids`` [n] int64 on the model's device, to be appended to ``cache``, or in their
    place an image, as :meth:`VideoModel.encode_image` made it."""

    ids: Tensor
    cache: MixedCache
    image: Any = None


@dataclass(frozen=True, slots=True)
class Draw:
    """How a token is drawn from logits: the likeliest at ``temperature`` 0, otherwise from the softmax of what
    ``top_k`` (0: all) and then ``top_p`` leave, as ``seed`` (int64) and the token's position make it."""

    temperature: float = 0.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def truncated(self) -> bool:
        """Whether some tokens are left out beforehand."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclass(frozen=True, slots=True)
class Step:
    """One sequence of a decoding step: ``token`` is appended to ``cache``, ``draw`` tells how the next one is drawn.

    With a ``source`` it is the token of that row of the step before instead, which need not be known yet.
    """

    token: int
    cache: MixedCache
    draw: Draw = Draw()
    source: int | None = None


class Drawn(Protocol):
    """Tokens of a decoding step that the device has been asked for."""

    def wait(self) -> list[int]:
        """One a row, once they are there."""


class StepDecoder(Protocol):
    """Decodes one token a row by other means than :meth:`VideoModel.forward`, which cost less on a GPU."""

    def step(self, rows: Sequence[Step]) -> Drawn:
        """Asks the device to append every row's token to its cache and to draw the next ones, and does not wait. What
        fails here leaves the caches as they were."""


class Prefill(Protocol):
    """The state of one video's prefill. Nothing of it lives on the model, so an aborted one leaves no trace."""

    def append(self, features: Any, *, last: bool) -> tuple[ChunkKV, ChunkKV]:
        """Compresses the next chunk's visual tokens twice: its L-KV and its H-KV.

        ``features`` are what the same model's ``encode`` made of the chunk. ``last`` tells that no chunk follows (the
        edge rule needs to know). Raises :class:`PositionLimitError`.
        """

    def appending(self, features: Any, *, last: bool) -> Slices[tuple[ChunkKV, ChunkKV]]:
        """:meth:`append` in slices. Nothing else may be asked of this prefill before the last one, nor ever again if
        they are given up."""

    def restore(self, num_visual_tokens: int, low: ChunkKV, high: ChunkKV) -> None:
        """Takes the next chunk as an earlier prefill made it, on the model's device, instead of computing it again.

        What is appended behind it comes out bit for bit as if it had been appended too.
        """


class VideoModel(ABC):
    """A model with both compression levels. All that is not called thread-safe runs on the engine thread."""

    spec: ModelSpec
    rope: Rope
    scorer: Scorer
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    """SHA-256 hex over weights, ratios, prefix, prefill modes and dtype: two models with one make the same KVs."""
    prefill_mode: str
    """What a chunk's prefill sees of the chunks before it; ``exact`` is as the method was published."""
    end_ids: frozenset[int]

    @property
    def token_nbytes(self) -> int:
        """Bytes of a KV token's keys and values on the device."""
        spec = self.spec
        return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * self.dtype.itemsize

    @abstractmethod
    def preprocess(self, frames: Frames) -> Tensor:
        """Frames at any size -> uint8 or float CPU tensor [T, 3, h, w] at the model's input size. Thread-safe."""

    def encode(self, pixels: Tensor, times_s: NDArray) -> Any:  # type: ignore[type-arg]
        """A chunk's preprocessed frames and their times in seconds -> its visual tokens, as the model's own prefill
        takes them (a plain model: [T * tokens_per_frame, hidden])."""
        return whole(self.encoding(pixels, times_s))

    @abstractmethod
    def encoding(self, pixels: Tensor, times_s: NDArray) -> Slices[Any]:  # type: ignore[type-arg]
        """:meth:`encode` in slices."""

    def num_visual_tokens(self, num_frames: int, width: int, height: int) -> int:
        """Visual tokens of a chunk of frames of this size in pixels, before compression."""
        return num_frames * self.spec.tokens_per_frame

    @abstractmethod
    def prefill_modes(self, width: int, height: int, fps: float) -> tuple[tuple[str, int], ...]:
        """``prefill_mode`` and the cheaper ones behind it, each with the most frames that a video of frames of this
        size in pixels, sampled at ``fps``, may have in it before it needs more positions than there are."""

    def preprocess_image(self, frame: Frames, *, alone: bool) -> Any:
        """An image, given as a single frame, at the model's input size, or sizes. ``alone`` tells that a conversation
        has no other, which some models look at more closely. Thread-safe."""
        return self.preprocess(frame)

    def num_image_tokens(self, image: Any) -> int:
        """How many tokens a preprocessed image takes in a prompt, and at most as many positions. Thread-safe."""
        return len(image) * self.spec.tokens_per_frame

    def encode_image(self, image: Any) -> Any:
        """A preprocessed image as :class:`Row` takes it: what a frame at 0 s is, unless the model has its own way."""
        return self.encode(image.to(self.device), np.zeros(len(image)))

    @abstractmethod
    def prefix(self) -> ChunkKV:
        """The KV of the fixed text before the video, at ratio 1 (the "sink")."""

    @abstractmethod
    def prefill(self, mode: str | None = None, num_chunks: int = 0) -> Prefill:
        """Starts the prefill of one video, in one of ``prefill_modes`` (None: ``prefill_mode``). Where it is known that
        it has ``num_chunks``, room for what it remembers of them may be made at once."""

    @abstractmethod
    def num_remembered(self, mode: str, num_visual: int, num_chunks: int) -> int:
        """About as many KV tokens as the prefill of a whole video holds at its end, for ``num_visual`` visual tokens in
        ``num_chunks`` chunks. Thread-safe."""

    @abstractmethod
    def tokenize(self, turns: Sequence[Turn], *, behind_media: bool = True) -> list[int]:
        """The conversation after videos and images (or without any: ``behind_media`` False), up to where the
        assistant's answer begins. Thread-safe."""

    @abstractmethod
    def forward(self, rows: Sequence[Row]) -> Tensor:
        """Appends every row's image and tokens to its cache; float32 logits [rows, vocab] of the rows' last tokens."""

    @property
    def num_parameters(self) -> int:
        """Weights of all modules that it keeps as attributes."""
        modules = (value for value in vars(self).values() if isinstance(value, nn.Module))
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def step_decoder(self, max_rows: int) -> StepDecoder | None:
        """For at most ``max_rows`` rows a step; None where :meth:`forward` is as good."""
        return None

    @abstractmethod
    def trace(self, rows: Sequence[Row]) -> list[QueryTrace]:
        """The queries that every row's tokens would make over its cache, for the scorer; the caches' lengths stay as
        they are (the room behind them is used as scratch)."""
