"""Video-MME (arXiv 2405.21075), with and without subtitles."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from server.bench.datasets.item import (
    Benchmark,
    DatasetError,
    Item,
    find_annotation,
    find_video,
    read_json,
    rows_of,
)
from server.bench.datasets.subtitles import read_srt

PARQUET = "test-00000-of-00001.parquet"
_ANNOTATIONS = (f"videomme/{PARQUET}", PARQUET, "videomme.json", "Video-MME.json", "test.json")
_VIDEO_FOLDERS = ("data", "videos", "video", ".")
_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option.\n{question}\n{options}\nThe best answer is:"
)


class VideoMME(Benchmark):
    """2,700 questions about 900 videos of 11 s to one hour."""

    name = "videomme"
    source = "huggingface.co/datasets/lmms-lab/Video-MME"
    dimension = "duration"
    has_subtitles = True
    counts_unanswered = False

    def read(self, data: Path, *, subtitles: bool = False) -> list[Item]:
        """The parquet file of the hub, its rows as JSON, or the JSON of the authors' repository (questions nested)."""
        path = find_annotation(self, data, _ANNOTATIONS)
        rows = _read_parquet(path) if path.suffix == ".parquet" else rows_of(path, read_json(path))
        items = []
        for number, row in enumerate(_flat(rows)):
            try:
                items.append(_item(data, row, subtitles))
            except (KeyError, TypeError) as error:
                raise DatasetError(f"{path.name}, question {number}: {error!r}") from None
        return items

    def choose(self, item: Item, reply: str) -> str:
        """As eval_your_results.py: the first of the letters A to D.

        That script also strips phrases ("The best answer is") that hold none of the letters, which changes nothing.
        """
        found = re.search("[ABCD]", reply)
        return found[0] if found else ""


def _item(data: Path, row: Mapping[str, Any], subtitles: bool) -> Item:
    names = [name for name in (row.get("videoID"), _youtube_id(row.get("url")), row["video_id"]) if name]
    videos = [find_video(data, _VIDEO_FOLDERS, f"{name}.mp4") for name in names]
    options = tuple(str(option) for option in row["options"])
    prompt = _PROMPT.format(question=row["question"], options="\n".join(options))
    if subtitles:
        text = read_srt(find_video(data, ("subtitle", "subtitles"), f"{names[0]}.srt"))
        prompt = f"This video's subtitles are listed below:\n{text or 'No subtitles available'}\n{prompt}"
    return Item(
        id=str(row["question_id"]),
        video=next((video for video in videos if video.is_file()), videos[0]),
        prompt=prompt,
        options=options,
        answer=str(row["answer"]),
        group=str(row["question_id"]),
        categories={name: str(row[name]) for name in ("duration", "domain", "sub_category", "task_type")},
    )


def _flat(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row a question, in the words of the parquet file."""
    for row in rows:
        if "questions" not in row:
            yield row
            continue
        video = {
            "video_id": row["video_id"],
            "url": row.get("url"),
            "duration": row["duration_category"],
            "domain": row["video_category"],
            "sub_category": row.get("video_sub_category") or row["video_subcategory"],
        }
        for question in row["questions"]:
            yield video | question | {"options": question["choices"]}


def _youtube_id(url: str | None) -> str:
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(url or "").query)
    return query.get("v", [""])[0]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DatasetError(f"{path} is read with pyarrow: pip install 'video-x2l-server[bench]'") from None
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from None
    return rows
