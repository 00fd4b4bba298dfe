"""``x2l bench quality --quick`` as a person runs it: the whole table, on fresh videos."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.bench.methods import METHODS

TIMEOUT_S = 580.0


@pytest.mark.timeout(600)
def test_the_quick_table_shows_what_re_load_is_worth(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "bench", "quality", "--quick", "--device", "cpu", "--workers", "2"]
    command += ["--out", "quality", "--videos-dir", "videos"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("X2L_")}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=kept, timeout=TIMEOUT_S)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "quality" / "quality.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "quality" / "quality.json").read_text())
    assert all(method.name in ended.stdout for method in METHODS)
    assert [part["chunks"] for part in result["lengths"]] == [8, 16]
    for part in result["lengths"]:
        rows = part["methods"]
        assert {name for name, row in rows.items() if row["errors"] == 0} == {method.name for method in METHODS}
        default = rows[result["default"]]
        share = {name: row["accuracy"]["share"] for name, row in rows.items()}
        codes = {name: row["by_type"]["code"]["share"] for name, row in rows.items()}
        assert share["low"] >= 0.9 and share[result["default"]] >= 0.9 * share["low"]
        assert codes[result["default"]] >= codes["high"] + 0.25 and codes[result["default"]] > codes["random"]
        assert rows["high"]["kv_tokens"] < default["kv_tokens"] < rows["low"]["kv_tokens"]
        assert default["kv_tokens"] == rows["random"]["kv_tokens"] == rows["stride"]["kv_tokens"]
