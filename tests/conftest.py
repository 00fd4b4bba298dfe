"""Fixtures that several packages' tests use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# The models of most tests are so small that a second thread of torch only waits, at the cost of a core that another
# test process needs. Here, because it must be known before torch is loaded; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import clips

from clips import Clips


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Small real video clips, each encoded once a session: ``clips("mkv", codec="vp9").path``."""
    return Clips(tmp_path_factory.mktemp("clips"))
