"""The synthetic benchmark's videos: which ones a run takes, and their mp4 files in a folder that runs share."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch

from server.models.tiny.make_video import MAX_CHUNKS, exam_entry, make_video, plan_video
from server.models.tiny.world import FIRST_TRAINING_SEED
from server.spool import Spool

FIRST_SEED = 1000
"""Seeds below serve other measurements and the choice of scoring heads."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a video, its answer, and where that is shown.

    ``chunks`` hold the answer; ``start_s`` and ``end_s`` bound it. An answer that is shown nowhere (No) has none.
    """

    index: int
    type: str
    text: str
    answer: str
    chunks: tuple[int, ...]
    start_s: float | None
    end_s: float | None


@dataclass(frozen=True)
class SyntheticVideo:
    """The video of a seed and a length in chunks."""

    chunks: int
    seed: int

    @property
    def filename(self) -> str:
        return f"chunks-{self.chunks}-seed-{self.seed}.mp4"

    @cached_property
    def exam(self) -> list[dict[str, Any]]:
        """The questions as the JSON beside the mp4 holds them."""
        plan = plan_video(self.seed, self.chunks)
        return [exam_entry(question, plan.phase_s) for question in plan.questions]

    @property
    def questions(self) -> tuple[Question, ...]:
        return tuple(
            Question(
                index, one["type"], one["question"], one["answer"], tuple(one["chunks"]), one["start_s"], one["end_s"]
            )
            for index, one in enumerate(self.exam)
        )

    def is_made(self, folder: Path) -> bool:
        """Whether the folder has the mp4, made by a generator that asks the same questions."""
        path = folder / self.filename
        try:
            made = json.loads(path.with_suffix(".json").read_text())["questions"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return path.is_file() and bool(made == self.exam)


def choose_videos(seed: int, counts: dict[int, int]) -> list[SyntheticVideo]:
    """``counts`` videos of every length in chunks, the same for the same ``seed``; more of them begin with the same.

    Raises ValueError for a length that no video can have.
    """
    for chunks in counts:
        if not 1 <= chunks <= MAX_CHUNKS:
            raise ValueError(f"the number of chunks must lie in 1..{MAX_CHUNKS}, got {chunks}")
    videos = []
    for chunks, count in sorted(counts.items()):
        rng = Random(f"{seed} {chunks}")
        seeds: dict[int, None] = {}
        while len(seeds) < count:
            seeds[rng.randrange(FIRST_SEED, FIRST_TRAINING_SEED)] = None
        videos += [SyntheticVideo(chunks, one) for one in seeds]
    return videos


@contextmanager
def making(
    videos: Sequence[SyntheticVideo], folder: Path, num_processes: int | None = None
) -> Iterator[Callable[[SyntheticVideo], Path]]:
    """Has the missing ones made, in order, by ``num_processes`` (None: one a CPU) beside whatever else is done.

    Yields a function that gives a video's path as soon as it is there; it raises what the making raised, and
    BrokenProcessPool where a process was killed. On leaving the processes are ended, and what they were at is made anew
    the next time. What a killed run was at goes as well. Raises OSError for the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [video for video in videos if not video.is_made(folder)]
    if not missing:
        yield lambda video: folder / video.filename
        return
    processes = min(num_processes or os.cpu_count() or 1, len(missing))
    # Apart, because another run may be making the same.
    with closing(Spool(folder)) as apart:
        others = multiprocessing.active_children()
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker)
        results = {video: pool.submit(_make, video, apart.folder, folder) for video in missing}
        makers = [child for child in multiprocessing.active_children() if child not in others]
        try:

            def path_of(video: SyntheticVideo) -> Path:
                if video in results:
                    results[video].result()
                return folder / video.filename

            yield path_of
        finally:
            for maker in makers:
                maker.kill()  # it has nothing to clear up, and nothing can keep it from ending
            pool.shutdown(cancel_futures=True)  # before their folder goes


def make_missing(video: SyntheticVideo, folder: Path) -> Path:
    """The video's path in ``folder``, where it is made now unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not video.is_made(folder):
        with closing(Spool(folder)) as apart:
            _make(video, apart.folder, folder)
    return folder / video.filename


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that owns the pool
    os.nice(5)  # the measurement beside goes first
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's processes do not notice by themselves that nobody is there any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(video: SyntheticVideo, apart: Path, folder: Path) -> None:
    made = apart / video.filename
    make_video(made, video.seed, video.chunks)
    for path in (made.with_suffix(".json"), made):
        path.replace(folder / path.name)
