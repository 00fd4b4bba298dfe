"""What questions read from the store: on threads of its own, and never for longer than a question can wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from kvstore.errors import StoreUnavailable

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Read:
    end_s: float
    timeout_s: float
    then: Callable[[Future[Any]], None]


class Reads:
    """Used by the engine thread alone."""

    def __init__(self, num_threads: int, post: Callable[[Callable[[], None]], None]) -> None:
        """``post`` has something done on the engine thread."""
        self._threads = ThreadPoolExecutor(num_threads, "x2l-read")
        self._post = post
        self._open: dict[Future[Any], _Read] = {}

    def close(self) -> None:
        """Waits for what runs; what waits is dropped."""
        self._threads.shutdown(cancel_futures=True)

    def submit(self, work: Callable[[], Result], then: Callable[[Future[Result]], None], timeout_s: float) -> None:
        """Has ``work`` done, then calls ``then`` with its future, or with one that failed with StoreUnavailable when
        it takes longer than ``timeout_s``."""
        future = self._threads.submit(work)
        self._open[future] = _Read(time.monotonic() + timeout_s, timeout_s, then)
        future.add_done_callback(lambda done: self._post(partial(self._done, done)))

    def time_left_s(self) -> float | None:
        """Until the next read is overdue; None where nothing is read."""
        if not self._open:
            return None
        return max(0.0, min(read.end_s for read in self._open.values()) - time.monotonic())

    def expire(self) -> None:
        """Gives up what is overdue. A thread that hangs in it is not to be had back before the store answers."""
        now_s = time.monotonic()
        for future, read in [(future, read) for future, read in self._open.items() if read.end_s <= now_s]:
            del self._open[future]
            future.cancel()
            failed: Future[Any] = Future()
            failed.set_exception(StoreUnavailable(f"the store did not answer within {read.timeout_s:g} s"))
            read.then(failed)

    def _done(self, future: Future[Any]) -> None:
        read = self._open.pop(future, None)
        if read is not None:
            read.then(future)
