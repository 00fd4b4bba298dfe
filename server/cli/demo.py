"""``x2l demo``: a video made on the spot, asked three questions through the server."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import typer
from rich.console import Console

from server.client import connect
from server.spool import Spool

SEED = 7
NUM_CHUNKS = 8
TYPES = ("code", "order", "time")
MAX_TOKENS = 64


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(demo)


def demo() -> None:
    """Makes a video, serves it, asks three questions.

    The video is synthetic, the port a free one, the store temporary. On a terminal the server stays up until Ctrl-C;
    otherwise the exit code is 0 only if all answers were right.
    """
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server and files go
    with contextlib.closing(Spool()) as spool:
        all_right = _run(spool.folder, console)
    if not all_right:
        sys.exit(1)


def _run(folder: Path, console: Console) -> bool:
    from server.app import open_backend
    from server.cli.files import clock, send_file, wait_until_ready
    from server.config import load_settings
    from server.models.tiny.make_video import make_video
    from server.serving import running

    video = folder / "demo.mp4"
    with console.status("making a synthetic video"):
        make_video(video, seed=SEED, chunks=NUM_CHUNKS)
    facts = json.loads(video.with_suffix(".json").read_text())
    settings = load_settings(model="tiny", store=f"disk:{folder / 'store'}", port=0, api_key=(), log_level="warning")
    backend = open_backend(settings)
    with running(settings, backend) as address, connect(address, "") as client:
        console.print(f"{video.name}: {clock(facts['duration_s'])}, {video.stat().st_size / 1e6:.1f} MB; {address}")
        file_id = send_file(client, video, {}, console)["id"]
        wait_until_ready(client, file_id, console)
        right = [_ask(client, file_id, question, console) for question in _pick(facts["questions"])]
        console.print(f"\n{sum(right)} of {len(right)} answers are right")
        if sys.stdin.isatty() and sys.stdout.isatty():
            console.print(
                f'Ask on: [bold]{address}/[/] or x2l ask --base-url {address} {file_id} "..."', soft_wrap=True
            )
            console.print("Ctrl-C stops the server")
            _wait()
    return all(right)


def _pick(questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [next(question for question in questions if question["type"] == kind) for kind in TYPES]


def _ask(client: httpx.Client, file_id: str, question: dict[str, Any], console: Console) -> bool:
    from server.bench.grade import is_right
    from server.cli.ask import print_evidence, stream_answer
    from server.cli.files import clock

    console.print(f"\n[bold]{question['question']}[/]")
    text, evidence = stream_answer(client, [file_id], question["question"], {"max_tokens": MAX_TOKENS})
    right = is_right(question["type"], question["answer"], text)
    console.print(f"{'right' if right else 'WRONG'}: the truth is {question['answer']!r}, ", end="")
    start, end = clock(question["start_s"]), clock(question["end_s"])
    console.print(f"shown at {start}" if start == end else f"shown from {start} to {end}", highlight=False)
    print_evidence(evidence, console)
    return right


def _wait() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
