"""LongVideoBench (arXiv 2407.15754), its validation set, with and without subtitles."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

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
from server.bench.datasets.subtitles import read_timed

ANNOTATION = "lvb_val.json"
_POST_PROMPT = "Answer with the option's letter from the given choices directly."


class LongVideoBench(Benchmark):
    """1,337 questions with two to five options about videos of 8 s to one hour."""

    name = "longvideobench"
    source = "huggingface.co/datasets/longvideobench/LongVideoBench"
    dimension = "duration_group"
    has_subtitles = True

    def read(self, data: Path, *, subtitles: bool = False) -> list[Item]:
        """A row: id, video_path, question, candidates, correct_choice (an index), duration_group, question_category.

        Subtitles stand before the question in their order. The authors put them between the frames, which a video
        that is sent as one part does not allow.
        """
        path = find_annotation(self, data, (ANNOTATION, f"LongVideoBench/{ANNOTATION}"))
        items = []
        for number, row in enumerate(rows_of(path, read_json(path))):
            try:
                items.append(_item(path.parent, row, subtitles))
            except (KeyError, TypeError, IndexError) as error:
                raise DatasetError(f"{path.name}, row {number}: {error!r}") from None
        return items

    def choose(self, item: Item, reply: str) -> str:
        """As the authors' task in lmms-eval: the first of the letters A to E, or a random option without one.

        The random one is the same in every run.
        """
        text = reply.replace("Best answer:", "").replace("Best option:", "")
        found = re.search("[ABCDE]", text)
        return found[0] if found else random.Random(item.id).choice(item.letters)


def _item(data: Path, row: dict[str, Any], subtitles: bool) -> Item:
    options = tuple(str(candidate) for candidate in row["candidates"])
    prompt = f"Question: {row['question']}\n{lettered(options)}\n{_POST_PROMPT}"
    if subtitles:
        timed = read_timed(data / "subtitles" / row["subtitle_path"])
        start_s = float(row["starting_timestamp_for_subtitles"])
        lines = [line.text for line in timed if line.overlaps(start_s, start_s + float(row["duration"]))]
        prompt = "\n".join([*lines, prompt])
    return Item(
        id=str(row["id"]),
        video=find_video(data, ("videos", "video", "."), row["video_path"]),
        prompt=prompt,
        options=options,
        answer=letter_of(options, options[row["correct_choice"]], str(row["id"])),
        group=str(row["id"]),
        categories={name: str(row[name]) for name in ("duration_group", "question_category")},
    )
