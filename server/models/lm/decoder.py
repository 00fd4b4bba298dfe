"""The pass of a language model over windows and caches, and Video-XL's own: a Qwen2 decoder in which VSTs have their
own query, key and value projections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from compression.cache import KVCache
from compression.rope import Rope
from server.models.device import indices
from server.models.lm.segment_attention import attention_over
from server.models.slices import Slices, whole

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The language model's part of a checkpoint's ``config.json``, under its names there.

    ``head_dim``, ``rotary_dim``, ``qk_norm`` and ``attention_bias`` are the bundled model's deviations from Qwen2.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    head_dim: int = 0
    rotary_dim: int = 0
    qk_norm: bool = False
    attention_bias: bool = True

    @classmethod
    def of(cls, config: dict[str, Any]) -> Self:
        """Reads ``config.json``; fields of other parts are left alone."""
        known = {field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None}
        known.setdefault("head_dim", known["hidden_size"] // known["num_attention_heads"])
        known.setdefault("rotary_dim", known["head_dim"])
        return cls(**known)

    @property
    def rope(self) -> Rope:
        return Rope(self.rotary_dim, self.rope_theta)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the VSTs of a pass stand, and where all ``others``: int64 indices of its tokens.

    A mask would do, but a GPU has to be waited for whenever the number of what it marks is needed.
    """

    vsts: Tensor
    others: Tensor

    @classmethod
    def of(cls, is_vst: Tensor, device: torch.device) -> Self:
        """From a mask [tokens] on the CPU."""
        return cls(indices(is_vst, device), indices(~is_vst, device))


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 (as Qwen2 does)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * functional.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with plain projections for text and visual tokens and ``beacon_*`` ones for VSTs."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.beacon_q_proj = nn.Linear(hidden, queries, bias=bias)
        self.beacon_k_proj = nn.Linear(hidden, keys, bias=bias)
        self.beacon_v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        norm = config.qk_norm
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if norm else nn.Identity()

    def plain(self, x: Tensor) -> QKV:
        """``[..., tokens, hidden]`` -> queries, keys, values ``[..., heads, tokens, head_dim]`` before RoPE."""
        return self._heads(self.q_proj(x), self.k_proj(x), self.v_proj(x))

    def summary(self, x: Tensor) -> QKV:
        """The same for VSTs."""
        return self._heads(self.beacon_q_proj(x), self.beacon_k_proj(x), self.beacon_v_proj(x))

    def project(self, x: Tensor, places: Places | None) -> QKV:
        """A window ``[tokens, hidden]`` with VSTs at ``places``; None where there are none."""
        if places is None:
            return self.plain(x)
        merged = []
        for plain, summary in zip(self.plain(x[places.others]), self.summary(x[places.vsts]), strict=True):
            whole = plain.new_empty((plain.shape[0], x.shape[0], plain.shape[2]))
            whole.index_copy_(1, places.others, plain)
            whole.index_copy_(1, places.vsts, summary)
            merged.append(whole)
        return merged[0], merged[1], merged[2]

    def _heads(self, queries: Tensor, keys: Tensor, values: Tensor) -> QKV:
        def split(x: Tensor) -> Tensor:
            # Spelt out, because -1 is ambiguous where a short chunk has no VST at all.
            heads = x.shape[-1] // self.config.head_dim
            return x.view(*x.shape[:-1], heads, self.config.head_dim).transpose(-2, -3)

        return self.q_norm(split(queries)), self.k_norm(split(keys)), split(values)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def project(self, x: Tensor, places: Places | None) -> QKV:
        """See :meth:`LayerLike.project`."""
        return self.self_attn.project(self.input_layernorm(x), places)

    def output(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream ``[..., tokens, hidden]`` and attention output ``[..., heads, tokens, head_dim]`` -> next."""
        x = x + self.self_attn.o_proj(attended.transpose(-2, -3).flatten(-2))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LayerLike(Protocol):
    """A pre-norm transformer layer, taken apart where its attention is."""

    def project(self, x: Tensor, places: Places | None) -> QKV:
        """``[tokens, hidden]`` with VSTs at ``places`` -> queries, keys, values ``[heads, tokens, head_dim]`` before
        RoPE."""

    def output(self, x: Tensor, attended: Tensor) -> Tensor:
        """``x`` and the attention output ``[heads, tokens, head_dim]`` -> the next layer's ``x``."""


@dataclass(frozen=True, slots=True)
class Window:
    """One sequence's new tokens: ``embeddings`` [n, hidden], to be seen behind ``cache``.

    They stand at ``positions`` [axes, n], and what follows goes on at ``next_position``; without, they stand behind the
    cache's last one after the other. ``is_vst`` [n] bool, on the CPU, tells which are VSTs. ``deep`` [layers, n,
    hidden] is added to what comes out of the first layers (DeepStack, arXiv 2406.04334).
    """

    embeddings: Tensor
    cache: KVCache
    is_vst: Tensor | None = None
    positions: Tensor | None = None
    next_position: int | None = None
    deep: Tensor | None = None


class LanguageModel(nn.Module, ABC):
    """Token embeddings, layers and a head, and the one pass over them that everything runs through."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    """Of :class:`LayerLike` modules."""
    norm: nn.Module
    """Behind the last layer."""
    rope: Rope

    _fused: Sequence[LayerLike] = ()

    def fuse(self, head_dim: int) -> None:
        """From now on runs in fewer kernels; on a GPU, where Triton is (ImportError). The parameters keep their names
        and values, but share memory with others."""
        from server.models.lm.fused import fused

        self._fused = fused(cast(Sequence[LayerLike], self.layers), head_dim)

    def unfuse(self) -> None:
        """Runs as before :meth:`fuse`."""
        self._fused = ()

    def layer(self, index: int) -> LayerLike:
        """As it runs."""
        return self._fused[index] if self._fused else cast(LayerLike, self.layers[index])

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """[vocab, hidden], tied to the embeddings or not."""

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states ``[..., hidden]`` -> float32 ``[..., vocab]``."""
        return functional.linear(self.norm(x), self.head_weight).float()

    def forward(self, windows: list[Window]) -> tuple[Tensor, list[QKV]]:
        """Runs all windows together, each over its own cache, causally.

        Keys and values are written behind every cache (room is reserved here) but the caches do not advance: the
        caller decides what stays. Returns the hidden states of all windows' tokens ``[tokens, hidden]``, one window
        behind the other, and every layer's queries, keys and values ``[heads, tokens, head_dim]`` before RoPE.
        """
        return whole(self._run(windows, len(self.layers)))

    def slices(self, windows: list[Window], num_layers: int | None = None) -> Slices[list[QKV]]:
        """Queries, keys and values alone, of all layers or of the first few, with pauses between layers and amid them.

        Nothing is computed behind the last one's projections, and its keys and values are written nowhere. Meanwhile
        nobody may use the windows' caches.
        """
        num_whole = len(self.layers[:num_layers]) - 1
        _, projected = yield from self._run(windows, num_whole)
        return projected

    def _run(self, windows: list[Window], num_whole: int) -> Slices[tuple[Tensor, list[QKV]]]:
        """So many whole layers, and the projections of one more where there is one."""
        sizes = [len(window.embeddings) for window in windows]
        x = torch.cat([window.embeddings for window in windows])
        positions = _places(windows, sizes, x.device)
        cos, sin = self.rope.tables(positions, x.dtype)
        seeing = [
            attention_over(window.cache, places, x.dtype)
            for window, places in zip(windows, torch.split(positions, sizes, -1), strict=True)
        ]
        is_vst = _join_masks(windows, sizes)
        places = None if is_vst is None else Places.of(is_vst, x.device)
        for window, size in zip(windows, sizes, strict=True):
            window.cache.reserve(size)
        projected: list[QKV] = []
        for index in range(min(num_whole + 1, len(self.layers))):
            if index:
                yield
            layer = self.layer(index)
            q, k, v = layer.project(x, places)
            projected.append((q, k, v))
            if index == num_whole:
                break
            rotated, k = self.rope.rotate(q, cos, sin), self.rope.rotate(k, cos, sin)
            rows = zip(seeing, *(torch.split(part, sizes, 1) for part in (q, rotated, k, v)), strict=True)
            attended = [see(index, *parts) for see, *parts in rows]
            yield
            x = layer.output(x, torch.cat(attended, dim=1))
            for part, window in zip(torch.split(x, sizes), windows, strict=True):
                if window.deep is not None and index < len(window.deep):
                    part += window.deep[index]
        return x, projected


class Decoder(LanguageModel):
    """Parameters are named as in the public checkpoint, below its ``model.``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = config.rope
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.beacon_embed_tokens = nn.Embedding(1, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def extra_repr(self) -> str:
        """What the KVs depend on besides the weights."""
        return repr(self.config)

    @property
    def head_weight(self) -> Tensor:
        """See :attr:`LanguageModel.head_weight`."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight


def _places(windows: list[Window], sizes: list[int], device: torch.device) -> Tensor:
    """Every token's position: int64 [tokens], or [axes, tokens] where a window brings its own."""
    places = []
    for window, size in zip(windows, sizes, strict=True):
        start = window.cache.next_position
        behind = torch.arange(start, start + size, device=device)
        places.append(behind if window.positions is None else window.positions.to(device))
    axes = [len(place) for place in places if place.ndim == 2]
    return torch.cat([place.expand(axes[0], -1) for place in places] if axes else places, dim=-1)


def _join_masks(windows: list[Window], sizes: list[int]) -> Tensor | None:
    if all(window.is_vst is None for window in windows):
        return None
    rows = zip(windows, sizes, strict=True)
    return torch.cat([torch.zeros(n, dtype=torch.bool) if w.is_vst is None else w.is_vst for w, n in rows])
