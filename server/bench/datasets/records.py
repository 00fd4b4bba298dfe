"""The replies of a run, one JSON line each, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from server.bench.datasets.item import DatasetError
from server.bench.journal import Journal, JournalInUse


class Records:
    """A file of records by item id; the first line says which run they belong to.

    A record with an error does not count as done: the item is asked again. Threads may share it.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """Opens or begins the file. Raises DatasetError if it belongs to a run with other settings."""
        self.by_id: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._journal = Journal(path)
        except JournalInUse as error:
            raise DatasetError(str(error)) from None
        try:
            self._load(path, self._journal.lines, dict(run))
        except DatasetError:
            self._journal.close()
            raise
        if not self._journal.lines:
            self._write({"run": dict(run)})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()

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
        self._journal.add([json.dumps(value, ensure_ascii=False).encode()])

    def _load(self, path: Path, data: Sequence[bytes], run: Mapping[str, Any]) -> None:
        try:
            lines = [json.loads(line) for line in data]
            self.by_id = {record["id"]: record for record in lines[1:]}
            found = lines[0]["run"] if lines else run
        except (ValueError, KeyError, TypeError):
            raise DatasetError(f"{path} does not hold the records of a run: choose another --out") from None
        if found != run:
            names = {name for name in found.keys() | run.keys() if found.get(name) != run.get(name)}
            raise DatasetError(f"{path} holds another run's records ({', '.join(sorted(names))}): choose another --out")
