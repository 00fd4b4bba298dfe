"""The shipped oracle arrays (made by the public implementations) through `tests/oracle_check.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle_check
import pytest

TESTS = Path(__file__).parents[3]
ORACLE = sorted((TESTS / "data" / "oracle").glob("*.npz"))


def test_every_shipped_case_is_reproduced() -> None:
    command = [sys.executable, TESTS / "oracle_check.py", *ORACLE]
    result = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {line.split(": ")[1] for line in result.stdout.splitlines()} == {"A", "E1", "U32", "vision"}


@pytest.mark.parametrize("spoilt", ["A/L/k/1/2", "A/dec/sel_2/gen_logits", "weights/model.norm.weight"])
def test_a_wrong_array_fails(tmp_path: Path, spoilt: str) -> None:
    arrays = dict(np.load(TESTS / "data" / "oracle" / "bilevel_case.npz"))
    arrays[spoilt] = arrays[spoilt] * 1.5
    np.savez(tmp_path / "spoilt.npz", **arrays)
    assert oracle_check.main([str(tmp_path / "spoilt.npz")]) == 1


def test_a_file_without_cases_is_not_a_success(tmp_path: Path) -> None:
    np.savez(tmp_path / "empty.npz", nothing=np.zeros(1))
    assert oracle_check.main([str(tmp_path / "empty.npz")]) == 2
