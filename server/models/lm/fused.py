"""A layer of the usual kind in few kernels, for a GPU: in a decoding step, and in a pass over many tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from server.models.lm import kernels
from server.models.lm.decoder import QKV, LayerLike, Places

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values of one token a row, [rows, heads, head_dim] before RoPE -> what they attend to."""


class FusedLayer:
    """Projections of one input are one matrix; norms and the gate of the MLP are a kernel each."""

    def __init__(self, parts: Any, head_dim: int) -> None:
        """``parts`` has Llama's names. Its projections become views of the matrices that are made of them."""
        attention, mlp = parts.self_attn, parts.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._attention = attention
        self._head_dim = head_dim
        self._sizes = [part.out_features for part in projections]
        self._qkv, self._qkv_bias = _pack(projections)
        self._gate_up, _ = _pack([mlp.gate_proj, mlp.up_proj])
        self._o, self._down = attention.o_proj.weight, mlp.down_proj.weight
        self._q_norm = getattr(attention, "q_norm", nn.Identity())
        self._k_norm = getattr(attention, "k_norm", nn.Identity())
        self._norms = [(norm.weight, _eps(norm)) for norm in (parts.input_layernorm, parts.post_attention_layernorm)]

    @classmethod
    def of(cls, layer: object, head_dim: int) -> FusedLayer | None:
        """None for a layer of another kind."""
        parts: Any = getattr(layer, "layer", layer)  # transformers' own are wrapped
        attention, mlp = getattr(parts, "self_attn", None), getattr(parts, "mlp", None)
        names = (attention, ("q_proj", "k_proj", "v_proj", "o_proj")), (mlp, ("gate_proj", "up_proj", "down_proj"))
        linears = [getattr(owner, name, None) for owner, own in names for name in own]
        if not all(type(linear) is nn.Linear for linear in linears):
            return None
        if any(linear.bias is not None for linear in linears[3:] if linear is not None):
            return None
        probe = torch.linspace(-2, 2, 5)
        silu = torch.equal(getattr(mlp, "act_fn", functional.silu)(probe), functional.silu(probe))
        return cls(parts, head_dim) if silu else None

    def project(self, x: Tensor, places: Places | None) -> QKV:
        """See :meth:`LayerLike.project`."""
        normed = self._normed(x, 0)
        if places is not None:  # VSTs have projections of their own
            merged: QKV = self._attention.project(normed, places)
            return merged
        q, k, v = (part.transpose(0, 1) for part in self._split(functional.linear(normed, self._qkv, self._qkv_bias)))
        return q, k, v

    def output(self, x: Tensor, attended: Tensor) -> Tensor:
        """See :meth:`LayerLike.output`."""
        x = torch.addmm(x, attended.transpose(0, 1).flatten(1), self._o.t())
        gated = kernels.gate(functional.linear(self._normed(x, 1), self._gate_up))
        return torch.addmm(x, gated, self._down.t())

    def step(self, x: Tensor, attend: Attend) -> Tensor:
        """``x`` [rows, hidden], one token a row, which is written over -> the next layer's."""
        attended = attend(*self._split(linear(self._normed(x, 0), self._qkv, self._qkv_bias)))
        x = _linear_into(x, attended.flatten(1), self._o)
        h = self._normed(x, 1)
        one = len(x) == 1
        gated = kernels.gemv(h, self._gate_up, gated=True) if one else kernels.gate(linear(h, self._gate_up))
        return _linear_into(x, gated, self._down)

    def _normed(self, x: Tensor, place: int) -> Tensor:
        weight, eps = self._norms[place]
        return kernels.norm(x, weight, eps)

    def _split(self, qkv: Tensor) -> QKV:
        """[tokens, all heads] -> [tokens, heads, head_dim] each."""
        q, k, v = (part.view(len(qkv), -1, self._head_dim) for part in qkv.split_with_sizes(self._sizes, dim=1))
        return self._q_norm(q), self._k_norm(k), v


def fused(layers: Sequence[LayerLike], head_dim: int) -> list[LayerLike]:
    """Those of the usual kind fused, the others as they are."""
    return [FusedLayer.of(layer, head_dim) or layer for layer in layers]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """For a single row by a kernel that does nothing but read the weights, for more by the library."""
    return kernels.gemv(x, weight, bias) if len(x) == 1 else functional.linear(x, weight, bias)


def _linear_into(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """``x`` + ``y`` times ``weight``, in place."""
    return kernels.gemv(y, weight, add_to=x) if len(x) == 1 else x.addmm_(y, weight.t())


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def _pack(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights [all outputs, inputs] and biases of several projections, of which theirs become views."""
    weight = torch.cat([linear.weight.data for linear in linears])
    sizes = [linear.out_features for linear in linears]
    for linear, part in zip(linears, weight.split_with_sizes(sizes), strict=True):
        linear.weight.data = part
    biases = [linear.bias.data for linear in linears if linear.bias is not None]
    return weight, torch.cat(biases) if biases else None
