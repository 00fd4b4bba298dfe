"""The official files of the public benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import dataset_folders as made
import pytest
from clips import Clips

from server.bench.datasets.item import DatasetError
from server.bench.datasets.registry import BENCHMARKS
from server.bench.datasets.run import take


@pytest.fixture
def clip(clips: Clips) -> Path:
    return clips("mp4", duration_s=4.0).path


def test_vnbench(tmp_path: Path, clip: Path) -> None:
    items = BENCHMARKS["vnbench"].read(made.vnbench(tmp_path, clip))
    assert [item.answer for item in items] == ["D", "C", "B", "A"] * 2
    assert {item.group for item in items[:4]} == {"v_ret_edit"}
    assert items[5].categories == {"type": "cnt_insert", "task": "cnt"}
    assert items[5].options == ("1", "2", "3", "0")
    assert len({item.id for item in items}) == 8
    assert all(item.video.is_file() for item in items)
    assert items[0].prompt == (
        "What is shown?\nA. a red star\nB. a blue ring\nC. a green square\nD. a grey cross\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_mlvu_dev(tmp_path: Path, clip: Path) -> None:
    items = BENCHMARKS["mlvu"].read(made.mlvu_dev(tmp_path, clip))
    assert [item.id for item in items] == ["1_plotQA_0", "1_plotQA_1", "4_count_0", "4_count_1"]
    assert [item.answer for item in items] == ["A", "B", "A", "B"]
    assert [item.categories["task"] for item in items] == ["plotQA", "plotQA", "count", "count"]
    # The same file name in two tasks is two videos.
    assert items[0].video == tmp_path / "video/1_plotQA/v1.mp4"
    assert items[2].video == tmp_path / "video/4_count/v1.mp4"
    assert items[0].system.startswith("Carefully watch this video")
    assert items[0].prompt == (
        "Question: What is shown (0)?\nOptions:\n(A) a red star\n(B) a blue ring\n(C) a green square\n(D) a grey cross"
        "\nOnly give the best option.\nBest Option: ("
    )


def test_mlvu_in_the_folder_of_the_hub(tmp_path: Path, clip: Path) -> None:
    made.mlvu_dev(tmp_path / "MLVU", clip)
    items = BENCHMARKS["mlvu"].read(tmp_path)
    assert len(items) == 4
    assert all(item.video.is_file() for item in items)


def test_mlvu_test_set(tmp_path: Path, clip: Path) -> None:
    [item] = BENCHMARKS["mlvu"].read(made.mlvu_test(tmp_path, clip))
    assert (item.answer, item.letters, item.video.is_file()) == ("F", "ABCDEF", True)


@pytest.mark.parametrize("form", ["parquet", "rows", "nested"])
def test_videomme(tmp_path: Path, clip: Path, form: str) -> None:
    items = BENCHMARKS["videomme"].read(made.videomme(tmp_path, clip, form=form))
    assert [item.id for item in items] == ["001-0", "001-1", "301-2"]
    assert [item.video.name for item in items] == ["fFjv93ACGo8.mp4", "fFjv93ACGo8.mp4", "26EBBBM_cZw.mp4"]
    assert all(item.video.is_file() for item in items)
    assert items[2].categories == {
        "duration": "medium",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "task_type": "Object Recognition",
    }
    assert items[0].prompt == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nWhat is shown?\nA. a red star.\nB. a blue ring.\n"
        "C. a green square.\nD. a grey cross.\nThe best answer is:"
    )


def test_videomme_subtitles(tmp_path: Path, clip: Path) -> None:
    items = BENCHMARKS["videomme"].read(made.videomme(tmp_path, clip, form="rows"), subtitles=True)
    assert items[0].prompt.startswith(
        "This video's subtitles are listed below:\nHello there\nGood bye\nSelect the best answer"
    )
    assert items[2].prompt.startswith("This video's subtitles are listed below:\nNo subtitles available\nSelect")


def test_longvideobench(tmp_path: Path, clip: Path) -> None:
    items = BENCHMARKS["longvideobench"].read(made.longvideobench(tmp_path, clip))
    assert [(item.answer, item.letters) for item in items] == [("B", "ABCD"), ("A", "AB")]
    assert items[0].categories == {"duration_group": "15", "question_category": "TOS"}
    assert items[1].prompt == (
        "Question: What is shown?\nA. a red star\nB. a blue ring\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_longvideobench_subtitles_of_the_clip_alone(tmp_path: Path, clip: Path) -> None:
    items = BENCHMARKS["longvideobench"].read(made.longvideobench(tmp_path, clip), subtitles=True)
    assert items[0].prompt.startswith("first words\nlast words\nQuestion: What is shown?")
    assert "before" not in items[0].prompt
    assert "after" not in items[0].prompt


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_folder_that_is_something_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match="no annotation file") as error:
        BENCHMARKS[name].read(tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message
    assert "huggingface.co" in message
    with pytest.raises(DatasetError, match="no such folder"):
        BENCHMARKS[name].read(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot read"),
        ("{}", "not a list of questions"),
        ('[{"video": "v.mp4"}]', "row 0: KeyError"),
        (json.dumps([{"video": "v.mp4", "question": "", "type": "", "try": 0, "options": ["a"], "gt": "b"}]), "'b'"),
    ],
)
def test_annotations_that_cannot_be_used(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "VNBench-main-4try.json").write_text(content)
    with pytest.raises(DatasetError, match=complaint):
        BENCHMARKS["vnbench"].read(tmp_path)


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(DatasetError, match="cannot read"):
        BENCHMARKS["videomme"].read(tmp_path)


def test_a_limit_takes_whole_groups_from_every_category(tmp_path: Path, clip: Path) -> None:
    benchmark = BENCHMARKS["vnbench"]
    folder = made.vnbench(tmp_path, clip, ["ret_edit", "cnt_insert", "ord_edit"])
    items = benchmark.read(folder)
    assert [item.group for item in take(items, 2, "type")] == ["v_ret_edit"] * 4 + ["v_cnt_insert"] * 4
    assert take(items, 100, "type") == take(items, None, "type") == items
    assert take(items, 0, "type") == []
