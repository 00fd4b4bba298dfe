"""``x2l bench quality``: one run from the choice of videos to table, JSON and plot."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from server.bench.circumstances import circumstances, to_json
from server.bench.local import LocalBench
from server.bench.methods import PLAIN
from server.bench.plot import draw, require_matplotlib
from server.bench.records import RunFolder, open_folder
from server.bench.rows import EVERY_METHOD, choose_methods, methods_at_server, methods_here
from server.bench.run import Bench, Job, jobs_left, run_job
from server.bench.summary import summarize
from server.bench.synthetic import choose_videos, making
from server.bench.table import print_table, print_targets
from server.bench.targets import check
from server.bench.video import ServerUnusable
from server.bench.workers import Answered, run_jobs
from server.models.base import VideoModel
from server.models.registry import Device, DType, load_model
from server.models.tiny.world import CHUNK_TICKS

if TYPE_CHECKING:
    from server.bench.remote import RemoteBench

SIZES: Mapping[str, Mapping[int, int]] = {
    "quick": {8: 1, 16: 1},
    "standard": {8: 6, 16: 10, 32: 6, 64: 4, 128: 2},
    "full": {8: 13, 16: 32, 32: 13, 64: 32, 128: 13},
}
"""Length in chunks -> videos, of 16 questions each."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured: a model in this process, or the server at ``base_url``."""

    model: str | None = None
    base_url: str | None = None
    api_key: str = ""
    device: Device = "auto"
    dtype: DType = "auto"
    workers: int = 1
    """Processes that share the videos."""


def run_quality(
    counts: Mapping[int, int],
    patterns: Sequence[str],
    target: Target,
    *,
    seed: int,
    out: Path,
    videos_folder: Path,
    plot: bool,
    console: Console,
) -> dict[str, Any]:
    """Runs what is left to run in the folder ``out``, then writes and prints everything; the result as in the JSON.

    Raises ValueError for a choice of videos or methods that is empty or unknown, OtherRun for a folder that holds
    another run, ServerUnusable, PlotUnavailable, and as :func:`server.models.registry.load_model`.
    """
    if plot:
        require_matplotlib()
    videos = choose_videos(seed, dict(counts))
    if not videos:
        raise ValueError("no videos: ask for at least one length and one video a length")
    configuration: dict[str, Any] = {"seed": seed, "videos": {str(chunks): count for chunks, count in counts.items()}}
    with ExitStack() as stack:
        answer: Callable[[Sequence[Job]], Generator[Answered]]
        if target.base_url is not None:
            remote = stack.enter_context(_server(target))
            methods = choose_methods(patterns, methods_at_server(dials=remote.has_dials))
            default = PLAIN.name
            configuration |= {"server": target.base_url, "model": remote.model}
            folder = stack.enter_context(open_folder(out, configuration))
            answer = partial(_one_by_one, remote, videos_folder)
        else:
            choose_methods(patterns, EVERY_METHOD)  # a mistake is told before a model is loaded
            load = partial(load_model, target.model or "tiny", device=target.device, dtype=target.dtype)
            model = load()
            methods = choose_methods(patterns, methods_here(model))
            _check_chunks(model)
            default = f"attention-{model.spec.default_reload}"
            dtype = str(model.dtype).removeprefix("torch.")
            configuration |= {"model": model.spec.name, "fingerprint": model.fingerprint, "dtype": dtype}
            configuration["scorer"] = repr(model.scorer)  # which the fingerprint leaves out
            folder = stack.enter_context(open_folder(out, configuration))
            if target.workers > 1:
                answer = partial(run_jobs, load, target.workers, videos_folder, out / "work")
            else:
                bench = stack.enter_context(LocalBench(load, model, out / "work"))
                answer = partial(_one_by_one, bench, videos_folder)
        jobs = jobs_left(folder, videos, methods)
        _keep(answer(jobs), jobs, folder, console)
        records = folder.records
    summary = summarize(records)
    result = circumstances("x2l", bundled=target.base_url is None) | {
        "configuration": configuration,
        "default": default,
        "lengths": summary,
    }
    result["targets"] = check(summary, default)
    (out / "quality.json").write_text(to_json(result) + "\n", encoding="utf-8")
    print_table(summary, default, console)
    print_targets(result["targets"], console)
    if plot:
        draw(summary, default, out / "quality.png")
        for part in summary if len(summary) > 1 else ():
            draw([part], default, out / f"quality-{part['chunks']}.png")
    return result


def _check_chunks(model: VideoModel) -> None:
    """Raises ValueError where a chunk is not as long as one of the synthetic videos."""
    chunk_s = model.spec.frames_per_chunk / model.spec.fps
    if chunk_s != CHUNK_TICKS:
        raise ValueError(
            f"chunks of the synthetic videos are {CHUNK_TICKS} s long, those of {model.spec.name} {chunk_s:g} s: "
            "set frames_per_chunk in its config.json"
        )


def _server(target: Target) -> RemoteBench:
    try:
        from server.bench.remote import RemoteBench
    except ImportError:
        raise ServerUnusable("--base-url needs the openai client: pip install 'video-x2l-server[bench]'") from None
    return RemoteBench(str(target.base_url), api_key=target.api_key, model=target.model)


def _one_by_one(bench: Bench, videos_folder: Path, jobs: Sequence[Job]) -> Generator[Answered]:
    with making([job.video for job in jobs], videos_folder) as path_of:
        for job in jobs:
            for name, records in run_job(bench, job, path_of(job.video)):
                yield job, name, records


def _keep(answered: Generator[Answered], jobs: Sequence[Job], folder: RunFolder, console: Console) -> None:
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    shown = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), *times, console=console)
    with shown as progress, closing(answered):
        task = progress.add_task(f"{len(jobs)} videos", total=sum(job.size for job in jobs))
        for job, name, records in answered:
            folder.add(records)
            video = job.video
            progress.update(
                task, advance=video.chunks, description=f"{video.chunks} chunks, seed {video.seed} {name:24}"
            )


def num_errors(result: Mapping[str, Any]) -> int:
    """Questions that got an error instead of a reply."""
    return sum(row["errors"] for part in result["lengths"] for row in part["methods"].values())
