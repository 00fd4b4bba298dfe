"""A decoding step or a short prompt on a GPU: one CUDA graph over shared KVs, from ids to logits; then the draw."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from compression.cache import KVCache
from compression.mixed import MixedCache
from server.models.base import Draw, Step
from server.models.device import asked_so_far
from server.models.lm import kernels
from server.models.lm.decoder import LanguageModel, LayerLike
from server.models.lm.fused import Attend, FusedLayer, linear
from server.models.lm.plan import LEAST_ITEMS, Mirror, Plan, Tile
from server.models.lm.truncation import dropped

_log = logging.getLogger(__name__)

TILE = 8
"""Tokens of a prompt that read their cache together."""
_PROMPT_ROWS = 256
"""Tokens of prompts at most, those of an unfilled tile counted; questions are seldom longer."""
_MOST_READ = 1 << 21
"""KV tokens, counted anew for each tile: above, attention that reads them once for all is faster."""
_MOST_PIECES = 1 << 12
"""Segments, counted likewise: the host lists them all."""
_ITEMS_A_TILE, _MOST_ITEMS_WARM = 64, 1 << 12
"""Of the graphs that are captured before anybody asks: an hour's video takes fewer items a tile."""


class Decoding:
    """Decodes up to ``max_rows`` rows a step. Prompts of few tokens are read in the same way, a row a token: it takes
    longer to tell a GPU of the thousand kernels of a large model's pass than the GPU takes to run them.

    All buffers are its own: one thread may use it. A graph is captured when a batch of its size first comes, for 1, 2,
    4, ... rows and twice, four times, ... as many KV tokens; where that fails the same kernels run without one.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_positions: int,
        max_rows: int,
        num_traced: int | None = None,
        use_graphs: bool = True,
    ) -> None:
        """``model`` is on its device already; its layers are fused (:meth:`LanguageModel.fuse`). Prompts are traced in
        its first ``num_traced`` layers (None: in all)."""
        self._model = model
        self._num_traced = num_traced or len(model.layers)
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        weight = model.embed_tokens.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._use_graphs = use_graphs and self._device.type == "cuda"
        model.fuse(head_dim)
        everywhere = torch.arange(max_positions, device=self._device)
        self._table = torch.stack(model.rope.tables(everywhere, self._dtype), dim=1)
        self.max_rows = 1 << (max_rows - 1).bit_length()
        most = max(self.max_rows, _PROMPT_ROWS)
        # The rows' fields; and which row is each prompt's last.
        self._state = Mirror((_Row.NUM_FIELDS + 1, most), self._device)
        self._plan = Plan(most, self._device)
        # What comes out. With results of its own each of the many graphs would keep as much memory.
        self._queries = weight.new_empty((self._num_traced, most, heads, head_dim))
        num_drawn = max(self.max_rows, _PROMPT_ROWS // TILE)
        self._logits = weight.new_empty((num_drawn, len(model.head_weight)), dtype=torch.float32)
        self._tokens = torch.zeros(self.max_rows, dtype=torch.int64, device=self._device)
        self._graphs: dict[_Shape, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures the graphs that most answers need, and has everything compiled, so that nobody waits for it."""
        self._fill([], 1)  # there are no items yet, whatever their number
        for tile, most_rows in ((1, self.max_rows), (TILE, _PROMPT_ROWS)):
            for num_tiles in _doubled(1, most_rows // tile):
                most = min(max(_ITEMS_A_TILE * num_tiles, 4 * LEAST_ITEMS), _MOST_ITEMS_WARM)
                for num_items in _doubled(LEAST_ITEMS, most):
                    self._run(_Shape(num_tiles * tile, num_items, tile))
                    if tile > 1:
                        self._run(_Shape(num_tiles * tile, num_items, tile, traced=True))
        self._draw([Draw(1.0, 0, 1, 0.5)]).wait()

    @torch.inference_mode()
    def step(self, rows: Sequence[Step]) -> DrawnTokens:
        """As StepDecoder has it."""
        for row in rows:
            row.cache.reserve(1)
        self._fill([[_Row(row.cache, 0, row.token, row.source, row.draw)] for row in rows], 1)
        self._run(self._shape(len(rows), 1))
        drawn = self._draw([row.draw for row in rows])
        for row in rows:
            row.cache.advance(1)
        return drawn

    def takes(self, prompts: Sequence[tuple[Tensor, MixedCache]]) -> bool:
        """Whether prompts, all together, are better read here than in one piece."""
        sizes = [(-(-len(ids) // TILE), cache.length, len(cache.segments)) for ids, cache in prompts]
        return (
            sum(num_tiles for num_tiles, *_ in sizes) * TILE <= _PROMPT_ROWS
            and sum(num_tiles * num_tokens for num_tiles, num_tokens, _ in sizes) <= _MOST_READ
            and sum(num_tiles * num_segments for num_tiles, _, num_segments in sizes) <= _MOST_PIECES
        )

    @torch.inference_mode()
    def read(self, prompts: Sequence[tuple[Tensor, MixedCache]]) -> Tensor:
        """Appends ids [n] to every cache, if it :meth:`takes` them; the logits [prompts, vocab] of their last tokens.
        Does not wait for the device."""
        ends = self._fill_prompts(prompts)
        self._run(self._shape(ends[-1], TILE))
        for ids, cache in prompts:
            cache.advance(len(ids))
        return self._logits[: len(prompts)].clone()

    @torch.inference_mode()
    def trace(self, prompts: Sequence[tuple[Tensor, MixedCache]]) -> list[Tensor]:
        """The queries [traced layers, heads, n, head_dim] before RoPE of ids [n] behind every cache, which does not
        advance; if it :meth:`takes` them. Does not wait for the device."""
        ends = self._fill_prompts(prompts)
        self._run(self._shape(ends[-1], TILE, traced=True))
        places = [slice(end - len(ids), end) for end, (ids, _) in zip(ends, prompts, strict=True)]
        kept = torch.contiguous_format  # and never a view: the next pass writes there
        return [self._queries[:, place].transpose(1, 2).clone(memory_format=kept) for place in places]

    def _fill_prompts(self, prompts: Sequence[tuple[Tensor, MixedCache]]) -> list[int]:
        """A row a token, each prompt from a tile of its own on; behind which row each ends."""
        rows: list[list[_Row]] = []
        starts = []
        for ids, cache in prompts:
            cache.reserve(len(ids))
            starts.append(len(rows) * TILE)
            places = range(len(ids))
            rows += [[_Row(cache, place) for place in places[start : start + TILE]] for start in places[::TILE]]
        ends = [start + len(ids) for start, (ids, _) in zip(starts, prompts, strict=True)]
        self._fill(rows, TILE, ends)
        for start, end, (ids, _) in zip(starts, ends, prompts, strict=True):
            self._state.device[0, start:end] = ids
        return ends

    def _fill(self, tiles: Sequence[Sequence[_Row]], rows_a_tile: int, ends: Sequence[int] = ()) -> None:
        """Puts rows into the buffers, for which there is room in their caches; ``ends`` as :meth:`_fill_prompts`
        tells them."""
        self._plan.update([Tile(rows[0].cache, rows[0].length, len(rows)) for rows in tiles], rows_a_tile)
        unused = (0,) * _Row.NUM_FIELDS
        fields: list[tuple[int, ...]] = []
        for rows in tiles:
            fields += [row.fields for row in rows]
            fields += [unused] * (rows_a_tile - len(rows))
        state = self._state.writable().zero_()
        if fields:
            state[: _Row.NUM_FIELDS, : len(fields)] = torch.tensor(fields, dtype=torch.int64).T
        if ends:
            state[_Row.NUM_FIELDS, : len(ends)] = torch.tensor(ends) - 1
        self._state.upload()

    def _shape(self, num_rows: int, tile: int, *, traced: bool = False) -> _Shape:
        """Of the graph for what is in the buffers: a tile at least."""
        return _Shape(max(tile, 1 << (num_rows - 1).bit_length()), self._plan.capacity, tile, traced)

    def _run(self, shape: _Shape) -> None:
        """The logits, or only the queries, of what is in the buffers."""
        if self._use_graphs and shape not in self._graphs:
            try:
                self._capture(shape)
            except Exception:
                _log.exception("no CUDA graph could be captured; decoding goes on without")
                self._use_graphs = False
                self._graphs.clear()
        if self._use_graphs:
            self._graphs[shape].replay()
        else:
            self._compute(shape)

    def _capture(self, shape: _Shape) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and makes the libraries' handles
            self._compute(shape)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._compute(shape)
        self._pool = self._pool or graph.pool()
        self._graphs[shape] = graph

    def _compute(self, shape: _Shape) -> None:
        """Nothing in here depends on what is in the buffers, nor waits for the device."""
        num_rows = shape.num_rows
        ids, sources, positions, lengths, *_, lasts = self._state.device[:, :num_rows]
        if shape.tile == 1:
            ids = torch.where(sources > 0, self._tokens[(sources - 1).clamp(min=0)], ids)
        trace = self._queries if shape.traced else None
        batch = _Batch(self._plan, shape, lengths, positions, self._table, self._kv_heads, trace)
        x = self._model.embed_tokens(ids)
        for index in range(len(self._model.layers)):
            layer, attend = self._model.layer(index), partial(batch.attend, index)
            if shape.traced and index == self._num_traced - 1:  # of it the queries will do
                self._queries[index, :num_rows] = layer.project(x, None)[0].transpose(0, 1)
                return
            x = layer.step(x, attend) if isinstance(layer, FusedLayer) else _plain(layer, x, attend)
        if shape.tile > 1:
            x = x[lasts[: num_rows // shape.tile]]
        self._logits[: len(x)].copy_(linear(self._model.norm(x), self._model.head_weight))

    def _draw(self, draws: Sequence[Draw]) -> DrawnTokens:
        """The next tokens of a step's rows. In no graph, since there are many ways to draw: a GPU is still busy with
        the graph before when it has been asked for all of this."""
        _, _, positions, _, seeds, temperature_bits, top_k, top_p_bits, _ = self._state.device[:, : len(draws)]
        tokens, logits = self._tokens[: len(draws)], self._logits[: len(draws)]
        if any(draw.temperature for draw in draws):
            temperatures = temperature_bits.view(torch.float64).float()
            if any(draw.truncated for draw in draws):
                scaled = logits / torch.where(temperatures > 0, temperatures, 1)[:, None]
                logits.masked_fill_(dropped(scaled, top_k, top_p_bits.view(torch.float64).float()), -torch.inf)
            kernels.perturb(logits, temperatures, seeds, positions)
        torch.argmax(logits, -1, out=tokens)
        return DrawnTokens(tokens, logits)


class DrawnTokens:
    """See Drawn. On a GPU they come into memory of their own, whatever the next steps draw."""

    def __init__(self, tokens: Tensor, logits: Tensor) -> None:
        self.logits = logits
        """[rows, vocab] float32, perturbed where there was a temperature; good until the next step."""
        self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=tokens.is_cuda)
        self._host.copy_(tokens, non_blocking=True)
        self._there = asked_so_far(tokens.device)

    def wait(self) -> list[int]:
        """See Drawn."""
        if self._there is not None:
            self._there.synchronize()
        tokens: list[int] = self._host.tolist()
        return tokens


@dataclass(frozen=True, slots=True)
class _Shape:
    """Of a graph. ``tile`` is how many rows a tile has; ``traced``: only the queries are wanted."""

    num_rows: int
    num_items: int
    tile: int
    traced: bool = False


@dataclass(frozen=True, slots=True)
class _Row:
    """One token, to be appended behind ``place`` others that are appended to ``cache`` in the same step: ``token``, or
    the one that the step before has drawn in row ``source``."""

    NUM_FIELDS: ClassVar[int] = 8

    cache: KVCache
    place: int
    token: int = 0
    source: int | None = None
    draw: Draw = field(default_factory=Draw)

    @property
    def length(self) -> int:
        """Tokens of the cache's own before it."""
        return self.cache.num_own + self.place

    @property
    def fields(self) -> tuple[int, ...]:
        """As they stand in the buffer; there the first row is source 1, and 0 none."""
        source = 0 if self.source is None else self.source + 1
        position = self.cache.next_position + self.place
        draw = self.draw
        top_k, top_p = (draw.top_k, draw.top_p) if draw.truncated else (0, 1.0)
        return (
            *(self.token, source, position, self.length),
            *(draw.seed, _bits(draw.temperature), top_k, _bits(top_p)),
        )


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the attention of a step needs besides queries, keys and values."""

    plan: Plan
    shape: _Shape
    lengths: Tensor
    positions: Tensor
    table: Tensor
    kv_heads: int
    trace: Tensor | None
    """Where the queries of all layers go, if they are wanted: [layers, rows or more, heads, head_dim]."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All [rows, heads, head_dim] before RoPE, heads contiguous; the keys and values are appended."""
        if self.trace is not None:
            self.trace[layer, : self.shape.num_rows] = queries
        kernels.append(keys, values, self.plan.tails, self.lengths, self.positions, self.table, layer)
        return kernels.attend(
            queries, self.plan.items[: self.shape.num_items], self.plan.ranges, self.lengths, self.positions,
            self.table, layer, self.kv_heads, tile=self.shape.tile,
        )  # fmt: skip


def _plain(layer: LayerLike, x: Tensor, attend: Attend) -> Tensor:
    q, k, v = (part.transpose(0, 1).contiguous() for part in layer.project(x, None))
    return layer.output(x, attend(q, k, v).transpose(0, 1))


def _bits(value: float) -> int:
    """A float64 as the int64 of the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _doubled(first: int, most: int) -> Iterator[int]:
    while first <= most:
        yield first
        first *= 2
