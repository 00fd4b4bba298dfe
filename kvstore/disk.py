"""Blobs as files in a folder of their own, which several processes may share.

    ROOT/x2l-store              marks the folder as ours and holds the version of this layout
    ROOT/blobs/<key>+x2l        one file a blob; a key's segments are folders, "+" is in no key
    ROOT/tmp/<session>/         files being written by one opened store, which holds a lock on <session>/lock
    ROOT/locks/<SHA-256>        one file a lock that is held, named for the lock: when it lapses, and its owner

A blob is written aside, fsynced, and renamed into place. The lock falls with its process, however it ends, so what a
crash leaves behind is known for certain and is cleared by the next process that opens the store.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kvstore.base import BlobStat, Data, NewBuffer, Sealed, Store, Tier, new_buffer
from kvstore.envelope import HEADER_NBYTES
from kvstore.errors import FormatVersionError, InvalidStoreURL, StoreFull, StoreUnavailable
from kvstore.locks import Locks

_LAYOUT_VERSION = 1
_MARKER = "x2l-store"
_SUFFIX = "+x2l"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PLACE_ATTEMPTS = 10


class DiskStore(Store):
    """A store in the folder ``root``, which is made if missing. Files are private to the user (0600).

    Raises InvalidStoreURL if the folder holds something else, FormatVersionError if a newer version laid it out,
    StoreUnavailable if it cannot be made or opened.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._blobs = self._root / "blobs"
        self._locks = Locks(self._root / "locks")
        self._session = self._root / "tmp" / uuid.uuid4().hex
        self._counter = itertools.count()
        self._lock_fd: int | None = None
        with _os_errors(f"cannot open the store {self._root}"):
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open()

    def _open(self) -> None:
        names = {path.name for path in self._root.iterdir()} - {"lost+found"}
        if _MARKER not in names and any(not name.startswith(".") for name in names):
            raise InvalidStoreURL(f"{self._root} is neither empty nor a store: give the store a folder of its own")
        marker_fd = os.open(self._root / _MARKER, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # Held while opening only: no other process sees a session between its making and its locking.
            fcntl.flock(marker_fd, fcntl.LOCK_EX)
            written = os.read(marker_fd, 100).strip()
            if not written:
                os.write(marker_fd, b"%d\n" % _LAYOUT_VERSION)
                os.fsync(marker_fd)
            elif written != b"%d" % _LAYOUT_VERSION:
                raise FormatVersionError(
                    f"{self._root} has layout version {written.decode(errors='replace')}, "
                    f"this software knows version {_LAYOUT_VERSION}"
                )
            self._blobs.mkdir(mode=0o700, exist_ok=True)
            self._session.parent.mkdir(mode=0o700, exist_ok=True)
            self._locks.open()
            _fsync_dir(self._root)
            for session in self._session.parent.iterdir():
                _clear_if_abandoned(session)
            self._session.mkdir(mode=0o700)
            self._lock_fd = os.open(self._session / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        finally:
            os.close(marker_fd)

    def tier(self, key: str) -> Tier:
        return "disk"

    def close(self) -> None:
        if self._lock_fd is None:
            return
        shutil.rmtree(self._session, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = None

    def _path(self, key: str) -> Path:
        return self._blobs / (key + _SUFFIX)

    def _read(self, key: str) -> Sealed | None:
        with _os_errors(f"cannot read {key}"):
            fd = self._open_blob(key)
            return None if fd is None else _read_sealed(fd, new_buffer)

    def _read_many(self, keys: Sequence[str], buffer: NewBuffer) -> Iterator[Sealed | None]:
        """All files are asked of the disk at once, so that it reads one while another is verified."""
        fds: list[int | None] = []
        with _os_errors("cannot read"):
            try:
                for key in keys:
                    fds.append(self._open_blob(key))
                    if fds[-1] is not None:
                        os.posix_fadvise(fds[-1], 0, 0, os.POSIX_FADV_WILLNEED)
                for index, fd in enumerate(fds):
                    fds[index] = None
                    yield None if fd is None else _read_sealed(fd, buffer)
            finally:
                for fd in fds:
                    if fd is not None:
                        os.close(fd)

    def _read_headers(self, keys: Sequence[str]) -> list[bytes | None]:
        headers: list[bytes | None] = []
        for key in keys:
            with _os_errors(f"cannot read {key}"):
                fd = self._open_blob(key)
                if fd is None:
                    headers.append(None)
                    continue
                try:
                    headers.append(os.read(fd, HEADER_NBYTES))
                finally:
                    os.close(fd)
        return headers

    def _open_blob(self, key: str) -> int | None:
        try:
            return os.open(self._path(key), os.O_RDONLY)
        except FileNotFoundError:
            return None

    def _write(self, key: str, header: bytes, payload: Data) -> None:
        path, aside = self._path(key), self._session / str(next(self._counter))
        with _os_errors(f"cannot write {key}"):
            try:
                fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    _write_all(fd, header)
                    _write_all(fd, payload)
                    now_ns = time.time_ns()
                    os.utime(fd, ns=(now_ns, now_ns))
                    os.fsync(fd)
                finally:
                    os.close(fd)
                self._place(aside, path)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise

    def _place(self, aside: Path, path: Path) -> None:
        """Renames into place. A delete may take the folder away as it empties, so making and moving is tried again."""
        for attempt in itertools.count(1):
            try:
                _make_dirs(path.parent)
                aside.replace(path)
                break
            except (FileNotFoundError, FileExistsError):  # the folder went while it was made or found there
                if attempt == _PLACE_ATTEMPTS:
                    raise
        with suppress(FileNotFoundError):  # deleted again already, with its folder
            _fsync_dir(path.parent)

    def _delete(self, key: str) -> bool:
        path = self._path(key)
        with _os_errors(f"cannot delete {key}"):
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            folder = path.parent
            with suppress(FileNotFoundError):  # emptied and removed by another delete
                _fsync_dir(folder)
            with suppress(OSError):  # not empty: that is where the tidying ends
                while folder != self._blobs:
                    folder.rmdir()
                    folder = folder.parent
        return True

    def _stat(self, key: str) -> BlobStat | None:
        with _os_errors(f"cannot look up {key}"):
            try:
                stat = self._path(key).stat()
            except FileNotFoundError:
                return None
        return BlobStat(max(0, stat.st_size - HEADER_NBYTES), stat.st_mtime_ns / 1e9)

    def _touch(self, key: str) -> bool:
        now_ns = time.time_ns()
        with _os_errors(f"cannot touch {key}"):
            try:
                os.utime(self._path(key), ns=(now_ns, now_ns))
            except FileNotFoundError:
                return False
        return True

    def _keys(self, prefix: str) -> Iterator[str]:
        folder = prefix.rpartition("/")[0]
        with _os_errors("cannot list the store"):
            for path in _files_below(self._blobs / folder):
                name = str(path.relative_to(self._blobs))
                if name.endswith(_SUFFIX) and name.startswith(prefix):
                    yield name.removesuffix(_SUFFIX)

    def _acquire_lock(self, name: str, owner: str, ttl_s: float) -> bool:
        with _os_errors(f"cannot lock {name}"):
            return self._locks.acquire(name, owner, ttl_s)

    def _release_lock(self, name: str, owner: str) -> bool:
        with _os_errors(f"cannot unlock {name}"):
            return self._locks.release(name, owner)


@contextmanager
def _os_errors(action: str) -> Iterator[None]:
    """Turns what the operating system says into an error of the tree."""
    try:
        yield
    except OSError as error:
        kind = StoreFull if error.errno in _FULL else StoreUnavailable
        raise kind(f"{action}: {error.strerror or error}") from error


def _clear_if_abandoned(session: Path) -> None:
    """Removes a session whose process has ended: nobody holds its lock."""
    try:
        fd = os.open(session / "lock", os.O_RDWR)
    except FileNotFoundError:  # ended before it took its lock, or another process is closing it
        shutil.rmtree(session, ignore_errors=True)
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(session, ignore_errors=True)
    except BlockingIOError:  # alive
        pass
    finally:
        os.close(fd)


def _write_all(fd: int, data: Data) -> None:
    """One os.write moves at most 2,147,479,552 bytes, and fewer when the disk fills up."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


def _read_sealed(fd: int, buffer: NewBuffer) -> Sealed:
    """Reads the file and closes it. One that ends early is cut where it ends, which its header tells."""
    try:
        header = os.read(fd, HEADER_NBYTES)
        payload = buffer(max(0, os.fstat(fd).st_size - HEADER_NBYTES))
        filled = 0
        while filled < len(payload):
            nbytes = os.readv(fd, [payload[filled:]])
            if not nbytes:
                break
            filled += nbytes
        return header, payload[:filled]
    finally:
        os.close(fd)


def _make_dirs(folder: Path) -> None:
    """Makes missing folders so that they outlive a power cut."""
    if folder.is_dir():
        return
    _make_dirs(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    _fsync_dir(folder.parent)


def _fsync_dir(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _files_below(folder: Path) -> Iterator[Path]:
    """Files at any depth; folders that vanish meanwhile are passed over."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path))
        else:
            yield Path(entry.path)
