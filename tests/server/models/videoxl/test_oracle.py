"""The shipped oracle arrays (made by the public implementations) through `tests/oracle_check.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parents[3]
ORACLE = sorted((TESTS / "data" / "oracle").glob("*.npz"))


def run(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TESTS / "oracle_check.py", *files]
    return subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)


def test_every_shipped_case_is_reproduced() -> None:
    result = run(*ORACLE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {line.split(": ")[1] for line in result.stdout.splitlines()} == {"A", "E1", "U32", "vision"}


@pytest.mark.parametrize("spoilt", ["A/L/k/1/2", "A/dec/sel_2/gen_logits", "weights/model.norm.weight"])
def test_a_wrong_array_fails(tmp_path: Path, spoilt: str) -> None:
    arrays = dict(np.load(TESTS / "data" / "oracle" / "bilevel_case.npz"))
    arrays[spoilt] = arrays[spoilt] * 1.5
    np.savez(tmp_path / "spoilt.npz", **arrays)
    assert run(tmp_path / "spoilt.npz").returncode == 1


def test_a_file_without_cases_is_not_a_success(tmp_path: Path) -> None:
    np.savez(tmp_path / "empty.npz", nothing=np.zeros(1))
    assert run(tmp_path / "empty.npz").returncode == 2
