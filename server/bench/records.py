"""The folder of a run: what was asked for, and one line a question and method, so that a run can go on later."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from server.bench.journal import Journal, JournalInUse

Key = tuple[str, int, int, int]


class OtherRun(ValueError):  # noqa: N818 - errors are named for what is wrong
    """The folder holds another run, or one that goes on right now."""


@dataclass(frozen=True, slots=True)
class Record:
    """One question of one video, asked by one method.

    ``chunks`` is the video's length and ``truth`` holds the chunks with the answer. ``ranks`` are their places (from
    0) in the order of the scores; None where no scores chose. ``contained`` tells whether the times of the re-loaded
    chunks cover the span that shows the answer; None where nothing is shown or nothing chosen. ``times_ms`` by phase,
    as far as it was measured, and ``prefill_s`` of the video are noted for questions that were asked alone.
    """

    method: str
    chunks: int
    seed: int
    index: int
    type: str
    answer: str
    reply: str
    right: bool
    error: str | None
    truth: tuple[int, ...]
    reloaded: tuple[int, ...]
    ranks: tuple[int, ...] | None
    contained: bool | None
    kv_tokens: int
    kv_nbytes: int
    reload_nbytes: int
    times_ms: dict[str, float] | None
    prefill_s: float | None

    @property
    def key(self) -> Key:
        return self.method, self.chunks, self.seed, self.index


_RECORD = TypeAdapter(Record)


class RunFolder:
    """``run.json``: the configuration. ``records.jsonl``: a line is added for every answer; of two for the same
    question and method the later counts. One process at a time."""

    def __init__(self, folder: Path, journal: Journal, records: dict[Key, Record]) -> None:
        self.path = folder
        self._journal = journal
        self._records = records

    @property
    def records(self) -> list[Record]:
        return list(self._records.values())

    def answered(self, key: Key) -> bool:
        """Whether there is a reply that is no error."""
        record = self._records.get(key)
        return record is not None and record.error is None

    def add(self, records: Iterable[Record]) -> None:
        """Keeps the records, on disk at once."""
        new = {record.key: record for record in records}
        self._records |= new
        self._journal.add(_RECORD.dump_json(record) for record in new.values())


@contextmanager
def open_folder(folder: Path, configuration: Mapping[str, Any]) -> Iterator[RunFolder]:
    """Begins a run in a new folder, or goes on with the one that is there. Raises OtherRun, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        journal = Journal(folder / "records.jsonl")
    except JournalInUse:
        raise OtherRun(f"another process is at work in {folder}") from None
    with journal:
        _check(folder / "run.json", json.loads(json.dumps(configuration)))
        yield RunFolder(folder, journal, _read(folder / "records.jsonl", journal.lines))


def _check(path: Path, configuration: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = configuration
    except ValueError:
        found = {}
    if not isinstance(found, dict):
        found = {}
    for name in (*configuration, *found):
        if found.get(name) != configuration.get(name):
            raise OtherRun(
                f"{path.parent} holds a run with {name} {found.get(name)!r}, not {configuration.get(name)!r}: "
                "give another folder with --out"
            )
    part = path.with_suffix(".part")
    part.write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _read(path: Path, lines: Iterable[bytes]) -> dict[Key, Record]:
    records: dict[Key, Record] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = _RECORD.validate_json(line)
        except ValidationError:
            raise OtherRun(f"{path}, line {number} is no record: give another folder with --out") from None
        records[record.key] = record
    return records
