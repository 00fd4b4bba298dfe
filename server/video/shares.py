"""Which of several decoder processes decodes which frame.

The frames decoded from one keyframe are a segment: nothing before it is needed for them. The processes take turns at
the segments, since the frames are wanted in order and each process can run ahead only as far as its memory goes.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
PROCESS_NBYTES = 128 << 20
"""Writable memory of a decoder process before it decodes."""
DECODER_PICTURES = 16
"""Pictures, as large as RGB ones, that a decoder may hold."""
MIN_PIXELS = 400_000_000
"""Work that is worth a process of its own: starting it takes as long as decoding a third of that."""


def num_cores() -> int:
    """The cores that this process may use."""
    count = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # none, or no limit: "max 100000"
        quota_us, period_us = map(int, CGROUP_CPU_MAX.read_text().split())
        count = min(count, max(1, quota_us // period_us))
    return count


class Split:
    """How the wanted frames of a video are shared out.

    ``places`` is message P of :mod:`server.video.worker`, ``frame_nbytes`` the size of one frame. There are at most
    ``max_processes``, and as many as there is work for within ``memory_nbytes`` for all together; with None the cores
    and the amount of work decide.

    ``turns`` [frames] tells which process decodes each frame; ``memory_nbytes`` is for each of them, and
    ``ahead_nbytes`` of it for frames that wait for the reader: one segment or two.
    """

    def __init__(
        self, places: NDArray[np.int64], frame_nbytes: int, memory_nbytes: int, max_processes: int | None
    ) -> None:
        _, key_pts, num_decoded = places
        segments = np.cumsum(np.append(False, key_pts[1:] != key_pts[:-1]))
        longest = int(np.bincount(segments).max())
        segment_nbytes = longest * frame_nbytes
        process_nbytes = PROCESS_NBYTES + DECODER_PICTURES * frame_nbytes
        if max_processes is None:
            num_pixels = float(num_decoded.sum()) * frame_nbytes / 3
            max_processes = min(num_cores(), math.ceil(num_pixels / MIN_PIXELS))
        most = min(max_processes, int(segments[-1]) + 1, memory_nbytes // (process_nbytes + segment_nbytes))
        self.num_processes = max(1, most)
        self.memory_nbytes = memory_nbytes // self.num_processes
        self.ahead_nbytes = 0
        if self.num_processes > 1:  # one process is ahead of the reader as it is
            self.ahead_nbytes = min(2 * segment_nbytes, self.memory_nbytes - process_nbytes)
        self.turns: NDArray[np.int64] = segments % self.num_processes
