"""A video at the server that is measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench.serving.asker import Ask, Asker
from server.bench.video import VideoRefused
from server.client import check, event_stream

_SUBJECTS = ("the red car", "the woman with the umbrella", "the dog", "the number on the door", "the blue box")
_QUESTIONS = (
    "When is {} shown for the first time?",
    "What happens right after {} has gone?",
    "How often does one see {}, and where does it stand?",
    "What is written beside {}?",
)
QUESTIONS = tuple(question.format(subject) for subject in _SUBJECTS for question in _QUESTIONS)


@dataclass(frozen=True)
class UploadedVideo:
    """A processed file: its id, the extension field ``video`` of it, and the KV tokens of its caches with the prefix,
    all chunks at one level. ``tenths_s``: what each tenth of the prefill took, as the server told of it."""

    file_id: str
    facts: Mapping[str, Any]
    low_tokens: int
    high_tokens: int
    tenths_s: tuple[float, ...] = ()


def upload(asker: Asker, path: Path) -> UploadedVideo:
    """Uploads and waits for the prefill. Raises VideoRefused, ServerError, httpx.HTTPError."""
    begin_s = time.perf_counter()
    with path.open("rb") as file:
        sent = asker.client.post("/v1/files", data={"purpose": "user_data"}, files={"file": (path.name, file)})
    record = check(sent).json()
    ends_s: list[float] = []
    with event_stream(asker.client, "GET", f"/v1/files/{record['id']}/events") as states:
        for record in states:
            while record["video"]["progress"] * 10 >= len(ends_s) + 1:
                ends_s.append(time.perf_counter())
    if record["status"] != "processed":
        raise VideoRefused(f"{path.name}: {record['status_details'] or 'the server stopped'}")
    tenths_s = tuple(end - begin for begin, end in zip([begin_s, *ends_s[:-1]], ends_s, strict=True))
    sizes = asker.ask(Ask(record["id"], QUESTIONS[0], 1, {"mode": "high"})).x2l["kv_tokens"]
    return UploadedVideo(record["id"], record["video"], sizes["low"], sizes["high"], tenths_s)
