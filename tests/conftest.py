"""Fixtures that several packages' tests use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import clips

from clips import Clips


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Small real video clips, each encoded once a session: ``clips("mkv", codec="vp9").path``."""
    return Clips(tmp_path_factory.mktemp("clips"))
