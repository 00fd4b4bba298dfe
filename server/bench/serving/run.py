"""``x2l bench serving``: one run from the videos to the JSON."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import torch

from kvstore.base import Tier
from server.bench.circumstances import circumstances
from server.bench.serving.asker import Asker
from server.bench.serving.decode import measure_decode
from server.bench.serving.floor import Floor
from server.bench.serving.follow_up import measure_follow_up
from server.bench.serving.hardware import describe_gpu, drop_pages, measure_disk, measure_paces, num_step_weights
from server.bench.serving.load import measure_load
from server.bench.serving.process import Served, serving
from server.bench.serving.resident import measure_resident
from server.bench.serving.video import UploadedVideo, upload
from server.bench.synthetic import SyntheticVideo, choose_videos, making
from server.models.tiny.model import FOLDER
from server.spool import Spool

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_SEED = 0
_SLACK_NBYTES = 1 << 24

Tell = Callable[[str, int], None]
"""Shows what is being done, and that so many steps of it are over."""


@dataclass(frozen=True)
class Target:
    """What is measured: a model that is served here, or the server at ``base_url``."""

    model: str | None = None
    base_url: str | None = None
    api_key: str = ""
    device: str = "auto"
    dtype: str = "auto"
    options: str = ""
    """More of ``x2l serve``, in one string."""


@dataclass(frozen=True)
class Sizes:
    """``chunks`` of 32 s has the video of the follow-up questions, ``load_chunks`` each of the ``videos`` that
    ``questions`` are put to at once; ``batches`` are the numbers of streams of the decode rows."""

    chunks: int
    load_chunks: int
    videos: int
    questions: int
    batches: tuple[int, ...]
    repeats: int
    follow_ups: int

    @property
    def num_steps(self) -> int:
        """As many as a run tells of, where every tier is measured."""
        decode = 2 * len(self.batches) * self.repeats
        return self.videos + 1 + decode + 2 * self.repeats + len(_TIERS) * (self.follow_ups + 1)


_TIERS: tuple[Tier, ...] = ("device", "memory", "disk")


def run_serving(target: Target, sizes: Sizes, videos_folder: Path, tell: Tell) -> dict[str, Any]:
    """All rows, as the JSON that is published. Raises ValueError for sizes that no video can have, ServerUnusable,
    VideoRefused, ServerError, httpx.HTTPError, OSError."""
    long, short = _choose(sizes)
    result = circumstances("x2l", bundled=target.model in (None, "tiny") and target.base_url is None) | {
        "load_average": round(os.getloadavg()[0], 1),  # others' work slows everything
        "sizes": asdict(sizes),
    }
    with ExitStack() as stack:
        folder = stack.enter_context(closing(Spool())).folder
        tell("making videos", 0)
        with making([long, *short], videos_folder) as path_of:
            paths = {video: path_of(video) for video in (long, *short)}
        if target.base_url is not None:
            result["server"] = target.base_url
            asker = stack.enter_context(Asker(target.base_url, target.api_key, target.model))
            uploaded = stack.enter_context(_uploaded(asker, paths, tell))
            return result | _rows(asker, uploaded[0], uploaded[1:], sizes, None, tell)
        device = torch.device("cuda" if target.device != "cpu" and torch.cuda.is_available() else "cpu")
        tell("measuring the memory", 0)
        paces = measure_paces(device)
        result |= describe_gpu(device) | {"gb_s": {name: round(pace / 1e9, 2) for name, pace in asdict(paces).items()}}
        log = stack.enter_context((folder / "log").open("w+"))
        run = _OwnServers(target, sizes, folder / "store", log)
        with run.serve() as (served, asker):
            result["plan"] = dict(served.plan)
            uploaded = [_upload_one(asker, video, paths, tell) for video in (long, *short)]
            itemsize = _ITEMSIZE[served.plan["device"].rpartition(" ")[2]]
            weights = num_step_weights(FOLDER if target.model in (None, "tiny") else Path(target.model)) * itemsize
            floor = Floor(paces, weights, uploaded[0].token_nbytes)
            result |= {"weight_nbytes_a_step": weights, "kv_nbytes_a_token": floor.token_nbytes}
            result |= _rows(asker, uploaded[0], uploaded[1:], sizes, floor, tell, _ratio(served))
            if device.type == "cuda":  # elsewhere nothing stays
                result["follow_up"] = [run.follow_up("device", asker, uploaded[0], floor, None, tell)]
        result.setdefault("follow_up", [])
        for tier in ("memory", "disk"):
            room = uploaded[0].facts["bytes"]["low"] * 5 // 4 + _SLACK_NBYTES if tier == "memory" else 0
            with run.serve("--gpu-low-kv-budget", "0", "--store-cache-bytes", str(room)) as (_, asker):
                pace = paces.to_device if tier == "memory" else min(paces.to_device, run.disk_pace())
                if tier == "disk":
                    result["gb_s"]["disk"] = round(run.disk_pace() / 1e9, 2)
                result["follow_up"].append(run.follow_up(tier, asker, uploaded[0], floor, pace, tell))
    return result


class _OwnServers:
    """Servers on one disk store, one after the other: what the first has prefilled, all have."""

    def __init__(self, target: Target, sizes: Sizes, store: Path, log: IO[str]) -> None:
        self._target, self._sizes, self._store, self._log = target, sizes, store, log

    @contextmanager
    def serve(self, *options: str) -> Iterator[tuple[Served, Asker]]:
        target = self._target
        own = [
            *("--model", target.model or "tiny", "--device", target.device, "--dtype", target.dtype),
            *("--store", f"disk:{self._store}", "--no-keep-video", "--drain-s", "0"),
            *("--max-batch", str(max(16, *self._sizes.batches)), "--max-queue", str(max(64, self._sizes.questions))),
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
            self._sizes.follow_ups,
            floor=floor,
            pace=pace,
            before=(lambda: drop_pages(self._blobs())) if tier == "disk" else lambda: None,
            tick=lambda: tell(f"follow-up questions, L-KVs: {tier}", 1),
        )

    def disk_pace(self) -> float:
        """Of the largest files of the store, which are L-KVs."""
        return measure_disk(sorted(self._blobs(), key=lambda path: path.stat().st_size)[-6:])

    def _blobs(self) -> list[Path]:
        return [path for path in self._store.rglob("*") if path.is_file()]


def _choose(sizes: Sizes) -> tuple[SyntheticVideo, list[SyntheticVideo]]:
    """The long video, and those of the load."""
    if sizes.chunks == sizes.load_chunks:
        long, *short = choose_videos(_SEED, {sizes.chunks: sizes.videos + 1})
        return long, short
    (long,) = choose_videos(_SEED, {sizes.chunks: 1})
    return long, choose_videos(_SEED, {sizes.load_chunks: sizes.videos})


def _upload_one(asker: Asker, video: SyntheticVideo, paths: dict[SyntheticVideo, Path], tell: Tell) -> UploadedVideo:
    uploaded = upload(asker, paths[video], [question.text for question in video.questions])
    tell("prefill", 1)
    return uploaded


@contextmanager
def _uploaded(asker: Asker, paths: dict[SyntheticVideo, Path], tell: Tell) -> Iterator[list[UploadedVideo]]:
    """At somebody's server, who gets them deleted in the end."""
    uploaded: list[UploadedVideo] = []
    try:
        for video in paths:
            uploaded.append(_upload_one(asker, video, paths, tell))
        yield uploaded
    finally:
        for one in uploaded:
            with suppress(httpx.HTTPError):
                asker.client.delete(f"/v1/files/{one.file_id}")


def _rows(
    asker: Asker,
    long: UploadedVideo,
    short: Sequence[UploadedVideo],
    sizes: Sizes,
    floor: Floor | None,
    tell: Tell,
    ratio: int | None = None,
) -> dict[str, Any]:
    """What needs no certain tier."""
    resident = measure_resident(asker, [long, *short], ratio)
    decode = []
    for name, videos in (("short", short), ("long", [long])):
        for batch in sizes.batches:
            row = measure_decode(
                asker,
                videos,
                batch,
                sizes.repeats,
                floor=floor,
                tick=lambda name=name, batch=batch: tell(f"decode, {name} cache, batch {batch}", 1),  # type: ignore[misc]
            )
            decode.append({"cache": name, **row})
    load = measure_load(
        asker, short, sizes.questions, sizes.repeats, tick=lambda: tell(f"{sizes.questions} questions", 1)
    )
    rows: dict[str, Any] = {"resident": resident, "decode": decode, "load": load}
    if floor is None:  # a server as it is
        tick: Callable[[], None] = lambda: tell("follow-up questions", 1)  # noqa: E731
        rows["follow_up"] = [
            measure_follow_up(asker, long, "disk", sizes.follow_ups, floor=None, pace=None, tick=tick)
            | {"tier": "as served"}
        ]
    return rows


def _ratio(served: Served) -> int:
    """The server's high ratio, as its plan says it."""
    found = re.search(r"and (\d+) \(small\)", served.plan["ratios"])
    assert found is not None
    return int(found[1])
