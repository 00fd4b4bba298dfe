"""What the programs of the attention kernel do in a step: the host's plan, and the buffers that bring it to the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

from compression.cache import KVCache
from compression.segments import SharedCache
from server.models.device import asked_so_far
from server.models.lm import kernels

LEAST_ITEMS, MOST_ITEMS = 128, 1 << 15
"""Of a plan, by powers of two."""
_HORIZON = 256
"""Own tokens of a cache that a plan reaches further than it has now; then the next plan is made."""
_WAVE = 132
"""Items that keep a GPU busy: one a multiprocessor and KV head."""
_SMALLEST_ITEM, _LARGEST_ITEM = 64, 1024
"""KV tokens."""
_NOWHERE_NBYTES = 4096
"""Where rows that only fill a graph up write their keys and values; more than a head."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Tokens that are appended to one cache in a step, one behind the other: ``num_before`` own ones of the cache come
    before them."""

    cache: KVCache
    num_before: int
    num_tokens: int


class Plan:
    """Which pieces of KVs the programs take. It is made again when tiles come or go, and when a cache's own tokens
    reach its end."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._items = Mirror((MOST_ITEMS, kernels.ITEM_FIELDS), device)
        self._rows = Mirror((max_rows * (kernels.TAIL_FIELDS + 1) + 1,), device)
        sizes = [max_rows * kernels.TAIL_FIELDS, max_rows + 1]
        self._host_tails, self._host_ranges = self._rows.host.split_with_sizes(sizes)
        self.items = self._items.device
        tails, self.ranges = self._rows.device.split_with_sizes(sizes)
        self.tails = tails.view(-1, kernels.TAIL_FIELDS)
        self._nowhere = torch.zeros(_NOWHERE_NBYTES, dtype=torch.uint8, device=device)
        self._no_tail = (self._nowhere.data_ptr(), self._nowhere.data_ptr(), 0, 0)
        self._made_for: list[tuple[ref[KVCache], int, int, int]] = []
        self._rows_a_tile = 1
        self.capacity = LEAST_ITEMS
        """Items that a graph needs for this plan: a power of two."""
        self._put([], [0], [])

    def update(self, tiles: Sequence[Tile], rows_a_tile: int) -> None:
        """Makes a plan for ``tiles``, each of so many rows or fewer, unless the last plan will do. Their caches have
        room for them. Raises RuntimeError for more than MOST_ITEMS."""
        reach = [(tile.num_before + tile.num_tokens - 1) // _HORIZON + 1 for tile in tiles]
        made_for = [
            (ref(tile.cache), tile.cache.keys.data_ptr(), blocks, tile.num_tokens)
            for tile, blocks in zip(tiles, reach, strict=True)
        ]
        same = made_for == self._made_for and rows_a_tile == self._rows_a_tile
        if same and all(known() is not None for known, *_ in made_for):
            return
        num_tokens = sum(tile.cache.num_shared + blocks * _HORIZON for tile, blocks in zip(tiles, reach, strict=True))
        size = min(max(-(-num_tokens // (_WAVE * _SMALLEST_ITEM)) * _SMALLEST_ITEM, _SMALLEST_ITEM), _LARGEST_ITEM)
        items: list[tuple[int, ...]] = []
        tails: list[tuple[int, ...]] = []
        ranges = [0]
        for place, (tile, blocks) in enumerate(zip(tiles, reach, strict=True)):
            cache = tile.cache
            items += _items(place * rows_a_tile, cache, min(blocks * _HORIZON, cache.capacity), size)
            ranges.append(len(items))
            tail = (cache.keys.data_ptr(), cache.values.data_ptr(), *cache.keys.stride()[:2])
            tails += [tail] * tile.num_tokens + [self._no_tail] * (rows_a_tile - tile.num_tokens)
        if len(items) > MOST_ITEMS:
            raise RuntimeError(f"a batch in {len(items)} pieces, {MOST_ITEMS} at most")
        self.capacity = max(LEAST_ITEMS, 1 << (len(items) - 1).bit_length())
        self._put(items, ranges, tails)
        self._made_for, self._rows_a_tile = made_for, rows_a_tile

    def _put(self, items: list[tuple[int, ...]], ranges: list[int], tails: list[tuple[int, ...]]) -> None:
        """Fills up what is left with items of no tokens, and rows without items that write nowhere."""
        host = self._items.writable()[: self.capacity]
        host[: len(items)] = torch.tensor(items, dtype=torch.int64).view(-1, kernels.ITEM_FIELDS)
        host[len(items) :] = 0
        self._items.upload(self.capacity)
        self._rows.writable()
        self._host_ranges[: len(ranges)] = torch.tensor(ranges)
        self._host_ranges[len(ranges) :] = len(items)
        rest = len(self._host_tails) // kernels.TAIL_FIELDS - len(tails)
        self._host_tails.copy_(torch.tensor([*tails, *[self._no_tail] * rest], dtype=torch.int64).flatten())
        self._rows.upload()


class Mirror:
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
