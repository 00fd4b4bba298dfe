"""A video that questions can be put to, wherever its model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from compression.score import Scorer
from compression.select import Dial
from server.bench.reply import Reply


class VideoRefused(RuntimeError):  # noqa: N818 - errors are named for what is wrong
    """A video could not be prefilled; the message says why."""


class ServerUnusable(RuntimeError):  # noqa: N818
    """A server cannot be reached or asked; the message says why."""


class AskedVideo(Protocol):
    """One video, ready to be asked about.

    ``default_reload`` chunks are re-loaded where nothing is said. ``prefill_s`` is what getting it ready took.
    """

    num_chunks: int
    default_reload: int
    prefill_s: float

    def ask(self, asked: Sequence[tuple[str, Dial]], scorer: Scorer | None = None) -> list[Reply]:
        """One reply a question; an error is a reply too. ``scorer`` None is the model's own."""
