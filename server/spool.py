"""Temporary files that nobody has to clear by hand, however the process ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "x2l-"
_LOCK = "lock"


class Spool:
    """A temporary folder of this process alone, ``folder``, below ``parent`` (None: where the system has them).

    It holds a locked file, and the lock falls with its process, however that ends. So opening a spool clears those of
    this user that a killed process has left behind, and no others.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """``parent`` must exist. Raises OSError."""
        parent = parent or Path(tempfile.gettempdir())
        for orphan in parent.glob(f"{_PREFIX}*/{_LOCK}"):
            _clear_if_abandoned(orphan)
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        # Locked before it has the name that others look for.
        unnamed = self.folder / f".{_LOCK}"
        self._fd = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        unnamed.rename(self.folder / _LOCK)

    def close(self) -> None:
        """Removes the folder and what it holds. May be called again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _clear_if_abandoned(lock: Path) -> None:
    try:
        if lock.parent.lstat().st_uid != os.geteuid():
            return
        fd = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # closed at this moment, or not ours
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.parent, ignore_errors=True)
    except BlockingIOError:  # its process lives
        pass
    finally:
        os.close(fd)
