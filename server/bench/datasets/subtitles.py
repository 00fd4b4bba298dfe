"""Subtitles: SubRip files, and the JSON files of LongVideoBench."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from server.bench.datasets.item import DatasetError, read_json

_TAGS = re.compile(r"<[^>]*>")
_TIMES = re.compile(r"\s*[\d:,.]+\s*-->\s*[\d:,.]+")


@dataclass(frozen=True)
class Line:
    """What is said from ``start_s`` to ``end_s``."""

    start_s: float
    end_s: float
    text: str

    def overlaps(self, start_s: float, end_s: float) -> bool:
        """Whether any of the line is heard between the two times."""
        return self.start_s < end_s and self.end_s > start_s


def read_srt(path: Path) -> str:
    """The words of a SubRip file, one cue a line, without times and tags; empty where there is no file."""
    if not path.is_file():
        return ""
    blocks = re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace").replace("\r", ""))
    cues = []
    for block in blocks:
        lines = block.strip().split("\n")
        start = next((number + 1 for number, line in enumerate(lines) if _TIMES.match(line)), len(lines))
        cues.append(_TAGS.sub("", " ".join(lines[start:])).strip())
    return "\n".join(cue for cue in cues if cue)


def read_timed(path: Path) -> list[Line]:
    """The lines of a LongVideoBench file, in their order. Raises DatasetError.

    An entry is ``{"timestamp": [start, end], "text"}`` in seconds (an end that is missing is the video's), or
    ``{"start", "end", "line"}`` as h:mm:ss.
    """
    lines = []
    for entry in read_json(path):
        try:
            if "timestamp" in entry:
                start_s, end_s = entry["timestamp"]
                lines.append(Line(float(start_s), math.inf if end_s is None else float(end_s), entry["text"]))
            else:
                lines.append(Line(_seconds(entry["start"]), _seconds(entry["end"]), entry["line"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{path}: not a subtitle: {error!r}") from None
    return lines


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
