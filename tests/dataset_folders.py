"""Tiny folders in the official formats of the public benchmarks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LETTERS = "ABCD"
OPTIONS = ["a red star", "a blue ring", "a green square", "a grey cross"]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def copy_videos(clip: Path, paths: Iterable[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, path)


def vnbench(folder: Path, clip: Path, types: Iterable[str] = ("ret_edit", "cnt_insert")) -> Path:
    """One video a type, each with the four orders of its options; the answer moves from D to A."""
    rows = []
    for kind in types:
        for attempt in range(4):
            options = [str(number) for number in range(4)] if kind.startswith("cnt") else OPTIONS
            turned = options[attempt:] + options[:attempt]
            gt = 3 if kind.startswith("cnt") else OPTIONS[3]  # counts stand as numbers
            rows.append(
                {
                    "video": f"./VNBench/v_{kind}.mp4",
                    "question": "What is shown?",
                    "options": turned,
                    "needle_time": [1.0],
                    "gt": gt,
                    "gt_option": LETTERS[turned.index(options[3])],
                    "length": 4.0,
                    "type": kind,
                    "try": attempt,
                }
            )
        copy_videos(clip, [folder / "VNBench_new" / f"v_{kind}.mp4"])
    write_json(folder / "VNBench-main-4try.json", rows)
    return folder


def mlvu_dev(folder: Path, clip: Path, questions: int = 2) -> Path:
    """Two tasks; all questions of a task are about the same video."""
    for stem, kind in (("1_plotQA", "plotQA"), ("4_count", "count")):
        rows = [
            {
                "video": "v1.mp4",
                "duration": 4.0,
                "question": f"What is shown ({number})?",
                "candidates": OPTIONS,
                "answer": OPTIONS[number % 4],
                "question_type": kind,
            }
            for number in range(questions)
        ]
        write_json(folder / "json" / f"{stem}.json", rows)
        copy_videos(clip, [folder / "video" / stem / "v1.mp4"])
    return folder


def mlvu_test(folder: Path, clip: Path) -> Path:
    row = {
        "video": "test_1.mp4",
        "question": "What is shown?",
        "candidates": [*OPTIONS, "a pink star", "a white ring"],
        "answer": "a white ring",
        "question_type": "sportsQA",
        "question_id": "SQA_0",
    }
    write_json(folder / "test-ground-truth" / "test_mcq_gt.json", [row])
    copy_videos(clip, [folder / "MLVU_Test" / "video" / "test_1.mp4"])
    return folder


def videomme_rows() -> list[dict[str, Any]]:
    """Two questions about a short and one about a medium video."""
    videos = [("001", "fFjv93ACGo8", "short"), ("001", "fFjv93ACGo8", "short"), ("301", "26EBBBM_cZw", "medium")]
    return [
        {
            "video_id": video,
            "duration": duration,
            "domain": "Knowledge",
            "sub_category": "Humanity & History",
            "url": f"https://www.youtube.com/watch?v={youtube}",
            "videoID": youtube,
            "question_id": f"{video}-{number}",
            "task_type": "Object Recognition",
            "question": "What is shown?",
            "options": [f"{letter}. {option}." for letter, option in zip(LETTERS, OPTIONS, strict=True)],
            "answer": LETTERS[number],
        }
        for number, (video, youtube, duration) in enumerate(videos)
    ]


def videomme(folder: Path, clip: Path, *, form: str) -> Path:
    """``form``: parquet (the hub's file), rows (the same as JSON) or nested (the authors' JSON)."""
    rows = videomme_rows()
    if form == "parquet":
        import pyarrow
        from pyarrow import parquet

        (folder / "videomme").mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "videomme" / "test-00000-of-00001.parquet")
    elif form == "rows":
        write_json(folder / "videomme.json", rows)
    else:
        nested: dict[str, dict[str, Any]] = {}
        for row in rows:
            video = {
                "video_id": row["video_id"],
                "duration_category": row["duration"],
                "video_category": row["domain"],
                "video_subcategory": row["sub_category"],
                "url": row["url"],
                "questions": [],
            }
            question = {name: row[name] for name in ("question_id", "task_type", "question", "answer")}
            nested.setdefault(row["video_id"], video)["questions"].append(question | {"choices": row["options"]})
        write_json(folder / "videomme.json", list(nested.values()))
    copy_videos(clip, [folder / "data" / f"{row['videoID']}.mp4" for row in rows])
    (folder / "subtitle").mkdir()
    (folder / "subtitle" / "fFjv93ACGo8.srt").write_text(
        "1\n00:00:00,000 --> 00:00:01,500\n<i>Hello</i> there\n\n2\n00:00:02,000 --> 00:00:03,000\nGood\nbye\n"
    )
    return folder


def longvideobench(folder: Path, clip: Path) -> Path:
    """A question with four options and one with two; the clip is the part of the video from 10 s on."""
    base = {
        "video_id": "86CxyhFV9MI",
        "question": "What is shown?",
        "question_wo_referring_query": "What is shown?",
        "position": [20],
        "topic_category": "NP-News-Programs",
        "level": "L2-Relation",
        "video_path": "86CxyhFV9MI.mp4",
        "subtitle_path": "86CxyhFV9MI_en.json",
        "starting_timestamp_for_subtitles": 10,
        "duration": 4.0,
        "view_count": 1,
    }
    rows = [
        base
        | {"id": "86CxyhFV9MI_0", "candidates": OPTIONS, "correct_choice": 1}
        | {"duration_group": 15, "question_category": "TOS"},
        base
        | {"id": "86CxyhFV9MI_1", "candidates": OPTIONS[:2], "correct_choice": 0}
        | {"duration_group": 600, "question_category": "S2E"},
    ]
    write_json(folder / "lvb_val.json", rows)
    subtitles = [
        {"start": "00:00:01.000", "end": "00:00:02.000", "line": "before the clip"},
        {"start": "00:00:11.000", "end": "00:00:12.500", "line": "first words"},
        {"timestamp": [13.0, None], "text": "last words"},
        {"timestamp": [15.0, 16.0], "text": "after the clip"},
    ]
    write_json(folder / "subtitles" / "86CxyhFV9MI_en.json", subtitles)
    copy_videos(clip, [folder / "videos" / "86CxyhFV9MI.mp4"])
    return folder
