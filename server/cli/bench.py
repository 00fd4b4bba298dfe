"""``x2l bench``: measurements."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console


def add_to(app: typer.Typer) -> None:
    """Registers the sub-commands."""
    bench = typer.Typer(help="Measures quality and speed.", no_args_is_help=True, rich_markup_mode=None)
    bench.command()(quality)
    app.add_typer(bench, name="bench")


def quality(
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
        typer.Option(metavar="DIR", help="Results; an interrupted run goes on.", show_default="x2l-quality-SIZE"),
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
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Write quality.png.")] = True,
) -> None:
    """Asks fresh synthetic videos with every method, and compares accuracy and cost.

    Without --quick or --full: at most 45 minutes on 2 cores. Writes quality.json, quality.png and records.jsonl.
    """
    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")
    size = "quick" if quick else "full" if full else "standard"
    lengths = _numbers(chunks)
    from server.bench.plot import PlotUnavailable
    from server.bench.quality import SIZES, Target, num_errors, run_quality
    from server.bench.remote import ServerUnusable
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
            Target(model, base_url, api_key, device, dtype),
            seed=seed,
            out=out or Path(f"x2l-quality-{size}"),
            videos_folder=videos_dir or _cache() / "videos",
            plot=plot,
            console=console,
        )
    except (ValueError, PlotUnavailable, ServerUnusable) as error:
        fail(str(error))
    if count := num_errors(result):
        fail(
            f"{count} questions got an error instead of an answer and count as wrong; the same command asks them again"
        )


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"not a list of numbers: {text}") from None
    return numbers


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "x2l"
