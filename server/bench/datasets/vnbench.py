"""VNBench (VideoNIAH, arXiv 2406.09367): needles in videos, every question asked with four orders of its options."""

from __future__ import annotations

import string
from pathlib import Path

from server.bench.datasets.item import (
    Benchmark,
    DatasetError,
    Item,
    find_annotation,
    find_video,
    letter_of,
    lettered,
    read_json,
    rows_of,
)

ANNOTATION = "VNBench-main-4try.json"
_VIDEO_FOLDERS = ("VNBench_new", "VNBench", "videos", "video", ".")
_POST_PROMPT = "Answer with the option's letter from the given choices directly."


class VNBench(Benchmark):
    """5,400 tries of 1,350 questions: retrieval, ordering and counting."""

    name = "vnbench"
    source = "annotations: huggingface.co/datasets/Joez1717/VNBench, videos: github.com/joez17/VideoNIAH"
    dimension = "type"
    scores_mean = True

    def read(self, data: Path, *, subtitles: bool = False) -> list[Item]:
        """A row: video, question, four options, gt (the right option's text), type, try (0 to 3)."""
        path = find_annotation(self, data, (ANNOTATION, f"annotations/{ANNOTATION}"))
        items = []
        for number, row in enumerate(rows_of(path, read_json(path))):
            where = f"{path.name}, row {number}"
            try:
                options = tuple(str(option) for option in row["options"])
                video, kind = Path(row["video"]).name, str(row["type"])
                stem, attempt, question = Path(video).stem, row["try"], row["question"]
                answer = letter_of(options, str(row["gt"]), where)
            except (KeyError, TypeError) as error:
                raise DatasetError(f"{where}: {error!r}") from None
            items.append(
                Item(
                    id=f"{stem}_{attempt}",
                    video=find_video(data, _VIDEO_FOLDERS, video),
                    prompt=f"{question}\n{lettered(options)}\n{_POST_PROMPT}",
                    options=options,
                    answer=answer,
                    group=stem,
                    categories={"type": kind, "task": kind.split("_")[0]},
                )
            )
        return items

    def choose(self, item: Item, reply: str) -> str:
        """As evaluation/eval.py: the first of A, B, C, D (in this order) that stands before the first full stop."""
        head = reply.split(".")[0]
        return next((letter for letter in string.ascii_uppercase[:4] if letter in head), "")
