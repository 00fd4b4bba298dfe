"""A video at the server that is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench.serving.asker import Asker
from server.bench.video import VideoRefused
from server.client import check, event_stream


@dataclass(frozen=True)
class UploadedVideo:
    """A processed file: its id, the extension field ``video`` of it, and questions about it."""

    file_id: str
    facts: Mapping[str, Any]
    questions: Sequence[str]

    @property
    def token_nbytes(self) -> int:
        """Bytes of one KV token as the store keeps it."""
        return int(self.facts["bytes"]["high"] // self.facts["tokens"]["high"])

    @property
    def full_nbytes(self) -> int:
        """What the KVs of all visual tokens would take."""
        return int(self.facts["tokens"]["visual"]) * self.token_nbytes


def upload(asker: Asker, path: Path, questions: Sequence[str]) -> UploadedVideo:
    """Uploads and waits for the prefill. Raises VideoRefused, ServerError, httpx.HTTPError."""
    with path.open("rb") as file:
        sent = asker.client.post("/v1/files", data={"purpose": "user_data"}, files={"file": (path.name, file)})
    record = check(sent).json()
    with event_stream(asker.client, "GET", f"/v1/files/{record['id']}/events") as states:
        *_, record = states
    if record["status"] != "processed":
        raise VideoRefused(f"{path.name}: {record['status_details'] or 'the server stopped'}")
    return UploadedVideo(record["id"], record["video"], questions)
