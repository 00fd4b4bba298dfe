"""Runs a public benchmark against a server: ``x2l bench quality --dataset NAME --data DIR``."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvstore.errors import StoreError
from server.bench.circumstances import circumstances
from server.bench.datasets.asker import Asker, Asking, local_url
from server.bench.datasets.item import Benchmark, DatasetError, Item
from server.bench.datasets.records import Records
from server.bench.datasets.registry import BENCHMARKS
from server.bench.datasets.report import summarize, table, verdict_lines
from server.bench.reply import OWN
from server.client import ServerError, check, connect
from server.config import SettingsError, load_settings
from server.spool import Spool


def run_dataset(
    name: str,
    data: Path,
    *,
    out: Path,
    base_url: str | None = None,
    api_key: str = "",
    model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    limit: int | None = None,
    concurrency: int = 2,
    media_root: Path | None = None,
    subtitles: bool = False,
    asking: Asking | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Asks the questions of benchmark ``name`` in folder ``data``, and returns the summary.

    Without ``base_url`` a server of our own, with ``settings`` beside those of the environment, runs for as long as it
    takes. ``model`` None is the first that the server lists. Videos are uploaded one by one and deleted again; with
    ``media_root``, the path by which the server knows ``data``, they go as ``file://`` URLs, which other servers take
    as well. ``concurrency`` videos are worked on at a time. ``out`` gets NAME.jsonl with the replies (a run
    that was interrupted goes on there) and NAME.json with the summary, which is printed as well.

    What goes wrong with one video or question is kept with it, and the run goes on. Raises DatasetError for a folder
    that is not the benchmark's or has none of its videos, ServerError or httpx.HTTPError for a server that does not
    answer at all or cannot be used, SettingsError.
    """
    console = console or Console()
    asking = asking or Asking()
    benchmark = BENCHMARKS[name]
    items = _select(benchmark, data, limit, subtitles)
    with contextlib.ExitStack() as stack:
        url = base_url or stack.enter_context(_own_server(settings or {}))
        client = stack.enter_context(connect(url, api_key if base_url else ""))
        model = _served(client, model if base_url else None, has_files=media_root is None)
        run = {"dataset": name, "model": model, "subtitles": subtitles, **asdict(asking)}
        records = stack.enter_context(Records(out / f"{name}.jsonl", run))
        done = records.done
        stop = threading.Event()
        _ask_all(
            Asker(client, model, asking, stop),
            [item for item in items if item.id not in done],
            records,
            stop,
            data=data,
            media_root=media_root,
            concurrency=concurrency,
            progress=_progress(console, done=len(done & {item.id for item in items}), total=len(items)),
        )
        summary = summarize(benchmark, items, records.by_id)
    written = summary | {"run": run} | circumstances("x2l", bundled=base_url is None)
    (out / f"{name}.json").write_text(json.dumps(written, indent=2) + "\n")
    console.print(table(summary))
    for line in [*verdict_lines(summary), f"written to {out / name}.json and .jsonl"]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return summary


def _served(client: httpx.Client, model: str | None, *, has_files: bool) -> str:
    """The id of ``model``, or of the first that is served; with ``has_files`` the server has to take uploads."""
    served = {str(one["id"]): one for one in check(client.get("/v1/models")).json()["data"]}
    if not served or model not in (None, *served):
        raise ServerError(f"the server serves {', '.join(served) or 'no model'}, not {model}")
    name = model or next(iter(served))
    if has_files and served[name].get("owned_by") != OWN:
        raise ServerError("this is no Video-X²L server: it needs --media-root, the path by which it knows the videos")
    return name


def _select(benchmark: Benchmark, data: Path, limit: int | None, subtitles: bool) -> list[Item]:
    if subtitles and not benchmark.has_subtitles:
        raise DatasetError(f"{benchmark.name} has no subtitles")
    items = take(benchmark.read(data, subtitles=subtitles), limit, benchmark.dimension)
    if not items:
        raise DatasetError(f"no questions were selected from {data}")
    if not any(item.video.is_file() for item in items):
        raise DatasetError(f"none of the videos is there: looked for {items[0].video} first (from {benchmark.source})")
    return items


def take(items: Sequence[Item], limit: int | None, dimension: str) -> list[Item]:
    """The items of ``limit`` whole groups, one from each category of ``dimension`` in turn; all without a limit."""
    if limit is None:
        return list(items)
    waiting: dict[str, list[str]] = {}
    for item in items:
        groups = waiting.setdefault(item.categories[dimension], [])
        if item.group not in groups[-1:]:
            groups.append(item.group)
    turns = [(turn, group) for groups in waiting.values() for turn, group in enumerate(dict.fromkeys(groups))]
    chosen = {group for _, group in sorted(turns, key=lambda turn: turn[0])[:limit]}
    return [item for item in items if item.group in chosen]


def _ask_all(
    asker: Asker,
    items: Sequence[Item],
    records: Records,
    stop: threading.Event,
    *,
    data: Path,
    media_root: Path | None,
    concurrency: int,
    progress: Progress,
) -> None:
    videos: dict[Path, list[Item]] = {}
    for item in items:
        videos.setdefault(item.video, []).append(item)

    def work(video: Path, questions: Sequence[Item]) -> None:
        left = list(questions)
        try:
            if not video.is_file():
                raise FileNotFoundError(f"no such video: {video}")
            part = local_url(video, data, media_root) if media_root else None
            with contextlib.nullcontext(part) if part else asker.uploaded(video) as given:
                while left and not stop.is_set():
                    records.add(_answer(asker, left[0], given))
                    left.pop(0)
                    progress.advance(progress.task_ids[0])
        except (ServerError, httpx.HTTPError, OSError) as error:
            if stop.is_set():
                return
            for item in left:
                records.add(_record(item, error=error, missing=isinstance(error, FileNotFoundError)))
                progress.advance(progress.task_ids[0])

    pool = ThreadPoolExecutor(concurrency)
    try:
        with progress:
            for future in as_completed([pool.submit(work, video, asked) for video, asked in videos.items()]):
                future.result()
    finally:
        stop.set()  # an interrupted run ends with the questions in flight
        pool.shutdown(cancel_futures=True)


def _answer(asker: Asker, item: Item, part: Mapping[str, Any]) -> dict[str, Any]:
    try:
        reply = asker.ask(item, part)
    except (ServerError, httpx.HTTPError) as error:
        return _record(item, error=error)
    told = {name: reply.x2l[name] for name in ("kv_tokens", "timings_ms") if name in reply.x2l}
    return _record(item) | {"reply": reply.text} | told


def _record(item: Item, *, error: Exception | None = None, missing: bool = False) -> dict[str, Any]:
    message = None if error is None else str(error) or type(error).__name__
    return {"id": item.id, "video": item.video.name, "answer": item.answer, "error": message, "missing": missing}


def _progress(console: Console, *, done: int, total: int) -> Progress:
    columns = (TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console)
    progress.add_task("", completed=done, total=total)
    return progress


@contextlib.contextmanager
def _own_server(options: Mapping[str, Any]) -> Iterator[str]:
    """The address of a server of our own, with a temporary store unless X2L_STORE names one. Raises SettingsError."""
    from server.app import open_backend  # torch takes seconds to load
    from server.serving import running

    with contextlib.closing(Spool()) as spool:
        store = None if os.environ.get("X2L_STORE") else f"disk:{spool.folder}/store"
        fixed: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "api_key": (), "keep_video": False}
        settings = load_settings(**options, **fixed, store=store, log_level="warning")
        try:
            backend = open_backend(settings)
        except (ValueError, StoreError) as error:
            raise SettingsError(str(error)) from error
        with running(settings, backend) as address:
            yield address
