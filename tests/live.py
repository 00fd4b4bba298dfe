"""A running server and how tests talk to it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import openai

from server.app import Backend

MODEL = "x2l-tiny"


@dataclass(frozen=True)
class Live:
    """A running server."""

    url: str
    backend: Backend

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """The stock SDK; refusals come back at once instead of being tried again."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)


Serve = Callable[..., AbstractContextManager[Live]]


def ask(file_id: str, question: str = "What code is on the red star?") -> list[dict[str, Any]]:
    """The messages of one question about one file."""
    content = [{"type": "file", "file": {"file_id": file_id}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]
