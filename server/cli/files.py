"""``x2l upload``, ``x2l files`` and ``x2l rm``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from server.cli.client import DEFAULT_BASE_URL, ApiKey, BaseUrl, ServerError, check, connect, event_stream


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    app.command()(upload)
    app.command("files")(list_files)
    app.command("rm")(remove)


def upload(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="A video file.")],
    fps: Annotated[float | None, typer.Option(help="Frames sampled a second instead of the model's rate.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Spread at most this many frames over the video.")] = None,
    expires_after_s: Annotated[int | None, typer.Option(help="Delete the file after so many seconds.")] = None,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = "",
) -> None:
    """Uploads a video, waits until it is ready, and prints its id."""
    form: dict[str, Any] = {}
    if fps is not None:
        form["fps"] = str(fps)
    if max_frames is not None:
        form["max_frames"] = str(max_frames)
    if expires_after_s is not None:
        form |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(expires_after_s)}
    with connect(base_url, api_key) as client:
        record = upload_file(client, file, form, Console(stderr=True))
    print(record["id"])


def upload_file(client: httpx.Client, path: Path, form: dict[str, Any], console: Console) -> dict[str, Any]:
    """Uploads with a progress bar through bytes and prefill; the processed file object. Raises ServerError."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns[:3], DownloadColumn(), console=console) as progress, path.open("rb") as file:
        task = progress.add_task("upload", total=path.stat().st_size)
        source = progress.wrap_file(file, task_id=task)
        reply = client.post(
            "/v1/files", data={"purpose": "user_data"} | form, files={"file": (path.name, source, "video/mp4")}
        )
        record: dict[str, Any] = check(reply).json()
    with (
        Progress(*columns, console=console) as progress,
        event_stream(client, "GET", f"/v1/files/{record['id']}/events") as states,
    ):
        task = progress.add_task("prefill", total=1.0)
        for record in states:
            progress.update(task, completed=(record["video"] or {}).get("progress", 0.0))
    if record["status"] != "processed":
        raise ServerError(record["status_details"] or "the server stopped before the video was ready")
    return record


def list_files(base_url: BaseUrl = DEFAULT_BASE_URL, api_key: ApiKey = "") -> None:
    """Lists the uploaded files, newest first."""
    with connect(base_url, api_key) as client:
        records = check(client.get("/v1/files")).json()["data"]
    table = Table("id", "file", "status", "length", "chunks", "MB", box=None, header_style="bold")
    for record in records:
        video = record["video"]
        table.add_row(
            record["id"],
            record["filename"],
            record["status"],
            clock(video["duration_s"]) if video else "",
            f"{video['chunks_done']}/{video['num_chunks']}" if video else "",
            f"{record['bytes'] / 1e6:.1f}",
        )
    Console(soft_wrap=True, markup=False).print(table)


def remove(
    file_ids: Annotated[list[str], typer.Argument(metavar="FILE_ID...", help="Ids, as x2l files lists them.")],
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = "",
) -> None:
    """Deletes files and all that was made of them."""
    with connect(base_url, api_key) as client:
        for file_id in file_ids:
            check(client.delete(f"/v1/files/{file_id}"))
            print(file_id)


def clock(seconds: float) -> str:
    """Seconds as mm:ss."""
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"
