"""Measures reading one hour of 1080p: ``python tests/benchmarks/decode_hour.py [--video FILE] [--out RESULT.json]``.

Without a file it makes one: a minute of moving texture, H.264 at 30 frames per second with B-frames and a keyframe
every 2 s, encoded once and repeated 60 times. Prints JSON: frames per second, and the peak memory of both processes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil

from server.video.reader import Sampling, VideoLimits, VideoReader

WIDTH, HEIGHT, FPS, MINUTES = 1920, 1080, 30, 60


def make_hour(path: Path, width: int = WIDTH, height: int = HEIGHT, fps: int = FPS, minutes: int = MINUTES) -> None:
    """Write the hour of video to ``path`` (mp4)."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (2 * height // 8, 2 * width // 8, 3), np.uint8)
    texture = coarse.repeat(8, 0).repeat(8, 1) // 2
    texture += generator.integers(0, 64, texture.shape, np.uint8)
    packets: list[tuple[bytes, int, int, bool]] = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 2 * fps
        stream.codec_context.max_b_frames = 2
        stream.codec_context.options = {"preset": "veryfast", "crf": "26"}
        for number in range(60 * fps):
            top, left = (2 * number) % height, (3 * number) % width
            picture = np.ascontiguousarray(texture[top : top + height, left : left + width])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            packets += [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in stream.encode(frame)]
        packets += [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in stream.encode(None)]
        for minute in range(minutes):
            for data, pts, dts, is_keyframe in packets:
                packet = av.Packet(data)
                packet.stream, packet.time_base = stream, Fraction(1, fps)
                packet.pts, packet.dts = pts + minute * 60 * fps, dts + minute * 60 * fps
                packet.duration, packet.is_keyframe = 1, is_keyframe
                container.mux(packet)


class PeakMemory(threading.Thread):
    """Watches the resident memory of this process and of its children until ``stop`` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.parent_nbytes = self.worker_nbytes = 0

    def run(self) -> None:
        process = psutil.Process()
        while not self.stop.wait(0.05):
            self.parent_nbytes = max(self.parent_nbytes, process.memory_info().rss)
            for child in process.children():
                try:
                    self.worker_nbytes = max(self.worker_nbytes, child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue


def measure(path: Path, fps: float, num_threads: int) -> dict[str, object]:
    """Read ``path`` once at ``fps``."""
    before_nbytes = psutil.Process().memory_info().rss
    memory = PeakMemory()
    memory.start()
    begin_s = time.monotonic()
    with VideoReader(path, Sampling(fps), VideoLimits(), num_threads=num_threads) as reader:
        first_s = time.monotonic() - begin_s
        info = reader.info
        num_frames = sum(len(frames) for frames in reader)
    wall_s = time.monotonic() - begin_s
    memory.stop.set()
    memory.join()
    if num_frames != info.num_frames:
        raise SystemExit(f"{num_frames} frames came, {info.num_frames} were promised")
    return {
        "video": {
            "nbytes": path.stat().st_size,
            "width": info.width,
            "height": info.height,
            "duration_s": round(info.duration_s, 3),
        },
        "sampling_fps": fps,
        "num_threads": num_threads,
        "sampled_frames": num_frames,
        "wall_s": round(wall_s, 1),
        "first_frame_s": round(first_s, 2),
        "sampled_frames_per_s": round(num_frames / wall_s, 1),
        "times_realtime": round(info.duration_s / wall_s, 1),
        "peak_rss_mb": {
            "parent_before": round(before_nbytes / 1e6),
            "parent": round(memory.parent_nbytes / 1e6),
            "worker": round(memory.worker_nbytes / 1e6),
        },
    }


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
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.video
        if path is None:
            path = Path(folder) / "hour.mp4"
            # In a process of its own: the encoder's memory must not count.
            maker = multiprocessing.get_context("spawn").Process(target=make_hour, args=(path,))
            maker.start()
            maker.join()
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "cpu": cpu_model(),
            "num_cpus": os.cpu_count(),
            "python": platform.python_version(),
            **measure(path, arguments.fps, arguments.threads),
        }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
