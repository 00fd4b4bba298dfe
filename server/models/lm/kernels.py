"""Triton kernels of a decoding step or of short prompts, a token a row, over caches in pieces. Nothing imports this
without a GPU.

Rows lie in tiles, each of one cache and of as many tokens as the launch says: a decoding step's of one, a prompt's of
several, one behind the other, for which the cache is read once. All of them read what changes from step to step
(tokens, places, lengths, where KVs lie) from device memory and have launch grids that do not depend on it, so a CUDA
graph can hold them.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ITEM_FIELDS = 8
"""int64 of an item, a run of KV tokens for one tile: addresses of its first key and value in layer 0 and head 0,
elements from layer to layer and from head to head, the tile's first row, offset (see
:class:`compression.mixed.Segment`), tokens, and where it begins among the cache's own tokens; -1 for shared ones. Of an
item of own tokens each row sees those up to its own."""
TAIL_FIELDS = 4
"""int64 of a row's own tokens: addresses of the first key and value, elements from layer to layer and head to head."""
LAUNCH: dict[str, Any] = {"OVERLAP": False}
"""How kernels are launched. With :data:`OVERLAPPING`, from Hopper on, one is on its way while the one before ends."""
OVERLAPPING: dict[str, Any] = {"OVERLAP": True, "launch_pdl": True}
GEMV_BLOCKS: dict[tuple[int, int], tuple[int, int, int]] = {}
"""Rows and columns of a weight matrix -> those that a program takes at a time, and its warps: what was measured."""


@triton.jit
def _rotated(x, partner, table, position, d, HALF: tl.constexpr):
    """``x`` and its partners [..., head_dim] in float32, rotated to ``position``."""
    turned = d < 2 * HALF
    cos = tl.load(table + position * 2 * HALF + d % HALF, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(table + position * 2 * HALF + HALF + d % HALF, mask=turned, other=0.0).to(tl.float32)
    return x * cos + partner * tl.where(d < HALF, -sin, sin)


@triton.jit(do_not_specialize=["layer"])
def _append(
    k, v, tails, lengths, positions, table, layer, k_row, v_row,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dtype = k.dtype.element_ty
    d = tl.arange(0, HEAD_DIM)
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    from_k = k + row * k_row + head * HEAD_DIM
    x, y = tl.load(from_k + d).to(tl.float32), tl.load(from_k + partner).to(tl.float32)
    rotated = _rotated(x, y, table, tl.load(positions + row), d, HALF)
    tail = tails + row * 4
    place = layer * tl.load(tail + 2) + head * tl.load(tail + 3) + tl.load(lengths + row) * HEAD_DIM
    to_k = tl.load(tail).to(tl.pointer_type(dtype))
    to_v = tl.load(tail + 1).to(tl.pointer_type(dtype))
    tl.store(to_k + place + d, rotated.to(dtype))
    tl.store(to_v + place + d, tl.load(v + row * v_row + head * HEAD_DIM + d))


@triton.jit(do_not_specialize=["layer"])
def _attend(
    q, items, lengths, positions, table, shares, weights, layer, q_row, scale,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    item, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dtype = q.dtype.element_ty
    field = items + item * 8
    row, offset = tl.load(field + 4), tl.load(field + 5)
    count, first = tl.load(field + 6), tl.load(field + 7)
    m, d, n = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_N)
    token, used = m // GROUP, m < TOKENS * GROUP
    if TOKENS == 1:
        seen = count
        if first >= 0:
            seen = tl.minimum(count, tl.load(lengths + row) + 1 - first)
        count = seen.to(tl.int32)
    else:
        own = tl.load(lengths + row + token, mask=used, other=0) + 1 - first
        seen = tl.where(first >= 0, tl.minimum(count, own), count).to(tl.int32)
        count = tl.max(tl.where(used, seen, 0), 0)
    share = (item * tl.num_programs(1) + kv_head) * TOKENS * GROUP + m
    if count <= 0:
        tl.store(weights + share, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=used)
    else:
        from_q = q + (row + token)[:, None] * q_row + (kv_head * GROUP + m % GROUP)[:, None] * HEAD_DIM
        partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
        heads = used[:, None]
        x = tl.load(from_q + d[None, :], mask=heads, other=0.0).to(tl.float32)
        y = tl.load(from_q + partner[None, :], mask=heads, other=0.0).to(tl.float32)
        if TOKENS == 1:
            queries = _rotated(x, y, table, tl.load(positions + row) - offset, d[None, :], HALF).to(dtype)
        else:
            position = tl.load(positions + row + token, mask=used, other=0) - offset
            queries = _rotated(x, y, table, tl.where(used, position, 0)[:, None], d[None, :], HALF).to(dtype)
        place = layer * tl.load(field + 2) + kv_head * tl.load(field + 3)
        keys = tl.load(field).to(tl.pointer_type(dtype)) + place
        values = tl.load(field + 1).to(tl.pointer_type(dtype)) + place
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        out = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
        for start in tl.range(0, count, BLOCK_N, num_stages=STAGES):
            inside = start + n < count
            at = (start + n)[:, None] * HEAD_DIM + d[None, :]
            # An address out of a table has no alignment that the compiler knew of.
            k_at, v_at = tl.multiple_of(keys + at, [16, 16]), tl.multiple_of(values + at, [16, 16])
            k = tl.load(k_at, mask=inside[:, None], other=0.0)
            logits = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
            if TOKENS == 1:
                logits = tl.where(inside[None, :], logits, float("-inf"))
            else:
                logits = tl.where((start + n)[None, :] < seen[:, None], logits, float("-inf"))
            higher = tl.maximum(best, tl.max(logits, 1))
            # A row that has seen nothing yet must not take infinity from infinity.
            base = higher if TOKENS == 1 else tl.where(higher == float("-inf"), 0.0, higher)
            mass = tl.exp2(logits - base[:, None])
            shrink = tl.exp2(best - base)
            total = total * shrink + tl.sum(mass, 1)
            v = tl.load(v_at, mask=inside[:, None], other=0.0)
            out = out * shrink[:, None] + tl.dot(mass.to(dtype), v, input_precision="ieee")
            best = higher
        divisor = total if TOKENS == 1 else tl.where(total > 0, total, 1.0)
        tl.store(shares + share[:, None] * HEAD_DIM + d[None, :], out / divisor[:, None], mask=heads)
        tl.store(weights + share, best + tl.log2(divisor), mask=used)


@triton.jit
def _merge(
    shares, weights, ranges, out, TOKENS: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tile, token = row // TOKENS, row % TOKENS
    begin, end = tl.load(ranges + tile), tl.load(ranges + tile + 1)
    i, d = tl.arange(0, BLOCK), tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    best = float("-inf")
    total = 0.0
    merged = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin, end, BLOCK):
        items = start + i
        at = ((items * KV_HEADS + head // GROUP) * TOKENS + token) * GROUP + head % GROUP
        # Both are asked for at once, although some shares of no weight were never written.
        inside = items < end
        weight = tl.load(weights + at, mask=inside, other=float("-inf"))
        share = tl.load(shares + at[:, None] * HEAD_DIM + d[None, :], mask=inside[:, None], other=0.0)
        higher = tl.maximum(best, tl.max(weight, 0))
        mass = tl.exp2(weight - higher)
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(mass, 0)
        merged = merged * shrink + tl.sum(tl.where((mass > 0)[:, None], share * mass[:, None], 0.0), 0)
        best = higher
    to = out + (row * tl.num_programs(1) + head) * HEAD_DIM + d
    tl.store(to, (merged / tl.where(total > 0, total, 1.0)).to(out.dtype.element_ty))


@triton.jit
def _norm(x, weight, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    value = tl.load(x + row * SIZE + i, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / SIZE + eps)
    dtype = out.dtype.element_ty
    normed = (value * scale).to(dtype).to(tl.float32) * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + i, normed.to(dtype), mask=inside)


@triton.jit
def _gate(x, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    gate = tl.load(x + row * 2 * SIZE + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * SIZE + SIZE + i, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    gated = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
    tl.store(out + row * SIZE + i, gated.to(dtype), mask=inside)


@triton.jit
def _gemv(
    x, w, bias, out, NUM_OUT: tl.constexpr, NUM_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    inside = (rows < NUM_OUT)[:, None]
    for start in range(0, NUM_IN, BLOCK_K):
        if NUM_IN % BLOCK_K == 0:
            xs = tl.load(x + start + k).to(tl.float32)
            mask = inside
        else:
            xs = tl.load(x + start + k, mask=start + k < NUM_IN, other=0.0).to(tl.float32)
            mask = inside & (start + k < NUM_IN)[None, :]
        at = w + rows[:, None] * NUM_IN + (start + k)[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32) * xs[None, :]
        if GATED:
            up = tl.load(at + NUM_OUT * NUM_IN, mask=mask, other=0.0)
            total_up += up.to(tl.float32) * xs[None, :]
    y = tl.sum(total, 1)
    n_inside = rows < NUM_OUT
    dtype = out.dtype.element_ty
    if HAS_BIAS:
        y += tl.load(bias + rows, mask=n_inside, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(out + rows, mask=n_inside, other=0.0).to(tl.float32)
    if GATED:
        y = y / (1 + tl.exp(-y)) * tl.sum(total_up, 1)
    tl.store(out + rows, y.to(dtype), mask=n_inside)


@triton.jit
def _perturb(logits, temperatures, seeds, positions, VOCAB: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = logits + row * VOCAB + i
        value = tl.load(at, mask=i < VOCAB, other=0.0)
        noise = tl.rand(tl.load(seeds + row) + tl.load(positions + row) * 0x9E3779B97F4A7C1, i)
        tl.store(at, value / temperature - tl.log(-tl.log(noise)), mask=i < VOCAB)


def append(
    keys: Tensor, values: Tensor, tails: Tensor, lengths: Tensor, positions: Tensor, table: Tensor, layer: int
) -> None:
    """Rotates ``keys`` [rows, kv_heads, head_dim] to ``positions`` [rows] and puts them and ``values`` behind every
    row's own ``lengths`` [rows] tokens. ``table`` is cos and sin, [positions, 2, rotary_dim // 2]."""
    rows, heads, head_dim = keys.shape
    _append[rows, heads](
        keys, values, tails, lengths, positions, table, layer, keys.stride(0), values.stride(0),
        HEAD_DIM=head_dim, HALF=table.shape[-1], num_warps=1, **LAUNCH,
    )  # fmt: skip


def attend(
    queries: Tensor, items: Tensor, ranges: Tensor, lengths: Tensor, positions: Tensor, table: Tensor, layer: int,
    kv_heads: int, *, tile: int = 1, block: int = 64, num_warps: int = 4, num_stages: int = 3,
) -> Tensor:  # fmt: skip
    """``queries`` [rows, heads, head_dim] before RoPE, each over its tile's items with what was appended -> the same
    shape.

    Of ``tile`` rows each, tile ``t`` has the items ``ranges[t]`` to ``ranges[t + 1]``; those behind the last one's are
    passed over.
    """
    rows, heads, head_dim = queries.shape
    group, num_items = heads // kv_heads, len(items)
    shares = torch.empty((num_items, tile * heads, head_dim), dtype=torch.float32, device=queries.device)
    weights = torch.empty((num_items, tile * heads), dtype=torch.float32, device=queries.device)
    _attend[num_items, kv_heads](
        queries, items, lengths, positions, table, shares, weights, layer, queries.stride(0),
        head_dim**-0.5 * 1.4426950408889634,  # the kernel's exponentials are powers of two
        TOKENS=tile, GROUP=group, HEAD_DIM=head_dim, HALF=table.shape[-1],
        BLOCK_M=max(16, triton.next_power_of_2(tile * group)), BLOCK_N=block, STAGES=num_stages, num_warps=num_warps,
        **LAUNCH,
    )  # fmt: skip
    out = torch.empty((rows, heads, head_dim), dtype=queries.dtype, device=queries.device)
    block_d = min(head_dim, 32)  # few rows are many programs all the same
    _merge[rows, heads, head_dim // block_d](
        shares, weights, ranges, out, TOKENS=tile, GROUP=group, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        BLOCK=max(16, min(64, triton.next_power_of_2(num_items * tile // rows))), BLOCK_D=block_d, num_warps=4,
        **LAUNCH,
    )  # fmt: skip
    return out


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of ``x`` [rows, size]."""
    out = torch.empty_like(x)
    size = x.shape[1]
    _norm[len(x),](x, weight, out, eps, SIZE=size, BLOCK=triton.next_power_of_2(size), num_warps=8, **LAUNCH)
    return out


def gate(x: Tensor) -> Tensor:
    """``x`` [rows, 2 * size], gate and up beside each other -> silu(gate) * up [rows, size]."""
    size = x.shape[1] // 2
    out = torch.empty((len(x), size), dtype=x.dtype, device=x.device)
    _gate[len(x), triton.cdiv(size, 1024)](x, out, SIZE=size, BLOCK=1024, **LAUNCH)
    return out


def gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, add_to: Tensor | None = None, gated: bool = False
) -> Tensor:
    """``x`` [1, n_in] times ``weight`` [n_out, n_in]: read once and at the memory's pace. ``gated``: the weight is gate
    and up, and what comes out is silu(gate) * up. ``add_to`` [1, n_out] is added to in place."""
    num_out = weight.shape[0] // (2 if gated else 1)
    out = torch.empty((1, num_out), dtype=x.dtype, device=x.device) if add_to is None else add_to
    # The fastest of those tried on an H200 (tests/benchmarks/results/decode_roofline_h200.json).
    others = (8, 512, 4) if gated else (4, 512, 4)
    block_n, block_k, num_warps = GEMV_BLOCKS.get((weight.shape[0], x.shape[1]), others)
    _gemv[triton.cdiv(num_out, block_n),](
        x, weight, bias if bias is not None else x, out, NUM_OUT=num_out, NUM_IN=x.shape[1], HAS_BIAS=bias is not None,
        ADD=add_to is not None, GATED=gated, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, **LAUNCH,
    )  # fmt: skip
    return out


def perturb(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> None:
    """Turns ``logits`` [rows, vocab] float32, where a row's temperature is not 0, into ones whose largest is a draw
    from their softmax (Gumbel): the same for the same seed and position, whatever else is in the batch."""
    vocab = logits.shape[1]
    _perturb[len(logits), triton.cdiv(vocab, 1024)](
        logits, temperatures, seeds, positions, VOCAB=vocab, BLOCK=1024, num_warps=4, **LAUNCH
    )
