"""A chunk's prefill in slices: the same result whatever runs in between, and nothing is left of what was given up."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from clips import Clip
from until import until

from kvstore.key import Fingerprint, KVKey
from kvstore.memory import MemoryStore
from kvstore.video import VideoStore
from server.engine.ingest import Ingest
from server.models.slices import Slices
from server.models.videoxl.model import VideoXL
from server.video.errors import VideoCancelled
from server.video.reader import Sampling, VideoLimits

Drive = Callable[..., Any]


class BrokenError(RuntimeError):
    """What a slice raises."""


class Watched:
    """Calls ``do`` with what was made so far, amid the encoding of the chunk that begins at ``start_s``."""

    def __init__(self, model: VideoXL, start_s: float, do: Callable[[torch.Tensor], None]) -> None:
        self.made: list[weakref.ref[torch.Tensor]] = []
        self._encoding, self._start_s, self._do = model.encoding, start_s, do
        model.encoding = self._watch  # type: ignore[method-assign]

    def _watch(self, pixels: torch.Tensor, times_s: Any) -> Slices[torch.Tensor]:
        half = pixels.float() / 2
        yield
        if times_s[0] == self._start_s:
            self.made.append(weakref.ref(half))
            self._do(half)
        return (yield from self._encoding(pixels, times_s))


class Steps:
    """One prefill, whose steps the test takes."""

    def __init__(self, model: VideoXL, writers: ThreadPoolExecutor, clip: Clip) -> None:
        self.store = MemoryStore()
        self.wakes = threading.Semaphore(0)
        self.error: BaseException | None = None
        fingerprint = Fingerprint(model.fingerprint, 2, 16, "float32", 1.0, None)
        self.key = KVKey.of("0" * 64, fingerprint)
        videos = VideoStore(self.store)
        self.ingest = Ingest(self.key, fingerprint, model, videos, writers, self.wakes.release)
        self.thread = threading.Thread(target=self._run, args=(clip,))
        self.thread.start()

    def _run(self, clip: Clip) -> None:
        try:
            self.ingest.run(clip.path, Sampling(1.0), VideoLimits())
        except BaseException as error:
            self.error = error

    def take(self, most: int = 10_000) -> int:
        """So many slices, or all; how many there were."""
        for number in range(most):
            while not self.ingest.has_slice:
                if not self.thread.is_alive():
                    return number
                self.wakes.acquire(timeout=0.05)  # its end alone is not told
            self.ingest.step()
        return most


@pytest.fixture
def begin() -> Iterator[Callable[[VideoXL, Clip], Steps]]:
    begun: list[Steps] = []
    with ThreadPoolExecutor(2) as writers:

        def start(model: VideoXL, clip: Clip) -> Steps:
            begun.append(Steps(model, writers, clip))
            return begun[-1]

        yield start
        for steps in begun:
            steps.ingest.cancel()
            steps.thread.join(60)
            assert not steps.thread.is_alive()


def kvs_of(store: MemoryStore) -> dict[str, bytes]:
    """All that prefills have stored, but for the manifests, which tell how long they took."""
    return {key: bytes(store.get(key)) for key in store.keys("kv/") if not key.endswith("manifest")}


def all_gone(refs: list[weakref.ref[Any]]) -> bool:
    gc.collect()
    return not any(ref() is not None for ref in refs)


def test_two_prefills_and_questions_in_between_change_nothing(
    drive: Drive, model: VideoXL, begin: Callable[..., Steps], four_chunks: Clip, two_chunks: Clip
) -> None:
    """Bit for bit what each gives by itself, all its slices in one go."""
    alone = [begin(model, clip) for clip in (four_chunks, two_chunks)]
    for steps in alone:
        steps.take()
    driver = drive(prefill_share=0.2, max_tokens=20_000)
    short = driver.upload(two_chunks)
    answer = driver.start(short, max_tokens=20_000)
    long = driver.upload(four_chunks)
    assert long.status == "processed" and not answer.ended.is_set()
    driver.engine.cancel(answer.id)
    expected = [blob for steps in alone for blob in kvs_of(steps.store).values()]
    assert sorted(kvs_of(driver.store).values()) == sorted(expected) and len(expected) > 16


def test_interleaved_prefills_do_not_disturb_each_other(
    model: VideoXL, begin: Callable[..., Steps], four_chunks: Clip, two_chunks: Clip
) -> None:
    """Slice by slice in turn, as the policy never does it."""
    clips = (four_chunks, two_chunks)
    alone = [begin(model, clip) for clip in clips]
    num_slices = [steps.take() for steps in alone]
    assert min(num_slices) > 2 * 2 * 3, "a slice for every half of a layer"
    mixed = [begin(model, clip) for clip in clips]
    while any(steps.take(1) for steps in mixed):
        pass
    for one, other in zip(mixed, alone, strict=True):
        assert one.error is None and one.ingest.ended
        assert kvs_of(one.store) == kvs_of(other.store)


@pytest.mark.parametrize("num_slices", [1, 3, 9, 20, 30])
def test_a_prefill_that_is_stopped_within_a_chunk_keeps_nothing(
    model: VideoXL, begin: Callable[..., Steps], four_chunks: Clip, num_slices: int
) -> None:
    steps = begin(model, four_chunks)
    assert steps.take(num_slices) == num_slices
    assert steps.ingest.within_chunk
    prefill: Any = steps.ingest._prefill
    refs = [weakref.ref(prefill), weakref.ref(prefill._low.memory.cache.keys)]
    del prefill
    steps.ingest.cancel()
    steps.thread.join(60)
    assert isinstance(steps.error, VideoCancelled) and steps.ingest.ended
    assert steps.ingest.has_slice, "the step that lets go"
    assert not steps.ingest.step()
    assert all_gone(refs)
    assert not steps.ingest.has_slice and not steps.ingest.within_chunk


def test_a_prefill_whose_slice_fails_keeps_nothing(
    fresh_model: Callable[..., VideoXL], begin: Callable[..., Steps], four_chunks: Clip
) -> None:
    model = fresh_model()

    def fail(_: torch.Tensor) -> None:
        raise BrokenError("of no use")

    watched = Watched(model, 4.0, fail)
    steps = begin(model, four_chunks)
    steps.take(2)
    ref = weakref.ref(steps.ingest._prefill)
    steps.take()
    assert isinstance(steps.error, BrokenError)
    assert len(watched.made) == 1 and all_gone([*watched.made, ref]), "the error holds what was made"
    assert not steps.ingest.has_slice


def test_memory_of_the_chunks_goes_with_the_last_slice(
    model: VideoXL, begin: Callable[..., Steps], two_chunks: Clip
) -> None:
    steps = begin(model, two_chunks)
    steps.take(1)
    ref = weakref.ref(steps.ingest._prefill)
    steps.take()
    assert steps.error is None and all_gone([ref])


@pytest.mark.parametrize("how", ["delete", "fail"])
def test_the_others_go_on_when_a_chunk_is_given_up(
    drive: Drive, fresh_model: Callable[..., VideoXL], long_clip: Clip, two_chunks: Clip, four_chunks: Clip, how: str
) -> None:
    model = fresh_model()
    reached, released = threading.Event(), threading.Event()

    def give_up(_: torch.Tensor) -> None:
        if how == "fail":
            reached.set()
            raise BrokenError("of no use")
        reached.set()
        assert released.wait(60)

    watched = Watched(model, 40.0, give_up)  # only one of the clips is that long
    driver = drive(model=model, max_concurrent_prefills=2, max_tokens=20_000)
    short = driver.upload(two_chunks)
    answer = driver.start(short, max_tokens=20_000)
    lost = driver.upload(long_clip, wait=False)
    other = driver.upload(four_chunks, wait=False)
    assert reached.wait(60)
    if how == "delete":
        driver.engine.library.delete(lost.id, "")
        released.set()
    else:
        assert driver.wait_processed(lost).status == "error"
    assert driver.wait_processed(other).status == "processed"
    until(lambda: all_gone(list(watched.made)), 60)
    assert not answer.ended.is_set(), "the stream went on"
    assert driver.ask(other).finish_reason == "length"
    driver.engine.cancel(answer.id)
    again = driver.upload(four_chunks)
    assert again.status == "processed"


def test_an_engine_that_has_nothing_to_do_sleeps(
    drive: Drive, fresh_model: Callable[..., VideoXL], long_clip: Clip, two_chunks: Clip
) -> None:
    """Also behind prefills that have ended in every way."""
    model = fresh_model()
    driver = drive(model=model, start=False)
    engine, num_steps = driver.engine, 0
    step = engine.step

    def count() -> bool:
        nonlocal num_steps
        num_steps += 1
        return step()

    engine.step = count
    engine.start()
    driver.upload(two_chunks)
    with driver.slowly():
        deleted = driver.upload(long_clip, wait=False)
        until(lambda: driver.num_prefilled > 6, 60)
        engine.library.delete(deleted.id, "")
    driver.ask(None)

    def is_asleep() -> bool:
        before = num_steps
        threading.Event().wait(0.3)
        return num_steps <= before + 3  # a message may have come in

    until(is_asleep, 60)
