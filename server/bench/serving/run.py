"""``x2l bench serving``: one run from the videos to the JSON."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from kvstore.base import Tier
from server.bench.circumstances import circumstances
from server.bench.long_video import MOST_FILES, write_long_videos
from server.bench.serving.asker import Asker
from server.bench.serving.decode import measure_decode
from server.bench.serving.floor import Floor
from server.bench.serving.follow_up import measure_follow_up
from server.bench.serving.hardware import drop_pages, measure_disk
from server.bench.serving.load import measure_load
from server.bench.serving.model import measure_model
from server.bench.serving.process import Served, serving
from server.bench.serving.resident import full_cache, measure_resident
from server.bench.serving.table import make_table
from server.bench.serving.video import UploadedVideo, upload
from server.client import ServerError
from server.models.registry import Device, choose_device, find_model
from server.spool import Spool

_WIDTH, _HEIGHT, _FPS = 640, 360, 25
_SLACK_NBYTES = 1 << 24
_DISK_FILES = 6
_UPLOADS = 4
"""At the same time."""
_LEAST_CHUNKS = 20
"""For tenths of a prefill to be told apart."""

Tell = Callable[[str, int], None]
"""Shows what is being done, and that so many steps of it are over."""


@dataclass(frozen=True)
class Target:
    """The model, and more options of ``x2l serve`` in one string."""

    model: str = "tiny"
    device: Device = "auto"
    dtype: str = "auto"
    options: str = ""


@dataclass(frozen=True)
class Sizes:
    """``minutes`` has the video of the follow-up questions, ``load_minutes`` each of the ``videos`` that as many
    questions as ``concurrency`` are put to at once; ``batches`` streams are decoded over caches of ``kv_tokens``.
    ``memory_gb`` is that of a device on which a peer would keep whole caches."""

    minutes: int
    load_minutes: int
    videos: int
    concurrency: int
    batches: tuple[int, ...]
    kv_tokens: tuple[int, ...]
    repeats: int
    memory_gb: float

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if not self.batches or not self.kv_tokens or min(*self.batches, *self.kv_tokens) < 1:
            raise ValueError("batches and KV tokens are lists of numbers from 1 on")
        if self.videos >= MOST_FILES:
            raise ValueError(f"at most {MOST_FILES - 1} videos can be made")

    @property
    def num_steps(self) -> int:
        """As many as a run tells of, where L-KVs do not stay on the device."""
        decode = len(self.batches) * len(self.kv_tokens) * self.repeats
        return 4 + self.videos + 1 + decode + 2 * self.repeats + 2 * (self.repeats + 1)


def run_serving(target: Target, sizes: Sizes, tell: Tell, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All rows, as the JSON that is published; ``keep`` gets what there is of it after every part, in case that the
    next one fails. Raises ValueError, ServerUnusable, VideoRefused, ServerError, httpx.HTTPError, OSError."""
    find_model(target.model)  # mistakes are told before videos are made
    choose_device(target.device)
    result: dict[str, Any] = circumstances("x2l", bundled=target.model == "tiny") | {
        "load_average": round(os.getloadavg()[0], 1),  # others' work slows everything
        "target": asdict(target),
        "sizes": asdict(sizes),
    }
    with ExitStack() as stack:
        folder = stack.enter_context(closing(Spool())).folder
        tell("making videos", 0)
        long, *short = [folder / f"{number}.mp4" for number in range(sizes.videos + 1)]
        write_long_videos({long: sizes.minutes} | dict.fromkeys(short, sizes.load_minutes), _WIDTH, _HEIGHT, _FPS)
        tell("model alone", 1)
        facts, floor = measure_model(
            long,
            sizes.repeats,
            lambda: tell("model alone", 1),
            name=target.model,
            device=target.device,
            dtype=target.dtype,
        )
        result |= facts
        keep(result)
        servers = _Servers(target, sizes, folder / "store", stack.enter_context((folder / "log").open("w")))
        with servers.serve() as (served, asker):
            result["plan"] = {name: text for name, text in served.plan.items() if name != "store"}  # a temporary one
            tell("prefill", 0)
            videos = [upload(asker, long)]
            result["prefill"] = _prefill(videos[0], facts["prefill_parts"])
            result["resident"] = measure_resident(asker, videos[0], floor, _ratio(served))
            keep(result)
            with ThreadPoolExecutor(_UPLOADS) as uploads:
                for video in uploads.map(partial(upload, asker), short):
                    tell("prefill", 1)
                    videos.append(video)
            tell("decode", 1)
            result["decode"], result["not_measured"] = _decode(served, asker, videos, sizes, floor, tell)
            keep(result)
            result["load"] = measure_load(
                asker,
                videos[1:],
                sizes.concurrency,
                sizes.repeats,
                floor,
                lambda: tell(f"{sizes.concurrency} questions", 1),
            )
            keep(result)
            result["follow_up"] = []
            if served.plan["device"].startswith("cuda"):  # elsewhere nothing stays
                result["follow_up"].append(servers.follow_up("device", asker, videos[0], floor, None, tell))
                keep(result)
        _re_load(result, servers, videos[0], floor, tell, keep)
        result["full_kv_prefix_caching"] = full_cache(
            result["resident"], result["weight_nbytes"], floor.paces, 1e9 * result["disk_gb_s"], sizes.memory_gb
        )
    result["table"] = [asdict(row) for row in make_table(result)]
    return result


class _Servers:
    """Servers on one disk store, one after the other: what the first has prefilled, all have."""

    def __init__(self, target: Target, sizes: Sizes, store: Path, log: IO[str]) -> None:
        self._target, self._sizes, self._store, self._log = target, sizes, store, log

    @contextmanager
    def serve(self, *options: str) -> Iterator[tuple[Served, Asker]]:
        target, sizes = self._target, self._sizes
        own = [
            *("--model", target.model, "--device", target.device, "--dtype", target.dtype),
            *("--store", f"disk:{self._store}", "--store-quota-bytes", "100TB", "--no-keep-video", "--drain-s", "0"),
            *("--max-batch", str(max(sizes.concurrency, *sizes.batches)), "--max-tokens", "100000"),
        ]
        with (
            serving(*own, *shlex.split(target.options), *options, log=self._log) as served,
            Asker(served.url) as asker,
        ):
            yield served, asker

    def follow_up(
        self, tier: Tier, asker: Asker, video: UploadedVideo, floor: Floor, pace: float | None, tell: Tell
    ) -> dict[str, Any]:
        return measure_follow_up(
            asker,
            video,
            tier,
            self._sizes.repeats,
            floor,
            pace,
            before=(lambda: drop_pages(self._blobs())) if tier == "disk" else lambda: None,
            tick=lambda: tell(f"follow-up questions, L-KVs: {tier}", 1),
        )

    def disk_pace(self) -> float:
        """Bytes a second of the largest files of the store, which are L-KVs."""
        return measure_disk(sorted(self._blobs(), key=lambda path: path.stat().st_size)[-_DISK_FILES:])

    def _blobs(self) -> list[Path]:
        return [path for path in self._store.rglob("*") if path.is_file()]


def _re_load(
    result: dict[str, Any],
    servers: _Servers,
    video: UploadedVideo,
    floor: Floor,
    tell: Tell,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Follow-up questions to servers that keep no L-KV on the device: every one has to be read again."""
    disk = servers.disk_pace()
    result["disk_gb_s"] = round(disk / 1e9, 3)
    room = video.facts["bytes"]["low"] * 5 // 4 + _SLACK_NBYTES
    tiers: dict[Tier, tuple[int, float]] = {
        "memory": (room, floor.paces.to_device),
        "disk": (0, min(floor.paces.to_device, disk)),
    }
    for tier, (cache_nbytes, pace) in tiers.items():
        with servers.serve("--gpu-low-kv-budget", "0", "--store-cache-bytes", str(cache_nbytes)) as (_, asker):
            result["follow_up"].append(servers.follow_up(tier, asker, video, floor, pace, tell))
        keep(result)


def _prefill(video: UploadedVideo, parts: dict[str, Any]) -> dict[str, Any]:
    """End to end, from the file to the last KV in the store."""
    facts = video.facts
    minutes, took_s, tenths_s = facts["duration_s"] / 60, facts["prefill_s"], video.tenths_s
    return {
        "mode": facts["prefill_mode"],
        "video_minutes": round(minutes, 2),
        "s": round(took_s, 2),
        "s_per_video_minute": round(took_s / minutes, 4),
        "floor_s_per_video_minute": parts["floor_s_per_video_minute"],
        "frames_per_s": round(facts["num_frames"] / took_s, 1),
        "tenths_s": [round(tenth, 2) for tenth in tenths_s] if facts["num_chunks"] >= _LEAST_CHUNKS else [],
    }


def _decode(
    served: Served, asker: Asker, videos: list[UploadedVideo], sizes: Sizes, floor: Floor, tell: Tell
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and why others could not be measured."""
    most = max(video.low_tokens for video in videos)
    reached = reachable(sizes.kv_tokens, most)
    if max(sizes.kv_tokens) > most:
        num_dropped = len(sizes.kv_tokens) - len(reached)
        tell(f"decode: no video has more than {most} KV tokens", num_dropped * len(sizes.batches) * sizes.repeats)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for kv_tokens, asked in reached.items():
        for batch in sizes.batches:
            text = f"decode, {kv_tokens} KV tokens, batch {batch}"
            tick = lambda text=text: tell(text, 1)  # noqa: E731
            try:
                row = measure_decode(served, asker, videos, batch, kv_tokens, sizes.repeats, floor, tick)
            except ServerError as error:  # what comes behind it may be worth having
                failures.append(f"{text}: {error}")
            else:
                rows.append({"asked_kv_tokens": asked, "all_kv_tokens": asked > most, **row})
    return rows, failures


def reachable(asked: Sequence[int], most: int) -> dict[int, int]:
    """The KV tokens to measure, each once, with the number that was asked for: where no video has so many, ``most``."""
    reached: dict[int, int] = {}
    for kv_tokens in sorted(asked):
        reached.setdefault(min(kv_tokens, most), kv_tokens)
    return reached


def _ratio(served: Served) -> int:
    """The server's high ratio, as its plan says it."""
    found = re.search(r"and (\d+) \(small\)", served.plan["ratios"])
    assert found is not None
    return int(found[1])
