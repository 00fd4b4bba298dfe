"""Several processes that each ask one video at a time: the whole of a large machine, where one process uses a part."""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from server.bench.local import LocalBench
from server.bench.records import Record
from server.bench.run import Job, run_job
from server.bench.synthetic import make_missing
from server.models.base import VideoModel

_POLL_S = 0.5
Answered = tuple[Job, str, list[Record]]


def run_jobs(
    load: Callable[..., VideoModel], num_workers: int, videos_folder: Path, work: Path, jobs: Sequence[Job]
) -> Generator[Answered]:
    """The records of every method of every job, as they come; the longest videos go first.

    Every process makes the videos that it finds missing and loads the model once; the CPUs are shared out evenly.
    Closing the iterator stops the processes after the method that they are at. Raises BrokenProcessPool where one was
    killed, and what a process raised.
    """
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    context = multiprocessing.get_context("spawn")
    answers: Queue[Answered] = context.Queue()
    stop = context.Event()
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    waiting = sum(len(job.left) for job in jobs)
    with ProcessPoolExecutor(
        num_workers, context, initializer=_start, initargs=(load, threads, answers, stop)
    ) as processes:
        running = [
            processes.submit(_work, job, videos_folder, work)
            for job in sorted(jobs, key=lambda job: job.size, reverse=True)
        ]
        try:
            while waiting:
                try:
                    yield answers.get(timeout=_POLL_S)
                    waiting -= 1
                except queue.Empty:
                    for one in running:
                        if one.done():
                            one.result()
        finally:
            stop.set()
            processes.shutdown(cancel_futures=True)
            shutil.rmtree(work, ignore_errors=True)


_load: Callable[..., VideoModel]
_model: VideoModel
_put: Callable[[Answered], None]
_stopped: Callable[[], bool]


def _start(load: Callable[..., VideoModel], threads: int, answers: Queue[Any], stop: Event) -> None:
    global _load, _model, _put, _stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that owns the pool
    torch.set_num_threads(threads)
    _load, _model, _put, _stopped = load, load(), answers.put, stop.is_set


def _work(job: Job, videos_folder: Path, work: Path) -> None:
    if _stopped():
        return
    path = make_missing(job.video, videos_folder)
    with LocalBench(_load, _model, work / path.stem) as bench:
        for name, records in run_job(bench, job, path):
            _put((job, name, records))
            if _stopped():
                return
