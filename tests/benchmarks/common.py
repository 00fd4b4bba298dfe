"""What the benchmarks share: synthetic videos, the record of a run, accuracy counts.

The scripts of this folder are run as ``python tests/benchmarks/NAME.py``. They print what they find, and with
``--out FILE`` they write it as JSON; the committed results lie in ``results/``.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench import circumstances as measured
from server.bench.circumstances import to_json
from server.bench.synthetic import SyntheticVideo, making


@dataclass(frozen=True)
class Video:
    """A synthetic mp4 and its questions, as OUT.json holds them."""

    seed: int
    path: Path
    questions: list[dict[str, Any]]


def parser(doc: str, *, seeds: str) -> argparse.ArgumentParser:
    """An argument parser with ``--seeds`` and ``--out``; its description is the first line of ``doc``."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--seeds", type=parse_seeds, default=parse_seeds(seeds), help=f"of the videos [{seeds}]")
    made.add_argument("--out", type=Path, help="write the result to this JSON file")
    return made


def parse_seeds(text: str) -> list[int]:
    """``"500-502,7"`` -> [500, 501, 502, 7]."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def make_videos(folder: Path, seeds: Sequence[int], chunks: int = 16) -> list[Video]:
    """mp4 files of ``chunks`` chunks, one a seed; those that are in ``folder`` already are not made again."""
    wanted = [SyntheticVideo(chunks, seed) for seed in seeds]
    with making(wanted, folder) as path_of:
        return [Video(video.seed, path_of(video), video.exam) for video in wanted]


def circumstances(given: argparse.Namespace) -> dict[str, Any]:
    """When and on what this ran, and the arguments."""
    arguments = {name: value for name, value in vars(given).items() if name not in ("out", "videos_dir")}
    return measured.circumstances("python", sys.argv[0]) | {"arguments": arguments}


def write(result: Mapping[str, Any], out: Path | None) -> None:
    """Writes the result as JSON, if a file was asked for."""
    if out is not None:
        out.write_text(to_json(result) + "\n")


def criterion(name: str, value: float, least: float) -> dict[str, Any]:
    """A figure and the least that it has to be. A little under counts as met: sums of floats are not exact."""
    return {"name": name, "value": round(value, 4), "least": least, "met": value >= least - 1e-9}


def print_criteria(criteria: Iterable[Mapping[str, Any]]) -> None:
    for entry in criteria:
        print(f"{'met   ' if entry['met'] else 'MISSED'} {entry['name']}: {entry['value']} (at least {entry['least']})")


class Tally:
    """Right answers and questions by type."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()

    def add(self, kind: str, right: bool) -> None:
        self.right[kind] += right
        self.asked[kind] += 1

    def share(self, kind: str | None = None) -> float:
        """The share of right answers, of one type or of all; 0 where nothing was asked."""
        if kind is None:
            return self.right.total() / max(1, self.asked.total())
        return self.right[kind] / max(1, self.asked[kind])

    def counts(self) -> dict[str, list[int]]:
        """``{type: [right, asked]}`` and ``all``."""
        by_type = {kind: [self.right[kind], self.asked[kind]] for kind in sorted(self.asked)}
        return by_type | {"all": [self.right.total(), self.asked.total()]}


def print_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[object]]) -> None:
    """A table in plain text; floats get three decimals."""
    print(f"\n{title:28}" + "".join(f"{column:>11}" for column in columns))
    for name, cells in rows.items():
        shown = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
        print(f"{name:28}" + "".join(f"{text:>11}" for text in shown), flush=True)
