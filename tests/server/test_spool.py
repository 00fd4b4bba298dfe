"""The folder for files on their way in goes with its process, and what a killed one leaves goes at the next start."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from server.spool import Spool

HOLD = """
import sys
from server.spool import Spool
spool = Spool()
(spool.folder / "half.part").write_bytes(b"x")
print(spool.folder, flush=True)
sys.stdin.read()
spool.close()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_it_goes_when_it_is_closed(temporary: Path) -> None:
    spool = Spool()
    (spool.folder / "a.part").write_bytes(b"x")
    assert spool.folder.stat().st_mode & 0o077 == 0
    spool.close()
    spool.close()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_goes_and_a_living_one_keeps_its_own(temporary: Path) -> None:
    (temporary / "x2l-of-another-kind").mkdir()
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    living, killed = processes
    with living, killed:
        kept, left = (Path(process.stdout.readline().strip()) for process in processes)
        killed.send_signal(signal.SIGKILL)
        killed.wait(timeout=30)
        assert (left / "half.part").exists()
        spool = Spool()
        assert not left.exists() and (kept / "half.part").exists()
        living.communicate("")
        assert living.returncode == 0 and not kept.exists()
    spool.close()
    assert [path.name for path in temporary.iterdir()] == ["x2l-of-another-kind"]
