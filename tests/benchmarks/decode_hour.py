"""Measures reading one hour of 1080p: ``python tests/benchmarks/decode_hour.py [--video FILE] [--out RESULT.json]``.

Without a file it makes one: a minute of moving texture, H.264 at 30 frames per second with B-frames and a keyframe
every 2 s, encoded once and repeated 60 times; ``--size 640x360x25`` makes a smaller one at 25. Prints JSON for every
number of decoder processes in ``--processes`` (0: as many as the server would take): sampled and coded frames per
second (the hour's frames, whether they had to be decoded or not), the decoders' CPU time, and the peak memory.
``--before`` reads with another checkout of this project first, in the same run; that one must give the same frames.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import av
import psutil

from server.bench.long_video import write_long_videos
from server.video.reader import Sampling, VideoLimits, VideoReader

WIDTH, HEIGHT, FPS, MINUTES = 1920, 1080, 30, 60


def make_hour(path: Path, width: int = WIDTH, height: int = HEIGHT, fps: int = FPS, minutes: int = MINUTES) -> None:
    """Write the hour of video to ``path`` (mp4)."""
    write_long_videos({path: minutes}, width, height, fps)


class PeakMemory(threading.Thread):
    """Watches the resident memory of this process and of its children, summed, until ``stop`` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.parent_nbytes = self.worker_nbytes = 0
        self.num_workers = 0
        self.others = psutil.Process().children()

    def run(self) -> None:
        process = psutil.Process()
        while not self.stop.wait(0.05):
            self.parent_nbytes = max(self.parent_nbytes, process.memory_info().rss)
            children, nbytes = [child for child in process.children() if child not in self.others], 0
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    nbytes += child.memory_info().rss
            self.worker_nbytes = max(self.worker_nbytes, nbytes)
            self.num_workers = max(self.num_workers, len(children))


def measure(path: Path, fps: float, num_threads: int, max_processes: int | None) -> dict[str, object]:
    """Read ``path`` once at ``fps``; ``max_processes`` as the reader takes it, -1 for one that does not know it."""
    limits = VideoLimits() if max_processes == -1 else VideoLimits(max_processes=max_processes)
    before_nbytes, before_s = psutil.Process().memory_info().rss, cpu_of_children_s()
    memory = PeakMemory()
    memory.start()
    digest = hashlib.blake2b(digest_size=8)
    begin_s = time.monotonic()
    with VideoReader(path, Sampling(fps), limits, num_threads=num_threads) as reader:
        first_s = time.monotonic() - begin_s
        info = reader.info
        num_frames = 0
        for frames in reader:
            num_frames += len(frames)
            digest.update(frames.pixels[:, ::16].tobytes())
    wall_s = time.monotonic() - begin_s
    memory.stop.set()
    memory.join()
    if num_frames != info.num_frames:
        raise SystemExit(f"{num_frames} frames came, {info.num_frames} were promised")
    return {
        "num_processes": memory.num_workers,
        "num_threads": num_threads if memory.num_workers == 1 else 1,
        "sampled_frames": num_frames,
        "wall_s": round(wall_s, 1),
        "first_frame_s": round(first_s, 2),
        "sampled_frames_per_s": round(num_frames / wall_s, 1),
        "coded_frames_per_s": round(describe(path)["coded_frames"] / wall_s),
        "times_realtime": round(info.duration_s / wall_s, 1),
        "decoders_cpu_s": round(cpu_of_children_s() - before_s, 1),
        "digest": digest.hexdigest(),
        "peak_rss_mb": {
            "parent_before": round(before_nbytes / 1e6),
            "parent": round(memory.parent_nbytes / 1e6),
            "workers": round(memory.worker_nbytes / 1e6),
        },
    }


def cpu_of_children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def describe(path: Path) -> dict[str, object]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        size = {"width": stream.width, "height": stream.height}
        duration_s = round(float(stream.duration * stream.time_base), 3)
        return {"nbytes": path.stat().st_size, **size, "coded_frames": stream.frames, "duration_s": duration_s}


def measure_before(checkout: Path, path: Path, given: argparse.Namespace) -> dict[str, object]:
    """The same of another checkout's reader."""
    argv = [sys.executable, __file__, "--video", str(path), "--fps", str(given.fps), "--threads", str(given.threads)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    run = subprocess.run(
        [*argv, "--processes", "-1"], env=environment, cwd=checkout, stdout=subprocess.PIPE, check=True
    )
    return json.loads(run.stdout)["runs"][0]


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fps", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2, help="of a decoder process that is alone")
    parser.add_argument("--size", default=f"{WIDTH}x{HEIGHT}x{FPS}")
    parser.add_argument("--minutes", type=int, default=MINUTES)
    parser.add_argument("--processes", type=int, nargs="+", default=[0])
    parser.add_argument("--before", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.video
        if path is None:
            path = Path(folder) / "hour.mp4"
            # In a process of its own: the encoder's memory must not count.
            size = (*map(int, given.size.split("x")), given.minutes)
            maker = multiprocessing.get_context("spawn").Process(target=make_hour, args=(path, *size))
            maker.start()
            maker.join()
        result: dict[str, object] = {
            "command": shlex.join(["python", *sys.argv]),
            "cpu": cpu_model(),
            "num_cpus": os.cpu_count(),
            "python": platform.python_version(),
            "video": describe(path),
            "sampling_fps": given.fps,
        }
        if given.before:
            result["before"] = measure_before(given.before.resolve(), path, given)
        result["runs"] = [measure(path, given.fps, given.threads, number or None) for number in given.processes]
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
