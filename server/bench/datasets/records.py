"""The replies of a run, one JSON line each, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from server.bench.datasets.item import DatasetError


class Records:
    """A file of records by item id; the first line says which run they belong to.

    A record with an error does not count as done: the item is asked again. Threads may share it.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """Opens or begins the file. Raises DatasetError if it belongs to a run with other settings."""
        self.by_id: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            whole = self._load(path, dict(run))
        except BlockingIOError:
            self._file.close()
            raise DatasetError(f"another process is at work on {path}") from None
        except DatasetError:
            self._file.close()
            raise
        self._file.truncate(whole)
        if not whole:
            self._write({"run": dict(run)})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def done(self) -> set[str]:
        """The ids with a reply."""
        return {name for name, record in self.by_id.items() if record["error"] is None}

    def add(self, record: Mapping[str, Any]) -> None:
        """Keeps a record; on disk when this returns."""
        with self._lock:
            self.by_id[record["id"]] = dict(record)
            self._write(record)

    def _write(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _load(self, path: Path, run: Mapping[str, Any]) -> int:
        """Reads whole lines (the last may have been cut off) and returns their length in bytes."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in data[:whole].splitlines()]
            self.by_id = {record["id"]: record for record in lines[1:]}
            found = lines[0]["run"] if lines else run
        except (ValueError, KeyError, TypeError):
            raise DatasetError(f"{path} does not hold the records of a run: choose another --out") from None
        if found != run:
            names = {name for name in found.keys() | run.keys() if found.get(name) != run.get(name)}
            raise DatasetError(f"{path} holds another run's records ({', '.join(sorted(names))}): choose another --out")
        return whole
