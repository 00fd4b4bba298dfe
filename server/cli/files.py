"""``x2l upload``, ``x2l files``, ``x2l pin``, ``x2l unpin`` and ``x2l rm``."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import httpx
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from server.cli.text import elided, printable
from server.client import DEFAULT_BASE_URL, ApiKey, BaseUrl, ServerError, check, connect, event_stream

IN_PARTS_ABOVE_NBYTES = 512 * 2**20
PART_NBYTES = 64 * 2**20
_LEAST_NAME_WIDTH, _NAME_WIDTH = 16, 48
_NOTE_WIDTH = 160


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    app.command()(upload)
    app.command("files")(list_files)
    app.command()(pin)
    app.command()(unpin)
    app.command("rm")(remove)


def upload(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", exists=True, dir_okay=False, readable=True, help="Video files."),
    ],
    fps: Annotated[float | None, typer.Option(help="Frames sampled a second instead of the model's rate.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Spread at most this many frames over the video.")] = None,
    expires_after_s: Annotated[int | None, typer.Option(help="Delete the file after so many seconds.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="The store's quota never removes the file.")] = False,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = "",
) -> None:
    """Uploads videos, prints their ids, and waits until they are ready.

    The exit code is 1 if one cannot be made ready.
    """
    form: dict[str, Any] = {"fps": fps, "max_frames": max_frames, "pinned": pin}
    if expires_after_s is not None:
        form["expires_after"] = {"anchor": "created_at", "seconds": expires_after_s}
    form = {name: value for name, value in form.items() if value is not None}
    console = Console(stderr=True)
    with connect(base_url, api_key) as client:
        ids: list[str] = []
        for file in files:
            ids.append(send_file(client, file, form, console)["id"])
            print(ids[-1], flush=True)  # whatever becomes of the wait, it is known
        failures: list[str] = []
        for file, file_id in zip(files, ids, strict=True):
            try:
                wait_until_ready(client, file_id, console)
            except ServerError as error:
                failures.append(f"{printable(file.name)}: {error}" if len(files) > 1 else str(error))
    if failures:
        raise ServerError("; ".join(failures))


def send_file(client: httpx.Client, path: Path, form: dict[str, Any], console: Console) -> dict[str, Any]:
    """Uploads with a progress bar; the file object. ``form`` holds the optional fields, as the JSON of ``POST
    /v1/uploads`` has them. Raises ServerError."""
    with _progress(DownloadColumn(), console) as progress, path.open("rb") as file:
        nbytes = path.stat().st_size
        task = progress.add_task("upload", total=nbytes)
        source = progress.wrap_file(file, task_id=task)
        send = _send if nbytes <= IN_PARTS_ABOVE_NBYTES else _send_in_parts
        return send(client, source, path.name, nbytes, form)


def wait_until_ready(client: httpx.Client, file_id: str, console: Console) -> dict[str, Any]:
    """Waits through the prefill, with a progress bar; the processed file object. Raises ServerError."""
    with (
        _progress(TimeElapsedColumn(), console) as progress,
        event_stream(client, "GET", f"/v1/files/{file_id}/events") as states,
    ):
        task = progress.add_task("prefill", total=1.0)
        record: dict[str, Any] = {"status": "uploaded", "status_details": None}
        for record in states:
            progress.update(task, completed=(record["video"] or {}).get("progress", 0.0))
    if record["status"] != "processed":
        raise ServerError(record["status_details"] or f"the server stopped before {file_id} was ready")
    return record


def _progress(last: ProgressColumn, console: Console) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), last, console=console)


def _send(client: httpx.Client, file: BinaryIO, name: str, nbytes: int, form: dict[str, Any]) -> dict[str, Any]:
    data = {"purpose": "user_data"}
    for field, value in form.items():
        if field == "expires_after":
            data |= {f"{field}[{key}]": str(item) for key, item in value.items()}
        else:
            data[field] = json.dumps(value)
    record: dict[str, Any] = check(client.post("/v1/files", data=data, files={"file": (name, file)})).json()
    return record


def _send_in_parts(
    client: httpx.Client, file: BinaryIO, name: str, nbytes: int, form: dict[str, Any]
) -> dict[str, Any]:
    """A cut connection costs one part and not the whole."""
    body = {"filename": name, "purpose": "user_data", "bytes": nbytes, "mime_type": "application/octet-stream"}
    url = f"/v1/uploads/{check(client.post('/v1/uploads', json=body | form)).json()['id']}"
    md5 = hashlib.md5(usedforsecurity=False)
    part_ids = []
    while data := file.read(PART_NBYTES):
        md5.update(data)
        for pause_s in (1, 2, 4, 8, None):
            try:
                part_ids.append(check(client.post(f"{url}/parts", files={"data": data})).json()["id"])
                break
            except httpx.TransportError:
                if pause_s is None:
                    raise
                time.sleep(pause_s)
    done = check(client.post(f"{url}/complete", json={"part_ids": part_ids, "md5": md5.hexdigest()}))
    record: dict[str, Any] = done.json()["file"]
    return record


def list_files(
    json_output: Annotated[bool, typer.Option("--json", help="Print the file objects as a JSON list.")] = False,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = "",
) -> None:
    """Lists the uploaded files, newest first.

    Sizes are in MB: the file itself, its detailed KVs (L) and its small ones (H). What is wrong with a file stands
    below it.
    """
    with connect(base_url, api_key) as client:
        records = check(client.get("/v1/files", params={"limit": 10_000})).json()["data"]
    if json_output:
        print(json.dumps(records, indent=2))  # ASCII: names that others gave cannot steer a terminal
        return
    terminal = Console()
    print_files(records, terminal.width if terminal.is_terminal else None)


def print_files(records: Sequence[dict[str, Any]], room: int | None) -> None:
    """A row a file, in ``room`` columns (None: no terminal) as far as shorter names make it so; what there is to say of
    it below."""
    console = Console(width=1000, soft_wrap=True, markup=False, emoji=False)
    name_width = _NAME_WIDTH
    if room is not None:
        nameless = console.measure(_table(records, 1)).maximum
        name_width = max(_LEAST_NAME_WIDTH, room - nameless + len("file"))
    with console.capture() as table:
        console.print(_table(records, name_width))  # rows that a narrow terminal may wrap, not cells
    header, *rows = table.get().splitlines()
    print(header)
    for row, record in zip_longest(rows, records):
        print(row)
        if record and record["status_details"]:
            print(elided(f"  {printable(record['status_details'])}", room or _NOTE_WIDTH))


def _table(records: Sequence[dict[str, Any]], name_width: int) -> Table:
    table = Table(box=None, header_style="bold", show_footer=bool(records), footer_style="bold")
    sizes = [_sizes(record) for record in records]
    totals = [sum(column) for column in zip(*sizes, strict=True)]
    table.add_column("id", f"total {megabytes(sum(totals))} MB")
    for name in ("file", "status", "length", "chunks"):
        table.add_column(name)
    for name, total in zip(("MB", "L MB", "H MB"), totals or (0, 0, 0), strict=True):
        table.add_column(name, megabytes(total), justify="right")
    table.add_column("expires")
    table.add_column("pinned")
    for record, nbytes in zip(records, sizes, strict=True):
        video, expires_at = record["video"], record["expires_at"]
        table.add_row(
            record["id"],
            elided(printable(record["filename"]), name_width),
            record["status"],
            clock(video["duration_s"]) if video else "",
            f"{video['chunks_done']}/{video['num_chunks']}" if video else "",
            *map(megabytes, nbytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(expires_at)) if expires_at else "",
            "yes" if record["pinned"] else "",
        )
    return table


def pin(
    file_ids: Annotated[list[str], typer.Argument(metavar="FILE_ID", help="Ids, as x2l files lists them.")],
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = "",
) -> None:
    """Pins files: the store's quota never removes them.

    They expire all the same.
    """
    _set_pinned(file_ids, True, base_url, api_key)


def unpin(
    file_ids: Annotated[list[str], typer.Argument(metavar="FILE_ID", help="Ids, as x2l files lists them.")],
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = "",
) -> None:
    """Lets the store's quota remove files again when they are the least recently used."""
    _set_pinned(file_ids, False, base_url, api_key)


def _set_pinned(file_ids: list[str], pinned: bool, base_url: str, api_key: str) -> None:
    with connect(base_url, api_key) as client:
        for file_id in file_ids:
            check(client.post(f"/v1/files/{file_id}", json={"pinned": pinned}))
            print(file_id)


def remove(
    file_ids: Annotated[list[str], typer.Argument(metavar="FILE_ID", help="Ids, as x2l files lists them.")],
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


def megabytes(nbytes: int) -> str:
    """Bytes in MB."""
    return f"{nbytes / 1e6:.1f}"


def _sizes(record: dict[str, Any]) -> tuple[int, int, int]:
    kvs = record["video"]["bytes"] if record["video"] else {"low": 0, "high": 0}
    return record["bytes"], kvs["low"], kvs["high"]
