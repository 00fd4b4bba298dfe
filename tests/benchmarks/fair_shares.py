"""Do streams go on while a long video is prefilled? ``python tests/benchmarks/fair_shares.py [--out RESULT.json]``

Starts ``x2l serve`` and asks about a short video without end, several streams at a time. The time between two tokens of
one stream is taken when nothing else runs, and then while a long video is prefilled, in several windows of the same
length one after the other; the seconds of that prefill are taken beside the streams, and alone. Prints and writes p50
and p99 of both, and the ratios.

With ``--family`` the model is a random checkpoint of the published 7B sizes, which is made first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from common import print_table, to_json, write
from decode_hour import make_hour
from large_model import HAS_GPU, ask_gpu
from live_server import Live, serving
from openai import OpenAI
from random_checkpoint import FAMILIES, write_checkpoint

from server.bench.circumstances import circumstances
from server.bench.serving.asker import Ask, Asker

WIDTH, HEIGHT, FPS = 320, 180, 10
QUESTION = "Tell everything that is seen in the video, from the beginning to the end, whatever it may be."
MOST_RATIO = 2.0


class Streams:
    """Asks again and again, ``number`` streams at a time, from entering to leaving: in a process of its own, so that
    nothing else comes between two tokens but the server."""

    def __init__(self, live: Live, file_id: str, number: int, max_tokens: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._begun, self._stop = context.Event(), context.Event()
        self._receiver, sender = context.Pipe(duplex=False)
        signals = self._begun, self._stop, sender
        self._process = context.Process(target=read_streams, args=(live.url, file_id, number, max_tokens, *signals))
        self._gaps: list[tuple[float, float]] = []

    def __enter__(self) -> Streams:
        self._process.start()
        while not self._begun.wait(0.1):
            if not self._process.is_alive():
                raise SystemExit("the streams have failed")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._gaps = self._receiver.recv()
        self._process.join()

    def gaps_ms(self, begin_s: float, end_s: float) -> list[float]:
        """Sorted; of the tokens that came between two times. Once the streams are over."""
        return sorted(gap_s * 1000 for at_s, gap_s in self._gaps if begin_s <= at_s < end_s)


def read_streams(
    url: str, file_id: str, number: int, max_tokens: int, begun: Event, stop: Event, sender: Connection
) -> None:
    """Until ``stop``; sends when every token came, and the seconds since the one before it in its stream. ``begun`` is
    set once all streams have begun."""
    gaps: list[tuple[float, float]] = []
    num_begun = 0

    def read(asker: Asker) -> None:
        nonlocal num_begun
        while not stop.is_set():
            last_s = 0.0

            def on_text() -> None:
                nonlocal last_s, num_begun
                now_s = time.perf_counter()
                if last_s:
                    gaps.append((now_s, now_s - last_s))
                else:
                    num_begun += 1
                    if num_begun == number:
                        begun.set()
                last_s = now_s
                if stop.is_set():
                    raise StoppedError

            with suppress(StoppedError):
                asker.ask(Ask(file_id, QUESTION, max_tokens), on_text)

    with Asker(url) as asker, ThreadPoolExecutor(number) as threads:
        reading = [threads.submit(read, asker) for _ in range(number)]
        for each in reading:
            each.result()
    sender.send(gaps)


class StoppedError(Exception):
    """Nobody reads a stream any more."""


def prefill(client: OpenAI, path: Path, fps: float, patience_s: float) -> tuple[str, float]:
    """The id of the processed file, and the seconds that its prefill took."""
    with path.open("rb") as source:
        file = client.files.create(file=source, purpose="user_data", extra_body={"fps": str(fps)})
    file = client.files.wait_for_processing(file.id, poll_interval=0.2, max_wait_seconds=patience_s)
    if file.status != "processed":
        raise SystemExit(f"{path.name}: {file.status_details}")
    return file.id, file.to_dict()["video"]["prefill_s"]


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values: the least that ``share`` of them do not exceed."""
    return values[min(len(values) - 1, int(share * len(values)))]


def measure(live: Live, given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row a window. Every repeat prefills the same long video twice; in between it is deleted."""
    rows = []
    with live.client() as client:
        short, _ = prefill(client, folder / "short.mp4", given.fps, given.patience_s)
        for repeat in range(-1, given.repeats):  # the first one warms up
            long = folder / ("short-too.mp4" if repeat < 0 else "long.mp4")
            alone_s = None
            if given.alone or repeat < 0:
                file_id, alone_s = prefill(client, long, given.fps, given.patience_s)
                client.files.delete(file_id)
            with Streams(live, short, given.streams, given.max_tokens) as streams:
                time.sleep(1.0)
                begin_s = time.perf_counter()
                time.sleep(given.seconds if repeat >= 0 else 1.0)
                middle_s = time.perf_counter()
                file_id, beside_s = prefill(client, long, given.fps, given.patience_s)
                end_s = time.perf_counter()
            client.files.delete(file_id)
            if repeat >= 0:
                idle_ms = streams.gaps_ms(begin_s, middle_s)
                window_s = (end_s - middle_s) / given.windows
                for window in range(given.windows):
                    start_s = middle_s + window * window_s
                    busy_ms = streams.gaps_ms(start_s, start_s + window_s)
                    rows.append(row(idle_ms, busy_ms, middle_s - begin_s, window_s, alone_s, beside_s))
                    print(to_json(rows[-1]), flush=True)
    return rows


def row(
    idle_ms: Sequence[float],
    busy_ms: Sequence[float],
    idle_s: float,
    busy_s: float,
    alone_s: float | None,
    beside_s: float,
) -> dict[str, Any]:
    """What one window has found."""
    found: dict[str, Any] = {}
    for name, gaps_ms, took_s in (("idle", idle_ms, idle_s), ("beside_prefill", busy_ms, busy_s)):
        found[f"{name}_tokens"] = len(gaps_ms)
        found[f"{name}_tokens_per_s"] = len(gaps_ms) / took_s
        for percent in (50, 99):
            found[f"{name}_p{percent}_ms"] = quantile(gaps_ms, percent / 100)
        found[f"{name}_most_ms"] = gaps_ms[-1]
    for percent in (50, 99):
        found[f"p{percent}_ratio"] = found[f"beside_prefill_p{percent}_ms"] / found[f"idle_p{percent}_ms"]
    found["prefill_beside_streams_s"] = beside_s
    if alone_s is not None:
        found |= {"prefill_alone_s": alone_s, "prefill_ratio": beside_s / alone_s}
    return {name: round(value, 3) for name, value in found.items()}


def prepare(given: argparse.Namespace, folder: Path) -> list[str]:
    """Videos and checkpoint, in processes of their own; what to start the server with."""
    context = multiprocessing.get_context("spawn")
    minutes = {"short": given.short_minutes, "short-too": given.short_minutes + 1, "long": given.minutes}
    makers = [
        context.Process(target=make_hour, args=(folder / f"{name}.mp4", WIDTH, HEIGHT, FPS, length))
        for name, length in minutes.items()
    ]
    if given.family:
        makers.append(context.Process(target=write_checkpoint, args=(given.family, folder / "model", given.layers)))
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
        if maker.exitcode:
            raise SystemExit("a video or the checkpoint could not be made")
    return ["--model", str(folder / "model") if given.family else given.model]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="as x2l serve takes it")
    parser.add_argument("--family", choices=FAMILIES, help="make a random checkpoint of this family instead")
    parser.add_argument("--layers", type=int, help="of its language model, instead of 28")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--minutes", type=int, default=60, help="of the video that is prefilled")
    parser.add_argument("--short-minutes", type=int, default=2, help="of the video that is asked about")
    parser.add_argument("--fps", type=float, default=1.0, help="frames sampled a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure the idle server")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--windows", type=int, default=1, help="that the prefill beside the streams is cut into")
    parser.add_argument("--no-alone", dest="alone", action="store_false", help="without the prefill alone")
    parser.add_argument("--patience-s", type=float, default=3600.0, help="for a prefill")
    parser.add_argument("--serve", default="", help="more options of x2l serve, in one string")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="x2l-shares-") as name:
        folder = Path(name)
        options = prepare(given, folder)
        with serving(*options, "--max-tokens", "100000", *shlex.split(given.serve)) as live:
            shutil.rmtree(folder / "model", ignore_errors=True)  # nothing of the model hangs on its files
            rows = measure(live, given, folder)
            plan = dict(live.plan)
    medians = {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}
    result = circumstances("python", sys.argv[0], bundled=given.model == "tiny" and not given.family)
    result |= {
        "gpu": ask_gpu("name,driver_version,memory.total") if HAS_GPU else None,
        "plan": plan,
        "streams": given.streams,
        "minutes": given.minutes,
        "medians": medians,
        "target": {"p99_ratio": MOST_RATIO, "met": medians["p99_ratio"] <= MOST_RATIO},
        "windows": rows,
    }
    write(result, given.out)
    columns = ("p50 ms", "p99 ms", "most ms", "tokens/s")
    kinds = ("p50_ms", "p99_ms", "most_ms", "tokens_per_s")
    table = {name: [medians[f"{name}_{kind}"] for kind in kinds] for name in ("idle", "beside_prefill")}
    print_table("between two tokens", columns, table)
    names = ("prefill_alone_s", "prefill_beside_streams_s", "prefill_ratio", "p50_ratio", "p99_ratio")
    print_table("ratios", ("median",), {name: [medians[name]] for name in names if name in medians})


if __name__ == "__main__":
    main()
