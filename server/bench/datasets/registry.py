"""The public benchmarks by name."""

from __future__ import annotations

from server.bench.datasets.item import Benchmark
from server.bench.datasets.longvideobench import LongVideoBench
from server.bench.datasets.mlvu import MLVU
from server.bench.datasets.videomme import VideoMME
from server.bench.datasets.vnbench import VNBench

BENCHMARKS: dict[str, Benchmark] = {made.name: made for made in (VNBench(), MLVU(), VideoMME(), LongVideoBench())}
