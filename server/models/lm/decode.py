"""A decoding step or a short prompt on a GPU: one CUDA graph over shared KVs, from token ids to token ids."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from compression.cache import KVCache
from compression.segments import SharedCache
from server.models.base import Step
from server.models.device import asked_so_far
from server.models.lm import kernels
from server.models.lm.decoder import LanguageModel, LayerLike
from server.models.lm.fused import Attend, FusedLayer, linear

_log = logging.getLogger(__name__)

_HORIZON = 256
"""Own tokens of a row that a plan reaches further than the row has now; then the next plan is made."""
_WAVE = 132
"""Items that keep a GPU busy: one a multiprocessor and KV head."""
_SMALLEST_ITEM, _LARGEST_ITEM = 64, 1024
"""KV tokens."""
_LEAST_ITEMS, _MOST_ITEMS = 128, 1 << 15
"""Of a graph, by powers of two."""
_ITEMS_A_ROW, _MOST_ITEMS_WARM = 64, 1 << 12
"""Of the graphs that are captured before anybody asks: an hour's video takes fewer items a row."""
_NOWHERE_NBYTES = 4096
"""Where rows that only fill a graph up write their keys and values; more than a head."""


class Decoding:
    """Decodes up to ``max_rows`` rows a step. A prompt of few tokens is read in the same way, a row a token: every row
    reads its whole cache anew, but a large model tells a GPU of a thousand kernels otherwise, which takes longer.

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
        use_graphs: bool = True,
    ) -> None:
        """``model`` is on its device already; its layers are fused (:meth:`LanguageModel.fuse`)."""
        self._model = model
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        weight = model.embed_tokens.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._use_graphs = use_graphs and self._device.type == "cuda"
        model.fuse(head_dim)
        everywhere = torch.arange(max_positions, device=self._device)
        self._table = torch.stack(model.rope.tables(everywhere, self._dtype), dim=1)
        self.max_rows = 1 << (max_rows - 1).bit_length()
        self._state = _Mirror((5, self.max_rows), self._device)  # ids, positions, lengths, seeds, temperatures
        self._plan = _Plan(self.max_rows, self._device)
        # What comes out. With results of its own each of the many graphs would keep as much memory.
        self._queries = weight.new_empty((len(model.layers), self.max_rows, heads, head_dim))
        self._logits = weight.new_empty((self.max_rows, len(model.head_weight)), dtype=torch.float32)
        self._tokens = torch.zeros(self.max_rows, dtype=torch.int64, device=self._device)
        self._graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures the graphs that most answers need, and has everything compiled, so that nobody waits for it."""
        self._fill([])
        for num_rows in (1 << exponent for exponent in range(self.max_rows.bit_length())):
            most = min(max(_ITEMS_A_ROW * num_rows, 4 * _LEAST_ITEMS), _MOST_ITEMS_WARM)
            capacity = _LEAST_ITEMS
            while capacity <= most:  # there are no items yet, whatever their number
                self._run(num_rows, capacity)
                self._run(num_rows, capacity, traced=True)
                capacity *= 2

    @torch.inference_mode()
    def step(self, rows: Sequence[Step]) -> tuple[list[int], Tensor]:
        """Appends every row's token to its cache and draws the next ones; they come with the logits [rows, vocab] that
        they were drawn from (perturbed where there is a temperature), which are good until the next step."""
        for row in rows:
            row.cache.reserve(1)
        self._fill([_Row(row.cache, 0, row.token, row.seed, row.temperature) for row in rows])
        self._run(len(rows), self._plan.capacity)
        chosen: list[int] = self._tokens[: len(rows)].tolist()  # the one wait for the device
        for row in rows:
            row.cache.advance(1)
        return chosen, self._logits[: len(rows)]

    @torch.inference_mode()
    def read(self, prompts: Sequence[tuple[Tensor, KVCache]]) -> Tensor:
        """Appends ids [n] to every cache, all together at most ``max_rows``; the logits [prompts, vocab] of their last
        tokens. Does not wait for the device."""
        self._run(self._fill_prompts(prompts), self._plan.capacity)
        ends = accumulate(len(ids) for ids, _ in prompts)
        for ids, cache in prompts:
            cache.advance(len(ids))
        return torch.stack([self._logits[end - 1] for end in ends])

    @torch.inference_mode()
    def trace(self, ids: Tensor, cache: KVCache) -> Tensor:
        """The queries [layers, heads, n, head_dim] before RoPE of ``ids`` [n], at most ``max_rows``, behind ``cache``,
        which does not advance. Does not wait for the device."""
        num_rows = self._fill_prompts([(ids, cache)])
        self._run(num_rows, self._plan.capacity, traced=True)
        return self._queries[:, :num_rows].transpose(1, 2).contiguous()

    def _fill_prompts(self, prompts: Sequence[tuple[Tensor, KVCache]]) -> int:
        """A row a token; how many."""
        for ids, cache in prompts:
            cache.reserve(len(ids))
        rows = [_Row(cache, place) for ids, cache in prompts for place in range(len(ids))]
        self._fill(rows)
        self._state.device[0, : len(rows)] = torch.cat([ids for ids, _ in prompts])
        return len(rows)

    def _fill(self, rows: Sequence[_Row]) -> None:
        """Puts ``rows`` into the buffers, for which there is room in their caches."""
        self._plan.update([(row.cache, row.length) for row in rows])
        state = self._state.writable()
        state.zero_()
        state[:, : len(rows)] = torch.tensor([row.fields for row in rows], dtype=torch.int64).view(-1, len(state)).T
        self._state.upload()

    def _run(self, num_rows: int, num_items: int, *, traced: bool = False) -> None:
        """For the rows and items in the buffers, or more: the tokens and logits, or only the queries if ``traced``."""
        key = 1 << max(num_rows - 1, 0).bit_length(), num_items, traced
        if self._use_graphs and key not in self._graphs:
            try:
                self._capture(*key)
            except Exception:
                _log.exception("no CUDA graph could be captured; decoding goes on without")
                self._use_graphs = False
                self._graphs.clear()
        if self._use_graphs:
            self._graphs[key].replay()
        else:
            self._compute(*key)

    def _capture(self, num_rows: int, num_items: int, traced: bool) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and makes the libraries' handles
            self._compute(num_rows, num_items, traced)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._compute(num_rows, num_items, traced)
        self._pool = self._pool or graph.pool()
        self._graphs[num_rows, num_items, traced] = graph

    def _compute(self, num_rows: int, num_items: int, traced: bool) -> None:
        """Nothing in here depends on what is in the buffers, nor waits for the device."""
        ids, positions, lengths, seeds, temperature_bits = self._state.device[:, :num_rows]
        batch = _Batch(
            self._plan, num_rows, num_items, lengths, positions, self._table, self._kv_heads, self._head_dim,
            self._queries if traced else None,
        )  # fmt: skip
        x = self._model.embed_tokens(ids)
        for index in range(len(self._model.layers)):
            layer, attend = self._model.layer(index), partial(batch.attend, index)
            x = layer.step(x, attend) if isinstance(layer, FusedLayer) else _plain(layer, x, attend)
        if traced:
            return
        temperatures = temperature_bits.view(torch.float64).float()
        logits = self._logits[:num_rows]
        logits.copy_(linear(self._model.norm(x), self._model.head_weight))
        kernels.perturb(logits, temperatures, seeds, positions)
        torch.argmax(logits, -1, out=self._tokens[:num_rows])


@dataclass(frozen=True, slots=True)
class _Row:
    """One token, to be appended behind ``place`` others that are appended to ``cache`` in the same step."""

    cache: KVCache
    place: int
    token: int = 0
    seed: int = 0
    temperature: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of the cache's own before it."""
        return self.cache.num_own + self.place

    @property
    def fields(self) -> tuple[int, int, int, int, int]:
        """As they stand in the buffer."""
        return self.token, self.cache.next_position + self.place, self.length, self.seed, _bits(self.temperature)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the attention of a step needs besides queries, keys and values."""

    plan: _Plan
    num_rows: int
    num_items: int
    lengths: Tensor
    positions: Tensor
    table: Tensor
    kv_heads: int
    head_dim: int
    trace: Tensor | None
    """Where the queries of all layers go, if they are wanted: [layers, rows or more, heads, head_dim]."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All [rows, heads, head_dim] before RoPE, heads contiguous; the keys and values are appended."""
        if self.trace is not None:
            self.trace[layer, : self.num_rows] = queries
        kernels.append(keys, values, self.plan.tails, self.lengths, self.positions, self.table, layer)
        return kernels.attend(
            queries, self.plan.items[: self.num_items], self.plan.ranges, self.lengths, self.positions, self.table,
            layer, self.kv_heads,
        )  # fmt: skip


class _Plan:
    """Which pieces of KVs the programs of the attention kernel take. It is made again when rows come or go, and when
    a row's own tokens reach its end."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._items = _Mirror((_MOST_ITEMS, kernels.ITEM_FIELDS), device)
        self._rows = _Mirror((max_rows * (kernels.TAIL_FIELDS + 1) + 1,), device)
        sizes = [max_rows * kernels.TAIL_FIELDS, max_rows + 1]
        self._host_tails, self._host_ranges = self._rows.host.split_with_sizes(sizes)
        self.items = self._items.device
        tails, self.ranges = self._rows.device.split_with_sizes(sizes)
        self.tails = tails.view(-1, kernels.TAIL_FIELDS)
        self._nowhere = torch.zeros(_NOWHERE_NBYTES, dtype=torch.uint8, device=device)
        self._made_for: list[tuple[ref[KVCache], int, int]] = []
        self.capacity = _LEAST_ITEMS
        """Items that a graph needs for this plan: a power of two."""
        self._put([], [0], [])

    def update(self, rows: Sequence[tuple[KVCache, int]]) -> None:
        """Makes a plan for ``rows``, each a cache and how many of its own tokens come before the row's, unless the last
        plan will do. There is room for these and for one more."""
        caches = [cache for cache, _ in rows]
        reach = [length // _HORIZON + 1 for _, length in rows]
        made_for = [(ref(cache), cache.keys.data_ptr(), blocks) for cache, blocks in zip(caches, reach, strict=True)]
        if made_for == self._made_for and all(known() is not None for known, *_ in made_for):
            return
        num_tokens = sum(cache.num_shared + blocks * _HORIZON for cache, blocks in zip(caches, reach, strict=True))
        size = min(max(-(-num_tokens // (_WAVE * _SMALLEST_ITEM)) * _SMALLEST_ITEM, _SMALLEST_ITEM), _LARGEST_ITEM)
        items: list[tuple[int, ...]] = []
        ranges = [0]
        for row, (cache, blocks) in enumerate(zip(caches, reach, strict=True)):
            items += _items(row, cache, min(blocks * _HORIZON, cache.capacity), size)
            ranges.append(len(items))
        if len(items) > _MOST_ITEMS:
            raise RuntimeError(f"a batch in {len(items)} pieces, {_MOST_ITEMS} at most")
        self.capacity = max(_LEAST_ITEMS, 1 << (len(items) - 1).bit_length())
        tails = [(cache.keys.data_ptr(), cache.values.data_ptr(), *cache.keys.stride()[:2]) for cache in caches]
        self._put(items, ranges, tails)
        self._made_for = made_for

    def _put(self, items: list[tuple[int, ...]], ranges: list[int], tails: list[tuple[int, ...]]) -> None:
        """Fills up what is left with items of no tokens, and rows without items that write nowhere."""
        host = self._items.writable()[: self.capacity]
        host[: len(items)] = torch.tensor(items, dtype=torch.int64).view(-1, kernels.ITEM_FIELDS)
        host[len(items) :] = 0
        self._items.upload(self.capacity)
        self._rows.writable()
        self._host_ranges[: len(ranges)] = torch.tensor(ranges)
        self._host_ranges[len(ranges) :] = len(items)
        nowhere = (self._nowhere.data_ptr(), self._nowhere.data_ptr(), 0, 0)
        rest = len(self._host_tails) // kernels.TAIL_FIELDS - len(tails)
        self._host_tails.copy_(torch.tensor([*tails, *[nowhere] * rest], dtype=torch.int64).flatten())
        self._rows.upload()


class _Mirror:
    """int64 values on the host and the same on the device; there they never change their place."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.host = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.device = torch.zeros(shape, dtype=torch.int64, device=device)
        self._uploaded: torch.cuda.Event | None = None

    def writable(self) -> Tensor:
        """The host's, once the last upload is over."""
        if self._uploaded is not None:
            self._uploaded.synchronize()
        return self.host

    def upload(self, rows: int | None = None) -> None:
        """The first ``rows``, or all."""
        self.device[:rows].copy_(self.host[:rows], non_blocking=True)
        self._uploaded = asked_so_far(self.device.device)


def _plain(layer: LayerLike, x: Tensor, attend: Attend) -> Tensor:
    q, k, v = (part.transpose(0, 1).contiguous() for part in layer.project(x, None))
    return layer.output(x, attend(q, k, v).transpose(0, 1))


def _items(row: int, cache: KVCache, num_own: int, size: int) -> Iterator[tuple[int, ...]]:
    """See :data:`kernels.ITEM_FIELDS`."""
    segments = cache.segments if isinstance(cache, SharedCache) else ()
    runs = [(segment.keys, segment.values, segment.offset, segment.num_tokens, False) for segment in segments]
    for keys, values, offset, num_tokens, own in [*runs, (cache.keys, cache.values, 0, num_own, True)]:
        layer_stride, head_stride, token_stride, _ = keys.stride()
        keys_at, values_at, token_nbytes = keys.data_ptr(), values.data_ptr(), token_stride * keys.itemsize
        # Pieces of about the same size, in whole blocks of the kernel.
        pieces = -(-num_tokens // size)
        step = -(-num_tokens // (pieces * _SMALLEST_ITEM)) * _SMALLEST_ITEM
        for start in range(0, num_tokens, step):
            shift, count = start * token_nbytes, min(step, num_tokens - start)
            first = start if own else -1
            yield keys_at + shift, values_at + shift, layer_stride, head_stride, row, offset, count, first


def _bits(value: float) -> int:
    """A float64 as the int64 of the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
