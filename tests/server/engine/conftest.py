"""A small random model behind a real engine, with real clips and stores."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import Clip, Clips
from until import until

from compression.select import Dial
from kvstore.base import Store
from kvstore.memory import MemoryStore
from server.engine.engine import Engine
from server.engine.library import FileRecord
from server.engine.options import EngineOptions
from server.engine.request import Delta, Outcome, Request, SamplingParams
from server.models.base import Turn
from server.models.lm.decoder import DecoderConfig
from server.models.tiny.model import TinyModules, assemble, read_config
from server.models.videoxl.model import VideoXL
from server.video.reader import Sampling

TIMEOUT_S = 60.0

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 16,
    "tie_word_embeddings": False,
    "frames_per_chunk": 4,
    "low_cmpr_ratio": 2,
    "high_cmpr_ratio": 16,
    "default_reload": 2,
    "scorer_heads": None,
}


def build_model(**overrides: object) -> VideoXL:
    """A random model, the same at every call, that never ends an answer by itself."""
    config = {**read_config(), **SMALL, **overrides}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        modules = TinyModules(DecoderConfig.of(config))
    model = assemble(modules.eval(), config)
    model.end_ids = frozenset()
    return model


@dataclass
class Answer:
    """The deltas of one request as they come; :meth:`wait` for the last."""

    id: str
    deltas: list[Delta] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    first: threading.Event = field(default_factory=threading.Event)

    def on_delta(self, delta: Delta) -> None:
        assert not self.ended.is_set(), "a delta after the final one"
        self.deltas.append(delta)
        self.times_s.append(time.perf_counter())
        self.first.set()
        if delta.final:
            self.ended.set()

    def wait(self) -> Answer:
        assert self.ended.wait(TIMEOUT_S), "no final delta"
        return self

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def finish_reason(self) -> str | None:
        return self.deltas[-1].finish_reason

    @property
    def error(self) -> Exception | None:
        return self.deltas[-1].error

    @property
    def outcome(self) -> Outcome:
        outcome = self.wait().deltas[-1].outcome
        assert outcome is not None, self.error
        return outcome


class Driver:
    """An engine and what a client does with it."""

    _ids = itertools.count()

    def __init__(self, engine: Engine, store: Store, folder: Path) -> None:
        self.engine = engine
        self.store = store
        self._folder = folder

    def upload(self, clip: Clip | Path, *, wait: bool = True, **arguments: object) -> FileRecord:
        path = self._folder / f"upload-{next(self._ids)}"
        shutil.copy(clip.path if isinstance(clip, Clip) else clip, path)
        defaults = {
            "filename": "clip.mp4",
            "purpose": "vision",
            "sampling": Sampling(1.0),
            "tenant": "",
            "expires_after_s": None,
            "source": "upload",
        }
        record = self.engine.library.create(path, **{**defaults, **arguments})  # type: ignore[arg-type]
        return self.wait_processed(record) if wait else record

    def wait_processed(self, record: FileRecord) -> FileRecord:
        """Waits until a file has left the status ``uploaded``."""
        pause = threading.Event()
        for _ in range(int(TIMEOUT_S * 100)):
            now = self.engine.library.get(record.id, record.tenant)
            assert now is not None
            if now.status != "uploaded":
                return now
            pause.wait(0.01)
        raise AssertionError("still uploaded")

    def wait_whole(self, record: FileRecord) -> None:
        """Waits until nothing of a file is being made any more."""
        until(lambda: self.engine.library.video(record.id, record.tenant).job is None, TIMEOUT_S)

    @property
    def num_prefilled(self) -> int:
        """Chunks that were computed, also by a step that is just ending."""
        if self.engine.ready:
            ended = threading.Event()
            self.engine._inbox.put(ended.set)
            ended.wait(TIMEOUT_S)
        return int(self.engine.metrics.registry.get_sample_value("x2l_prefilled_chunks_total") or 0)

    def start(
        self,
        records: FileRecord | Sequence[FileRecord] | None,
        question: str = "What code is on the red star?",
        *,
        dial: Dial | None = None,
        generate: bool = True,
        images: Sequence[torch.Tensor] = (),
        **params: object,
    ) -> Answer:
        """Asks about one file, several or none."""
        files = [] if records is None else [records] if isinstance(records, FileRecord) else list(records)
        answer = Answer(f"request-{next(self._ids)}")
        request = Request(
            id=answer.id,
            turns=(Turn("user", question),),
            params=SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **params}),  # type: ignore[arg-type]
            file_ids=tuple(file.id for file in files),
            tenant=files[0].tenant if files else "",
            dial=dial or Dial(),
            generate=generate,
            images=tuple(images),
        )
        self.engine.submit(request, answer.on_delta)
        return answer

    @contextlib.contextmanager
    def slowly(self) -> Iterator[None]:
        """Every chunk that is computed meanwhile takes its time, so that a prefill can be caught amid them."""
        lane, over = self.engine._lane, threading.Event()
        counted = lane._on_chunk

        def count(took_s: float) -> None:
            counted(took_s)
            over.wait(0.2)

        lane._on_chunk = count
        try:
            yield
        finally:
            over.set()
            lane._on_chunk = counted

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is started meanwhile comes to the engine all at once."""
        over = threading.Event()
        self.engine._inbox.put(partial(over.wait, TIMEOUT_S))
        try:
            yield
        finally:
            over.set()

    def ask(self, records: Any, question: str = "What code is on the red star?", **arguments) -> Answer:
        return self.start(records, question, **arguments).wait()


@pytest.fixture(scope="session")
def model() -> VideoXL:
    return build_model()


@pytest.fixture
def fresh_model() -> Callable[..., VideoXL]:
    """A model of the test's own, to change or to spy on."""
    return build_model


@pytest.fixture
def drive(model: VideoXL, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """``drive(store, model=..., **options)`` starts an engine; all of them are closed in the end."""
    opened: list[Driver] = []
    others = set(threading.enumerate())  # a live server of other tests may run beside

    def open_driver(store: Store | None = None, *, model: VideoXL = model, start: bool = True, **options) -> Driver:
        store = store or MemoryStore()
        engine = Engine(model, store, EngineOptions(**options))
        opened.append(Driver(engine, store, tmp_path))
        if start:
            engine.start()
        return opened[-1]

    yield open_driver
    for driver in opened:
        driver.engine.close()
    names = {thread.name for thread in set(threading.enumerate()) - others}
    assert not {name for name in names if name.startswith("x2l-")}, names


@pytest.fixture(scope="session")
def four_chunks(clips: Clips) -> Clip:
    """14 s: chunks of 4, 4, 4 and 2 frames at 1 fps."""
    return clips("mp4", width=160, height=96, fps=5.0, duration_s=14.0)


@pytest.fixture(scope="session")
def two_chunks(clips: Clips) -> Clip:
    return clips("mp4", width=112, height=160, fps=5.0, duration_s=7.0)


@pytest.fixture(scope="session")
def long_clip(clips: Clips) -> Clip:
    """50 chunks: long enough to be caught in the middle of its prefill."""
    return clips("mp4", width=128, height=64, fps=2.0, duration_s=200.0)
