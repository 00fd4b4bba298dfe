"""The language models of transformers' own classes, layer by layer, in this server's pass over windows and caches."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from compression.rope import Rope
from server.models.lm.decoder import QKV, LanguageModel, Places


class TransformersDecoder(LanguageModel):
    """A text model of the Qwen2 or Qwen3 kind (Llama's layout) with the head that its generating class puts on it.

    The modules are transformers' own; nothing is copied.
    """

    def __init__(self, text_model: nn.Module, head: nn.Linear, rope: Rope) -> None:
        """Raises ValueError for sliding windows, which this pass does not have."""
        super().__init__()
        config: Any = text_model.config
        if "sliding_attention" in getattr(config, "layer_types", ()):
            raise ValueError("sliding-window attention is not supported")
        self.rope = rope
        parts: Any = text_model
        self.embed_tokens = parts.embed_tokens
        self.layers = nn.ModuleList(TransformersLayer(layer) for layer in parts.layers)
        self.norm = parts.norm
        self.head = head

    @property
    def head_weight(self) -> Tensor:
        """See :attr:`LanguageModel.head_weight`."""
        return self.head.weight


class TransformersLayer(nn.Module):
    """One decoder layer: input_layernorm, self_attn.{q,k,v,o}_proj, q_norm and k_norm if there are, the rest."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def project(self, x: Tensor, places: Places | None) -> QKV:
        """See :meth:`server.models.lm.decoder.LayerLike.project`; there are no VSTs."""
        layer: Any = self.layer
        attention, x = layer.self_attn, layer.input_layernorm(x)

        def split(projected: Tensor, norm: Any = None) -> Tensor:
            heads = projected.view(*projected.shape[:-1], -1, attention.head_dim)
            heads = heads if norm is None else norm(heads)
            return heads.transpose(-2, -3)

        return (
            split(attention.q_proj(x), getattr(attention, "q_norm", None)),
            split(attention.k_proj(x), getattr(attention, "k_norm", None)),
            split(attention.v_proj(x)),
        )

    def output(self, x: Tensor, attended: Tensor) -> Tensor:
        """See :meth:`server.models.lm.decoder.LayerLike.output`."""
        layer: Any = self.layer
        x = x + layer.self_attn.o_proj(attended.transpose(-2, -3).flatten(-2))
        out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
        return out


def read_rope(
    config: Any, sections: tuple[int, ...] = (), layout: Literal["sectioned", "interleaved"] = "sectioned"
) -> Rope:
    """The rotary embedding of a text model's configuration; ``sections`` and ``layout`` are the family's, the former
    unless the configuration names its own. Raises ValueError for scaled ones (YaRN and the like)."""
    parameters: dict[str, Any] = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rotary embedding of type {kind!r} is not supported")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Rope(head_dim, parameters["rope_theta"], tuple(parameters.get("mrope_section", sections)), layout)
