"""What the public benchmarks have in common: multiple-choice questions about videos."""

from __future__ import annotations

import json
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


class DatasetError(ValueError):
    """A folder that does not hold the benchmark; the message says what was looked for and where to get it."""


@dataclass(frozen=True)
class Item:
    """One question about one video.

    ``options`` are the texts to choose from, ``answer`` is the letter of the right one. ``categories`` holds, by
    dimension ("task", "duration" ...), the category that the benchmark reports the item under. The items of one
    ``group`` count as one question: it is right when all of them are.
    """

    id: str
    video: Path
    prompt: str
    options: tuple[str, ...]
    answer: str
    group: str
    categories: Mapping[str, str] = field(default_factory=dict)
    system: str = ""

    @property
    def letters(self) -> str:
        """The letters of the options, "ABCD" for four."""
        return string.ascii_uppercase[: len(self.options)]


class Benchmark(ABC):
    """A public benchmark: reads its official files, asks in its words, and scores as its authors do."""

    name: ClassVar[str]
    source: ClassVar[str]
    """Where annotations and videos are to be had."""
    dimension: ClassVar[str]
    """The dimension of ``Item.categories`` that is reported first."""
    scores_mean: ClassVar[bool] = False
    """Whether the score that the authors report is the mean over the categories of ``dimension``."""
    has_subtitles: ClassVar[bool] = False
    counts_unanswered: ClassVar[bool] = True
    """Whether a reply without a letter counts as wrong; otherwise it is left out of the score."""

    @abstractmethod
    def read(self, data: Path, *, subtitles: bool = False) -> list[Item]:
        """The questions in the folder ``data``. Videos need not exist. Raises DatasetError."""

    @abstractmethod
    def choose(self, item: Item, reply: str) -> str:
        """The letter that the benchmark's own script finds in a reply; empty if there is none."""


def read_json(path: Path) -> Any:
    """The file's JSON. Raises DatasetError for a file that holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from None


def find_annotation(benchmark: Benchmark, data: Path, names: Sequence[str]) -> Path:
    """The first of ``names`` that is a file below ``data``. Raises DatasetError if none is."""
    for name in names:
        if (data / name).is_file():
            return data / name
    if not data.is_dir():
        raise DatasetError(f"no such folder: {data}")
    wanted = ", ".join(names if len(names) < 6 else (*names[:2], "...", names[-1]))
    raise DatasetError(f"no annotation file of {benchmark.name} in {data}: none of {wanted} (from {benchmark.source})")


def find_video(data: Path, folders: Sequence[str], name: str) -> Path:
    """Where the video lies: in the first of ``folders`` that has it, else where it should be."""
    paths = [data / folder / name for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


def rows_of(path: Path, rows: Any) -> list[dict[str, Any]]:
    """``rows`` if they are a list of objects. Raises DatasetError."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DatasetError(f"{path} is not a list of questions")
    return rows


def letter_of(options: Sequence[str], answer: str, where: str) -> str:
    """The letter of the option that is ``answer``. Raises DatasetError: a guess would be a wrong score."""
    if answer not in options:
        raise DatasetError(f"{where}: the answer {answer!r} is none of the options")
    return string.ascii_uppercase[options.index(answer)]


def lettered(options: Sequence[str], form: str = "{letter}. {text}") -> str:
    """The options, one a line, as "A. ..."."""
    letters = string.ascii_uppercase[: len(options)]
    return "\n".join(form.format(letter=letter, text=text) for letter, text in zip(letters, options, strict=True))
