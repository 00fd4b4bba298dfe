"""L-KVs on their way from the store: what a question waits for, and in quiet moments what it may want next."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from compression.kv import ChunkKV
from kvstore.base import NewBuffer
from kvstore.errors import CorruptBlob, MissingBlob
from kvstore.key import KVKey
from kvstore.video import VideoStore
from server.engine.caches import Caches, LowKey
from server.engine.metrics import EngineMetrics
from server.engine.options import EngineOptions
from server.engine.prefetch import Prefetch, Wish
from server.engine.question import Question
from server.engine.reads import Reads
from server.engine.transfer import Arrival, Transfer
from server.engine.video import Video
from server.models.base import VideoModel

_log = logging.getLogger(__name__)

_MOST_AHEAD = 4
"""L-KVs that are being read ahead or are next; they go on while the engine computes."""
_MOST_REMEMBERED = 1024
"""Videos whose last selection is known."""

Wanted = tuple[int, Video, int]
"""A chunk: its place in the cache, its video, its index in that."""
Outcome = Future[Arrival | MissingBlob | CorruptBlob]


class Reloads:
    """Reads every L-KV once at a time, however many questions want it. What is likely to be wanted next is read ahead,
    one chunk at a time, and none is begun while a question waits for the store: it is slowed by one at most.

    Used by the engine thread alone.
    """

    def __init__(
        self,
        model: VideoModel,
        kvs: VideoStore,
        caches: Caches,
        reads: Reads,
        options: EngineOptions,
        metrics: EngineMetrics,
        *,
        prefetch_nbytes: int,
        repair: Callable[[Video], None],
    ) -> None:
        """``repair`` makes the damaged L-KVs of a video again."""
        self._kvs = kvs
        self._caches = caches
        self._reads = reads
        self._metrics = metrics
        self._timeout_s = options.reload_timeout_s
        self._repair = repair
        self._transfer = Transfer(model.device, options.reader_threads + 1)
        self._flights: dict[LowKey, Outcome] = {}
        self._ahead: set[Outcome] = set()
        """Those of them that nobody had asked for when they were begun."""
        self._prefetch = Prefetch(prefetch_nbytes)
        self._selected: OrderedDict[KVKey, frozenset[int]] = OrderedDict()  # least recently asked about first
        self._token_nbytes = model.token_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes on the device that were read ahead."""
        return self._prefetch.nbytes

    def reload(self, wanted: Sequence[Wanted], then: Callable[[Sequence[Outcome]], None]) -> None:
        """Has L-KVs brought to the device, and calls ``then`` with what became of each, at once where nothing is to be
        read; those that take too long have failed with StoreUnavailable."""
        found: dict[int, Outcome] = {}

        def tell(place: int, key: LowKey, outcome: Outcome) -> None:
            if self._prefetch.take(key) is not None:  # it was being read ahead
                self._metrics.prefetch_hits.inc()
            found[place] = outcome
            if len(found) == len(wanted):
                then([found[place] for place, *_ in wanted])

        if not wanted:
            then([])
            return
        for flight in self._ahead:
            flight.cancel()  # unless it runs
        for place, video, index in wanted:
            key = (video.key, index)
            held = self._prefetch.take(key)
            if held is not None:
                self._metrics.prefetch_hits.inc()
                outcome: Outcome = Future()
                outcome.set_result(replace(held, nbytes=0))
                tell(place, key, outcome)
            else:
                flight = self._flight(key)
                then_tell = partial(self._landed, key, flight, partial(tell, place, key))
                self._reads.wait(flight, then_tell, self._timeout_s)

    def expect(self, question: Question) -> None:
        """Has read ahead what ``question`` will want perhaps, if it has not been scored yet; if it has, what the next
        one will."""
        if not self._prefetch.budget_nbytes:
            return
        self._prefetch.expect([self._wish(question, place) for place in question.expected(self._selected)])
        chosen = [self._wish(question, place) for place in question.selection.chunks]
        if sum(wish.nbytes for wish in chosen) > self._prefetch.budget_nbytes:
            return  # a few of very many are no help
        for key in {wish.video.key for wish in chosen}:
            self._selected[key] = frozenset(wish.index for wish in chosen if wish.video.key == key)
            self._selected.move_to_end(key)
        while len(self._selected) > _MOST_REMEMBERED:
            self._selected.popitem(last=False)

    def read_ahead(self) -> None:
        """Begins to read what is most likely to be wanted, unless a question waits for the store."""
        while self._reads.num_waits == len(self._ahead) < _MOST_AHEAD and (wish := self._prefetch.next()) is not None:
            if self._caches.find_low(wish.key) is None and wish.key not in self._flights:
                flight = self._begin(wish.key, ahead=True)
                self._ahead.add(flight)
                then = partial(self._landed, wish.key, flight, partial(self._read_ahead, wish, flight))
                self._reads.wait(flight, then, self._timeout_s)

    def _wish(self, question: Question, place: int) -> Wish:
        video, index, num_tokens = question.low_of(place)
        return Wish(video, index, num_tokens * self._token_nbytes)

    def _flight(self, key: LowKey) -> Outcome:
        """The read of an L-KV, which goes on already or begins now."""
        flight = self._flights.get(key)
        return self._begin(key) if flight is None or flight.cancelled() else flight

    def _begin(self, key: LowKey, *, ahead: bool = False) -> Outcome:
        self._flights[key] = self._reads.start(partial(self._read, key), ahead=ahead)
        return self._flights[key]

    def _read(self, key: LowKey) -> Arrival | MissingBlob | CorruptBlob:
        """On a reading thread."""

        def read(buffer: NewBuffer) -> ChunkKV | MissingBlob | CorruptBlob:
            return self._kvs.read_low_of([key], buffer)[0]

        return self._transfer.bring(read, self._caches.prepare_low)

    def _landed(self, key: LowKey, flight: Outcome, tell: Callable[[Outcome], None], outcome: Outcome) -> None:
        """A flight is over for one who waits for it."""
        if self._flights.get(key) is flight:
            del self._flights[key]
        tell(outcome)

    def _read_ahead(self, wish: Wish, flight: Outcome, outcome: Outcome) -> None:
        """Nobody has asked for it yet, so nobody is told when it fails; but damage is damage."""
        self._ahead.discard(flight)
        if outcome.cancelled() or outcome.exception() is not None:
            return
        low = outcome.result()
        if isinstance(low, Arrival):
            self._metrics.prefetched.inc()
            self._prefetch.hold(wish.key, low)
        elif isinstance(low, CorruptBlob):
            _log.warning("an L-KV is damaged: %s", low)
            self._repair(wish.video)
