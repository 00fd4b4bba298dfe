"""The folder of a run survives interruptions and refuses strangers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench_record import RECORD

from server.bench.records import OtherRun, open_folder

CONFIGURATION = {"seed": 0, "videos": {"8": 2}}


def test_records_come_back_and_the_later_of_two_counts(tmp_path: Path) -> None:
    failed = replace(RECORD, index=1, error="RateLimitError: busy", times_ms=None, ranks=None, contained=None)
    with open_folder(tmp_path / "run", CONFIGURATION) as folder:
        folder.add([RECORD, failed])
        assert folder.answered(RECORD.key) and not folder.answered(failed.key)
    with open_folder(tmp_path / "run", CONFIGURATION) as folder:
        assert folder.records == [RECORD, failed]
        folder.add([replace(failed, error=None)])
        assert folder.answered(failed.key)
    with open_folder(tmp_path / "run", CONFIGURATION) as folder:
        assert folder.records == [RECORD, replace(failed, error=None)]


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_a_line_cut_off_is_asked_again_and_the_next_stands_alone(tmp_path: Path, cut: int) -> None:
    second = replace(RECORD, index=1, reply="ä K7X")
    with open_folder(tmp_path, CONFIGURATION) as folder:
        folder.add([RECORD, second])
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with open_folder(tmp_path, CONFIGURATION) as folder:
        assert folder.records == [RECORD]
        folder.add([second])
    with open_folder(tmp_path, CONFIGURATION) as folder:
        assert folder.records == [RECORD, second]


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    with open_folder(tmp_path, CONFIGURATION) as folder:
        folder.add([RECORD])
    with pytest.raises(OtherRun, match="holds a run with seed 0, not 1"), open_folder(tmp_path, {"seed": 1}):
        pass
    with pytest.raises(OtherRun, match="videos"), open_folder(tmp_path, CONFIGURATION | {"videos": {"8": 3}}):
        pass
    with open_folder(tmp_path, CONFIGURATION) as folder:
        assert folder.records == [RECORD]


def test_nothing_is_thrown_away_that_is_no_record(tmp_path: Path) -> None:
    with open_folder(tmp_path, CONFIGURATION) as folder:
        folder.add([RECORD])
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"method": "low"}\n' + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(OtherRun, match="no record"), open_folder(tmp_path, CONFIGURATION):
        pass
    assert path.read_bytes() == before


def test_one_process_at_a_time(tmp_path: Path) -> None:
    other = (
        "from pathlib import Path; from server.bench.records import open_folder, OtherRun\n"
        "try:\n"
        f"    open_folder(Path({str(tmp_path)!r}), {{}}).__enter__()\n"
        "except OtherRun as error:\n"
        "    print(error)"
    )
    with open_folder(tmp_path, {}):
        ran = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True)
    assert "another process is at work" in ran.stdout
