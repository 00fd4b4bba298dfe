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


@dataclass(frozen=True, slots=True, eq=False)
class _Wait:
    future: Future[Any]
    end_s: float
    timeout_s: float
    then: Callable[[Future[Any]], None]


class Reads:
    """Used by the engine thread alone."""

    def __init__(self, num_threads: int, post: Callable[[Callable[[], None]], None]) -> None:
        """``post`` has something done on the engine thread."""
        self._threads = ThreadPoolExecutor(num_threads, "x2l-read")
        self._ahead = ThreadPoolExecutor(1, "x2l-read-ahead")  # takes no thread from what is waited for
        self._post = post
        self._waits: set[_Wait] = set()

    def close(self) -> None:
        """Waits for what runs; what waits is dropped."""
        for threads in (self._threads, self._ahead):
            threads.shutdown(wait=False, cancel_futures=True)
        for threads in (self._threads, self._ahead):
            threads.shutdown()

    @property
    def num_waits(self) -> int:
        """How many wait for a read."""
        return len(self._waits)

    def submit(self, work: Callable[[], Result], then: Callable[[Future[Result]], None], timeout_s: float) -> None:
        """Has ``work`` done, then calls ``then``: :meth:`start` and :meth:`wait` in one."""
        self.wait(self.start(work), then, timeout_s)

    def start(self, work: Callable[[], Result], *, ahead: bool = False) -> Future[Result]:
        """Has ``work`` done; with ``ahead`` one after the other, on a thread that nothing else uses."""
        return (self._ahead if ahead else self._threads).submit(work)

    def wait(self, future: Future[Result], then: Callable[[Future[Result]], None], timeout_s: float) -> None:
        """Calls ``then`` with ``future`` once it is done, or with one that failed with StoreUnavailable when it takes
        longer than ``timeout_s`` from now. Several may wait for the same."""
        wait = _Wait(future, time.monotonic() + timeout_s, timeout_s, then)
        self._waits.add(wait)
        future.add_done_callback(lambda _: self._post(partial(self._done, wait)))

    def time_left_s(self) -> float | None:
        """Until the next read is overdue; None where nothing is read."""
        if not self._waits:
            return None
        return max(0.0, min(wait.end_s for wait in self._waits) - time.monotonic())

    def expire(self) -> None:
        """Gives up what is overdue. A thread that hangs in it is not to be had back before the store answers."""
        now_s = time.monotonic()
        overdue = {wait for wait in self._waits if wait.end_s <= now_s}
        self._waits -= overdue
        for wait in overdue:
            if all(other.future is not wait.future for other in self._waits):
                wait.future.cancel()
            failed: Future[Any] = Future()
            failed.set_exception(StoreUnavailable(f"the store did not answer within {wait.timeout_s:g} s"))
            wait.then(failed)

    def _done(self, wait: _Wait) -> None:
        if wait in self._waits:
            self._waits.remove(wait)
            wait.then(wait.future)
