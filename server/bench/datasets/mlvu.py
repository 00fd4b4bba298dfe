"""MLVU (arXiv 2406.04264): multiple-choice tasks of the dev set, or of the test set with its ground truth."""

from __future__ import annotations

from collections.abc import Iterable
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

DEV_FILES = (
    "1_plotQA.json",
    "2_needle.json",
    "3_ego.json",
    "4_count.json",
    "5_order.json",
    "6_anomaly_reco.json",
    "7_topic_reasoning.json",
)
TEST_FILE = "test_mcq_gt.json"
_ROOTS = ("", "MLVU/", "MLVU_Test/")
_SYSTEM = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select the best option "
    "that accurately addresses the question."
)


class MLVU(Benchmark):
    """2,174 questions of seven tasks (dev), 502 of nine with six options each (test)."""

    name = "mlvu"
    source = "huggingface.co/datasets/MLVU/MVLU (dev) and MLVU/MLVU_Test (test)"
    dimension = "task"
    scores_mean = True

    def read(self, data: Path, *, subtitles: bool = False) -> list[Item]:
        """A row: video, question, candidates, answer (the right candidate's text), question_type.

        A file of the dev set that is missing is left out, as long as one is there.
        """
        dev = [f"{root}json/{name}" for root in _ROOTS for name in DEV_FILES]
        test = [f"{root}{folder}{TEST_FILE}" for root in _ROOTS for folder in ("", "test-ground-truth/")]
        first = find_annotation(self, data, [*dev, *test])
        if first.name == TEST_FILE:
            return list(self._items(data, first, ("MLVU_Test/video", "video", "MLVU_Test", ".")))
        items: list[Item] = []
        for name in DEV_FILES:
            path = first.parent / name
            if path.is_file():
                folders = [f"video/{path.stem}", f"video/{path.stem.partition('_')[2]}", "video"]
                items += self._items(first.parent.parent, path, folders)
        return items

    def _items(self, data: Path, path: Path, folders: Iterable[str]) -> Iterable[Item]:
        for number, row in enumerate(rows_of(path, read_json(path))):
            yield self._item(data, tuple(folders), row, f"{path.stem}_{number}")

    def _item(self, data: Path, folders: tuple[str, ...], row: dict[str, Any], name: str) -> Item:
        try:
            options = tuple(str(candidate) for candidate in row["candidates"])
            listed = lettered(options, "({letter}) {text}")
            return Item(
                id=name,
                video=find_video(data, folders, row["video"]),
                prompt=f"Question: {row['question']}\nOptions:\n{listed}\nOnly give the best option.\nBest Option: (",
                options=options,
                answer=letter_of(options, str(row["answer"]), name),
                group=name,
                categories={"task": str(row["question_type"])},
                system=_SYSTEM,
            )
        except (KeyError, TypeError) as error:
            raise DatasetError(f"{name}: {error!r}") from None

    def choose(self, item: Item, reply: str) -> str:
        """As choice_bench.py: the character before the first closing bracket, or else the whole reply."""
        head, bracket, _ = reply.strip().partition(")")
        choice = head[-1:] if bracket else head
        return choice if choice and choice in item.letters else ""
