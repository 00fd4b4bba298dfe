"""A live ``x2l serve`` process and questions to it through the stock OpenAI client."""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common import Video
from openai import OpenAI

from server.bench.serving import process
from server.bench.serving.process import Served
from server.bench.video import ServerUnusable

MODEL = "x2l-tiny"
MAX_TOKENS = 64


class Live(Served):
    """A running server."""

    def client(self) -> OpenAI:
        """The stock client. It tries nothing again: a refusal is a finding."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)


@dataclass(frozen=True)
class Job:
    """One question. ``dials`` is the request's ``x2l`` object; no file is a question without the video."""

    file_id: str | None
    question: str
    dials: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Reply:
    """The answer, the response's ``x2l`` object (empty without a video) and its usage."""

    text: str
    x2l: dict[str, Any]
    usage: dict[str, Any]


@contextlib.contextmanager
def serving(*options: str, log: IO[str] | None = None) -> Iterator[Live]:
    """``x2l serve`` on a free port with a disk store of its own; both are gone in the end, also after SIGTERM. ``log``
    gets its errors."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="x2l-benchmark-") as folder:
        try:
            with process.serving("--store", f"disk:{folder}/store", *options, log=log) as served:
                yield Live(served.url, served.pid, served.plan)
        except ServerUnusable as error:
            raise SystemExit(str(error)) from None


def upload(client: OpenAI, videos: Sequence[Video]) -> dict[Path, Any]:
    """Uploads and waits; the processed FileObject of every video's path."""
    files = {}
    for video in videos:
        file = client.files.create(file=video.path, purpose="user_data")
        file = client.files.wait_for_processing(file.id, poll_interval=0.1)
        if file.status != "processed":
            raise SystemExit(f"{video.path.name}: {file.status_details}")
        files[video.path] = file
    return files


def ask(client: OpenAI, job: Job) -> Reply:
    """Asks one question and waits for the whole answer. Raises openai.APIError."""
    completion = client.chat.completions.create(**request(job))
    assert completion.usage is not None
    x2l = (completion.model_extra or {}).get("x2l", {})
    return Reply(completion.choices[0].message.content or "", x2l, completion.usage.model_dump())


def ask_all(client: OpenAI, jobs: Sequence[Job], concurrency: int) -> list[Reply]:
    """Asks all, ``concurrency`` at a time; the replies in the jobs' order."""
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda job: ask(client, job), jobs))


def request(job: Job) -> dict[str, Any]:
    """What to give to ``client.chat.completions.create``."""
    content: list[dict[str, Any]] = [{"type": "text", "text": job.question}]
    if job.file_id is not None:
        content.insert(0, {"type": "file", "file": {"file_id": job.file_id}})
    body: dict[str, Any] = {"extra_body": {"x2l": dict(job.dials)}} if job.dials else {}
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS} | body
