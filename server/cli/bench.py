"""``x2l bench``: measurements."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console


def add_to(app: typer.Typer) -> None:
    """Registers the sub-commands."""
    bench = typer.Typer(help="Measures quality and speed.", no_args_is_help=True, rich_markup_mode=None)
    bench.command()(quality)
    bench.command()(reload)
    bench.command()(serving)
    app.add_typer(bench, name="bench")


_DATASET_ONLY = (
    "data",
    "limit",
    "concurrency",
    "media_root",
    "subtitles",
    "fps",
    "max_frames",
    "reload",
    "budget_tokens",
    "mode",
)
_SYNTHETIC_ONLY = ("quick", "full", "chunks", "videos", "methods", "seed", "videos_dir", "workers", "plot")


def quality(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="A few short videos: at most 5 minutes on 2 cores.")] = False,
    full: Annotated[bool, typer.Option("--full", help="What is published: at most 3 hours on 2 cores.")] = False,
    chunks: Annotated[
        str, typer.Option(metavar="LIST", help="Lengths in chunks, such as 8,16.", show_default=False)
    ] = "",
    videos: Annotated[int | None, typer.Option(min=1, help="Videos of each length.", show_default=False)] = None,
    methods: Annotated[str, typer.Option(metavar="LIST", help="Such as low,attention-*.", show_default="all")] = "",
    seed: Annotated[int, typer.Option(help="Another seed, other videos.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Results; an interrupted run goes on.", show_default="x2l-quality-SIZE or -DATASET"
        ),
    ] = None,
    videos_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The mp4 files, which runs share.", show_default="user's cache"),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Measure this server (any that takes video_url) instead of a model here.")
    ] = None,
    api_key: Annotated[str, typer.Option(envvar="X2L_API_KEY", help="The key to send.", show_default=False)] = "",
    model: Annotated[str | None, typer.Option(help="The model.", show_default="tiny, or the server's first")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Precision of the model.")
    ] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the videos (not with --base-url).")] = 1,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Write quality.png.")] = True,
    dataset: Annotated[
        Literal["vnbench", "mlvu", "videomme", "longvideobench"] | None,
        typer.Option(help="A public benchmark instead. The options below go with it."),
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Its annotation files and videos.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many questions, from all its categories.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Videos worked on at a time.")] = 2,
    media_root: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="DIR as the server knows it: videos go as file:// URLs, not as uploads."),
    ] = None,
    subtitles: Annotated[bool, typer.Option("--subtitles", help="Put the subtitles before the question.")] = False,
    fps: Annotated[float | None, typer.Option(help="Frames sampled a second instead of the model's rate.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Spread at most so many frames over a video.")] = None,
    reload: Annotated[int | None, typer.Option(min=0, help="Chunks to re-load.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(min=1, help="Bound of the whole mixed cache.")] = None,
    mode: Annotated[Literal["auto", "low", "high"] | None, typer.Option(help="All chunks at one level.")] = None,
) -> None:
    """Asks fresh synthetic videos with every method, and compares accuracy and cost.

    Without --quick or --full: at most 45 minutes on 2 cores. Writes quality.json, quality.png and records.jsonl.

    With --dataset and --data: asks a public benchmark's questions, as the model answers by default or as --reload,
    --budget-tokens or --mode say, and scores as its authors do. Writes NAME.json and NAME.jsonl.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that processes, uploads and stores go
    _refuse(context, _SYNTHETIC_ONLY if dataset else _DATASET_ONLY, "with" if dataset else "without")
    if dataset:
        if data is None:
            raise typer.BadParameter("--dataset needs --data, the folder with its files")
        dials = {"reload": reload, "budget_tokens": budget_tokens, "mode": mode}
        if sum(value is not None for value in dials.values()) > 1:
            raise typer.BadParameter("at most one of --reload, --budget-tokens and --mode")
        if media_root is not None and (base_url is None or not media_root.is_absolute()):
            raise typer.BadParameter("--media-root is an absolute path at the server that --base-url names")
        _run_dataset(
            dataset,
            data,
            asking={"fps": fps, "max_frames": max_frames, "dials": {k: v for k, v in dials.items() if v is not None}},
            out=out or Path(f"x2l-quality-{dataset}"),
            base_url=base_url,
            api_key=api_key,
            model=model,
            settings={"model": model, "device": device, "dtype": dtype},
            limit=limit,
            concurrency=concurrency,
            media_root=media_root,
            subtitles=subtitles,
        )
        return
    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")
    if base_url is not None and workers > 1:
        raise typer.BadParameter("--workers is for a model in this process; a server has its own way to share work")
    size = "quick" if quick else "full" if full else "standard"
    lengths = _numbers(chunks)
    from concurrent.futures.process import BrokenProcessPool

    from server.bench.plot import PlotUnavailable
    from server.bench.quality import SIZES, Target, num_errors, run_quality
    from server.bench.video import ServerUnusable
    from server.cli import fail

    counts = dict(SIZES[size])
    if lengths:
        counts = {length: counts.get(length, max(counts.values())) for length in lengths}
    if videos is not None:
        counts = dict.fromkeys(counts, videos)
    # Wide enough for the table where the output goes to a file.
    console = Console() if sys.stdout.isatty() else Console(width=190)
    try:
        result = run_quality(
            counts,
            [name.strip() for name in methods.split(",")] if methods else [],
            Target(model, base_url, api_key, device, dtype, workers),
            seed=seed,
            out=out or Path(f"x2l-quality-{size}"),
            videos_folder=videos_dir or _cache() / "videos",
            plot=plot,
            console=console,
        )
    except (ValueError, PlotUnavailable, ServerUnusable) as error:
        fail(str(error))
    except BrokenProcessPool:
        fail("a process was killed, perhaps for want of memory; the same command goes on, with fewer --workers")
    if count := num_errors(result):
        fail(
            f"{count} questions got an error instead of an answer and count as wrong; the same command asks them again"
        )


def _run_dataset(name: str, data: Path, *, asking: dict[str, Any], **options: Any) -> None:
    from server.bench.datasets.asker import Asking
    from server.bench.datasets.item import DatasetError
    from server.bench.datasets.run import run_dataset
    from server.cli import fail

    try:
        summary = run_dataset(name, data, asking=Asking(**asking), **options)
    except DatasetError as error:
        fail(str(error))
    items = summary["items"]
    if items["answered"] < items["all"]:
        fail(f"{items['all'] - items['answered']} questions have no reply; the same command asks them again")


def _refuse(context: typer.Context, names: Sequence[str], how: str) -> None:
    """Ends the command if it was given an option that means nothing ``how`` (with or without) --dataset."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} means nothing {how} --dataset")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"not a list of numbers: {text}") from None
    return numbers


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "x2l"


def reload(
    chunk_mb: Annotated[float, typer.Option(min=0.1, help="Megabytes of one chunk's detailed KVs.")] = 40.0,
    top: Annotated[int, typer.Option(min=1, max=6, help="Chunks re-loaded for one question.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Re-loads of which the median is taken.")] = 30,
    follow_ups: Annotated[
        int, typer.Option(min=0, help="Follow-up questions of which the median is taken; 0: none are asked.")
    ] = 20,
    redis_url: Annotated[
        str | None, typer.Option(help="A Redis to measure.", show_default="a redis-server started here")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the results go as JSON.")] = None,
) -> None:
    """Re-loads detailed KVs from each kind of store, against reading as many plain bytes, and takes them to the device.

    Then asks a live server with the bundled model follow-up questions: cold, from each store, everything resident.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from kvstore.errors import StoreError
    from server.bench.circumstances import to_json
    from server.bench.reload import run_reload
    from server.cli import fail

    console = Console(stderr=True)
    try:
        result = run_reload(
            chunk_mb=chunk_mb, top=top, repeats=repeats, follow_ups=follow_ups, redis_url=redis_url, tell=console.print
        )
    except StoreError as error:
        fail(str(error))
    text = to_json(result)
    if out is not None:
        out.write_text(text + "\n")
    for row in result["throughput"]:
        floors = ", ".join(f"{name} {speed:.2f}" for name, speed in row["floor_gb_s"].items())
        met = "met" if row["met"] else "MISSED"
        print(
            f"{row['tier']:7} {row['reload_gb_s']:6.2f} GB/s, {row['share']:.0%} of the floor ({floors}); "
            f"at least {row['at_least']:.0%}: {met}"
        )
        arrival = row["arrival"]
        print(
            f"{row['tier']:7} {arrival['gb_s']:6.2f} GB/s to {arrival['device']}, {arrival['ms']:.1f} ms; "
            f"one after the other {arrival['in_turn_ms']:.1f} ms; the copy alone {arrival['floor_ms']:.1f} ms"
        )
    for row in result.get("follow_up", {}).get("tiers", ()):
        times = ", ".join(f"{name.removesuffix('_ms')} {row[name]} ms" for name in row if name != "tier")
        print(f"{row['tier']:7} first token: {times}")
    if not all(row["met"] for row in result["throughput"]):
        sys.exit(1)


def serving(
    model: Annotated[str, typer.Option(help="The model: tiny, a folder or a hub's repository.")] = "tiny",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Precision of the model.")
    ] = "auto",
    minutes: Annotated[int, typer.Option(min=1, help="Length of the video of the follow-up questions.")] = 8,
    load_minutes: Annotated[int, typer.Option(min=1, help="Length of each of the other videos.")] = 2,
    videos: Annotated[int, typer.Option(min=1, help="Videos that are asked about at the same time.")] = 4,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions at the same time.")] = 16,
    batches: Annotated[str, typer.Option(metavar="LIST", help="Streams decoded together.")] = "1,32",
    kv_tokens: Annotated[str, typer.Option(metavar="LIST", help="KV tokens of their caches.")] = "2000,18000",
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 5,
    memory_gb: Annotated[float, typer.Option(min=1, help="Memory on which whole caches would be kept.")] = 80.0,
    serve: Annotated[str, typer.Option(metavar="OPTIONS", help="More options of x2l serve, in one string.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the results go as JSON.")] = None,
) -> None:
    """Measures servers on this machine through HTTP, beside what its memory, disk and arithmetic allow.

    Follow-up questions with the detailed KVs in each tier, decoding, prefill, resident KVs, many questions at once. The
    videos are made here; the targets of time are those of 7B models on an H100.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers and stores go
    import httpx

    from server.bench.circumstances import to_json
    from server.bench.serving.run import Sizes, Target, run_serving
    from server.bench.serving.table import format_table
    from server.bench.video import ServerUnusable, VideoRefused
    from server.cli import fail
    from server.client import ServerError

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            out.write_text(to_json(result) + "\n")

    try:
        sizes = Sizes(
            minutes,
            load_minutes,
            videos,
            concurrency,
            tuple(_numbers(batches)),
            tuple(_numbers(kv_tokens)),
            repeats,
            memory_gb,
        )
        with _showing(sizes.num_steps) as tell:
            result = run_serving(Target(model, device, dtype, serve), sizes, tell, keep)
    except (ValueError, ServerUnusable, VideoRefused, ServerError, httpx.HTTPError, OSError) as error:
        fail(str(error) or type(error).__name__)
    keep(result)
    print("\n".join(format_table(result["table"])))
    if result["not_measured"]:
        fail("; ".join(result["not_measured"]))


@contextmanager
def _showing(num_steps: int) -> Iterator[Callable[[str, int], None]]:
    """A function that shows what is being done and that so many steps are over: a bar, or lines where there is no
    terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=num_steps)
        shown = ""

        def tell(text: str, steps: int) -> None:
            nonlocal shown
            progress.update(task, description=text, advance=steps)
            if text != shown and not console.is_terminal:
                console.print(text)
            shown = text

        yield tell
