"""What is likely to be asked for next: what to read ahead, and what was, until a question takes it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.caches import LowKey
from server.engine.transfer import Arrival
from server.engine.video import Video


@dataclass(frozen=True, slots=True)
class Wish:
    """An L-KV that takes ``nbytes`` on the device."""

    video: Video
    index: int
    nbytes: int

    @property
    def key(self) -> LowKey:
        return self.video.key, self.index


class Prefetch:
    """L-KVs that were read ahead, at most ``budget_nbytes`` of them, and those that should be. It takes no room from
    those that questions have used: only what was read ahead goes for what is read ahead, the oldest first.

    Used by the engine thread alone.
    """

    def __init__(self, budget_nbytes: int) -> None:
        self.budget_nbytes = budget_nbytes
        self._wishes: list[Wish] = []
        self._held: OrderedDict[LowKey, Arrival] = OrderedDict()  # first to go first
        self.nbytes = 0
        """Of those held, on the device."""

    def expect(self, wishes: Sequence[Wish]) -> None:
        """Has ``wishes`` read first, best first. What was expected before of the same videos is forgotten, and so is
        the last of what has no room together."""
        videos = {wish.video.key for wish in wishes}
        wanted = {wish.key: wish for wish in [*wishes, *(w for w in self._wishes if w.video.key not in videos)]}
        self._wishes, room = [], self.budget_nbytes
        for wish in wanted.values():
            if wish.nbytes <= room:
                self._wishes.append(wish)
                room -= wish.nbytes
        for wish in reversed(self._wishes):
            if wish.key in self._held:
                self._held.move_to_end(wish.key)

    def next(self) -> Wish | None:
        """What to read ahead now; each is told once."""
        while self._wishes:
            wish = self._wishes.pop(0)
            if wish.key not in self._held:
                return wish
        return None

    def hold(self, key: LowKey, arrival: Arrival) -> None:
        """Keeps what was read ahead, until it is taken or others need its room."""
        self.take(key)
        self._held[key] = arrival
        self.nbytes += arrival.kv.nbytes
        while self.nbytes > self.budget_nbytes:
            self.take(next(iter(self._held)))

    def take(self, key: LowKey) -> Arrival | None:
        """What was read ahead under ``key``, which is held no longer."""
        arrival = self._held.pop(key, None)
        if arrival is not None:
            self.nbytes -= arrival.kv.nbytes
        return arrival
