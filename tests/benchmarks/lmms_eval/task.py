"""The functions of mlvu_tiny.yaml. Letter extraction and MLVU's score are lmms-eval's own, and so is the prompt."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from datasets import Dataset
from lmms_eval.tasks.mlvu.utils import mlvu_aggregate_results_dev, mlvu_doc_to_text, mlvu_process_results

__all__ = ["doc_to_visual", "mean", "mlvu_aggregate_results_dev", "mlvu_doc_to_text", "process_docs", "process_results"]


def process_docs(dataset: Dataset) -> Dataset:
    """From MLVU's files (candidates, the answer's text) to the rows of lmms-eval's copy (options in the question)."""
    return dataset.map(_row)


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    """The path of the video: with pass_video_url the server gets it as file:///..."""
    return [str(Path("video", doc["video"]).resolve())]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """MLVU's letter, and beside it whether the reply is the right option's text: the bundled model knows no letters."""
    text = doc["candidates"][string.ascii_uppercase.index(doc["answer"])]
    return mlvu_process_results(doc, results) | {"option_text": float(results[0].strip() == text)}


def mean(values: list[float]) -> float:
    """The mean in per cent."""
    return 100 * sum(values) / len(values)


def _row(doc: dict[str, Any]) -> dict[str, Any]:
    letters = string.ascii_uppercase[: len(doc["candidates"])]
    options = "\n".join(f"({letter}) {text}" for letter, text in zip(letters, doc["candidates"], strict=True))
    return {
        "question": f"{doc['question']}\n{options}",
        "answer": letters[doc["candidates"].index(doc["answer"])],
        "task_type": doc["question_type"],
        "video_name": doc["video"],
    }
