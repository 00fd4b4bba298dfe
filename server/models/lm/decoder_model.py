"""What all models have in common that run a decoder over caches: prompts, questions and answers."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from compression.cache import KVCache
from compression.kv import ChunkKV, Level
from compression.mixed import MixedCache
from compression.score import QueryTrace, Scorer
from server.models.base import ModelSpec, Row, StepDecoder, Turn, VideoModel
from server.models.device import indices
from server.models.fingerprint import fingerprint
from server.models.lm.decoder import QKV, LanguageModel, Window
from server.models.slices import whole

if TYPE_CHECKING:
    from server.models.lm.decode import Decoding  # which needs Triton

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """The fixed text before the video, the template of what follows it, and the tokens that end an answer."""

    prefix_ids: tuple[int, ...]
    chat_template: str
    end_ids: frozenset[int]


class DecoderModel(VideoModel):
    """All of a VideoModel but its frames and its prefill."""

    def __init__(
        self,
        spec: ModelSpec,
        decoder: LanguageModel,
        prompt: PromptConfig,
        tokenizer: PreTrainedTokenizerFast | None,
        scorer: Scorer,
        prefill_mode: str,
    ) -> None:
        """Takes a module already on its device and in its dtype. Without ``tokenizer`` it takes token ids only."""
        self.spec = spec
        self.decoder = decoder.eval().requires_grad_(False)
        self.prompt = prompt
        if tokenizer is not None:
            self.tokenizer = tokenizer
        self.scorer = scorer
        self.rope = decoder.rope
        self.device = decoder.embed_tokens.weight.device
        self.dtype = decoder.embed_tokens.weight.dtype
        self.end_ids = prompt.end_ids
        self.prefill_mode = prefill_mode
        self._prefix: ChunkKV | None = None
        self._decoding: Decoding | None = None

    @torch.inference_mode()
    def prefix(self) -> ChunkKV:
        if self._prefix is None:
            ids = torch.tensor(self.prompt.prefix_ids, device=self.device)
            empty = KVCache(self.no_tokens(), self.rope, capacity=len(ids))
            projected = whole(self.decoder.slices([Window(self.decoder.embed_tokens(ids), empty)]))
            self._prefix = stack(projected, None, "prefix", 1)
        return self._prefix

    def tokenize(self, turns: Sequence[Turn], *, behind_media: bool = True) -> list[int]:
        messages = [{"role": turn.role, "content": self._plain(turn.text)} for turn in turns]
        text = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.prompt.chat_template,
            tokenize=False,
            add_generation_prompt=True,
            behind_media=behind_media,
        )
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> Tensor:
        logits = [self._read(part) for part in self._passes(rows)]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _read(self, rows: Sequence[Row]) -> Tensor:
        """One of the passes of :meth:`forward`."""
        if self._decoding is not None and self._takes(rows):
            return self._decoding.read(_prompts(rows))
        windows = [self._window(row) for row in rows]
        hidden, _ = self.decoder(windows)
        sizes = [len(window.embeddings) for window in windows]
        for window, size in zip(windows, sizes, strict=True):
            window.cache.advance(size, window.next_position)
        return self.decoder.logits(hidden[torch.tensor(sizes).cumsum(0) - 1])

    def step_decoder(self, max_rows: int) -> StepDecoder | None:
        spec = self.spec
        if self.device.type != "cuda" or spec.head_dim & (spec.head_dim - 1):
            return None
        try:
            from server.models.lm.decode import Decoding
        except ImportError as error:
            _log.warning("decoding is slow without Triton: %s", error)
            return None
        try:
            decoding = Decoding(
                self.decoder,
                heads=spec.num_heads,
                kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                max_positions=spec.max_positions,
                max_rows=max_rows,
                num_traced=self.scorer.num_layers,
            )
            decoding.warm_up()
        except Exception:  # of a GPU, a driver or a compiler that they do not suit
            _log.exception("decoding is slow: its kernels do not run here")
            self.decoder.unfuse()
            return None
        self._decoding = decoding
        return decoding

    @torch.inference_mode()
    def trace(self, rows: Sequence[Row]) -> list[QueryTrace]:
        queries: list[Tensor] = []
        for part in self._passes(rows):
            if self._decoding is not None and self._takes(part):
                queries += self._decoding.trace(_prompts(part))
            else:
                queries += map(self._queries, part)
        return [QueryTrace(each, row.cache.next_position) for each, row in zip(queries, rows, strict=True)]

    def no_tokens(self) -> ChunkKV:
        """A KV of zero tokens: the shape of this model's caches."""
        spec = self.spec
        shape = (spec.num_layers, spec.num_kv_heads, 0, spec.head_dim)
        empty = torch.empty(shape, dtype=self.dtype, device=self.device)
        return ChunkKV(empty, empty, "prefix", 1)

    def _passes(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Few passes for all rows, in their order: over what the decoder's kernels take together, and over what they do
        not take at all."""
        if self._decoding is None:
            return [list(rows)]
        passes: list[list[Row]] = []
        for row in rows:
            together = [*passes[-1], row] if passes else [row]
            if self._takes(together) or not any(self._takes([one]) for one in together):
                passes[-1:] = [together]
            else:
                passes.append([row])
        return passes

    def _takes(self, rows: Sequence[Row]) -> bool:
        """Whether the decoder's kernels, if they run here, read them best."""
        if self._decoding is None or any(row.image is not None for row in rows):
            return False
        return self._decoding.takes(_prompts(rows))

    def _queries(self, row: Row) -> Tensor:
        """[scored layers, heads, n, head_dim], before RoPE."""
        window = Window(self.decoder.embed_tokens(row.ids), row.cache)
        projected = whole(self.decoder.slices([window], self.scorer.num_layers))
        return torch.stack([queries for queries, _, _ in projected])

    def _window(self, row: Row) -> Window:
        if row.image is not None:
            return self._image_window(row.image, row.cache)
        return Window(self.decoder.embed_tokens(row.ids), row.cache)

    @abstractmethod
    def _image_window(self, image: Any, cache: KVCache) -> Window:
        """An encoded image as the decoder takes it."""

    def _plain(self, text: str) -> str:
        """A client's text may name special tokens, but never makes one."""
        for token in self.tokenizer.added_tokens_decoder.values():
            text = text.replace(str(token), " ")
        return text

    def _fingerprint(self, *settings: object) -> str:
        """Over ``settings``, which must tell all that changes a KV but the weights, and the weights."""
        # A model keeps what it runs as attributes.
        return fingerprint(settings, [part for part in vars(self).values() if isinstance(part, nn.Module)])


def _prompts(rows: Sequence[Row]) -> list[tuple[Tensor, MixedCache]]:
    return [(row.ids, row.cache) for row in rows]


def stack(projected: Sequence[QKV], kept: Tensor | None, level: Level, ratio: int) -> ChunkKV:
    """Every layer's keys and values, of the tokens where ``kept``, on the CPU, is True (None: all of them)."""
    keys, values = (torch.stack([layer[place] for layer in projected]) for place in (1, 2))
    if kept is not None:
        choose = indices(kept, keys.device)
        keys, values = keys.index_select(2, choose), values.index_select(2, choose)
    return ChunkKV(keys, values, level, ratio)
