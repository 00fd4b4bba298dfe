"""Locks with a lease, as files in a folder that several processes share.

A file holds the Unix time at which its lock lapses and the owner. Whoever looks at one or changes it holds the kernel's
lock on the folder meanwhile, which falls with its process: two takers of a lapsed lock come one after the other.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Locks:
    """Locks in ``folder``. Any method raises OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self) -> None:
        """Makes the folder if missing, and clears what lapsed in it."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with self._alone():
            for path in self._folder.iterdir():
                if _held(path) is None:
                    path.unlink()

    def acquire(self, name: str, owner: str, ttl_s: float) -> bool:
        """Takes or renews; whether ``owner`` holds it now."""
        path = self._path(name)
        with self._alone():
            if _held(path) not in (None, owner):
                return False
            path.touch(mode=0o600)
            path.write_text(f"{time.time() + ttl_s}\n{owner}")
            return True

    def release(self, name: str, owner: str) -> bool:
        """Whether ``owner`` held it."""
        path = self._path(name)
        with self._alone():
            if _held(path) != owner:
                return False
            path.unlink()
            return True

    def _path(self, name: str) -> Path:
        return self._folder / hashlib.sha256(name.encode()).hexdigest()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _held(path: Path) -> str | None:
    """Who holds the lock; None also for a file that a crash or a full disk cut short."""
    try:
        end_s, owner = path.read_text().split("\n", 1)
        return owner if float(end_s) > time.time() else None
    except (FileNotFoundError, ValueError):
        return None
