"""A file of JSON lines that a run adds to, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self


class JournalInUse(RuntimeError):  # noqa: N818 - errors are named for what is wrong
    """Another process adds to the file."""


class Journal:
    """One process at a time. ``lines`` are those that were there; a last one that was cut off is taken away."""

    def __init__(self, path: Path) -> None:
        """Raises JournalInUse, OSError."""
        self._file = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise JournalInUse(f"another process is at work on {path}") from None
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        self._whole: int | None = whole
        self.lines = data[:whole].splitlines()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def add(self, lines: Iterable[bytes]) -> None:
        """Adds lines (without their ends); they are in the file when this returns."""
        if self._whole is not None:  # only now: a file that turns out to be no journal stays as it is
            self._file.truncate(self._whole)
            self._whole = None
        self._file.writelines(line + b"\n" for line in lines)
        self._file.flush()
