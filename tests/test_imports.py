"""Imports run one way: api -> engine -> {models, video, kvstore} -> compression."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("compression", "kvstore", "server")
WEB = ("fastapi", "starlette", "uvicorn", "httpx")
FORBIDDEN = {
    "compression": ("kvstore", "server", *WEB),
    "kvstore": ("server", *WEB),
    "server/video": ("kvstore", "server.models", "server.engine", "server.api", "server.app", "server.cli", *WEB),
    "server/models": ("kvstore", "server.engine", "server.api", "server.app", "server.cli", *WEB),
    "server/engine": ("server.api", "server.app", "server.cli", "server.config", *WEB),
    "server/api": ("server.app", "server.cli"),
    "server/config.py": ("server.", "kvstore", "compression", *WEB),
    "server/app.py": ("server.cli",),
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file; relative imports are not used here."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("part", FORBIDDEN)
def test_one_way(part: str) -> None:
    place = ROOT / part
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imports(path)
        if any(name == banned or name.startswith(banned.rstrip(".") + ".") for banned in FORBIDDEN[part])
    }
    assert wrong == set()


def test_only_the_decoder_process_reads_video_files() -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if any(name.split(".")[0] == "av" for name in imports(path))
    }
    writers = {"server/models/tiny/make_video.py", "server/bench/long_video.py"}
    assert users == {"server/video/worker.py", *writers}


def test_nothing_shadows_the_standard_library() -> None:
    # Python 3.14 has a package named compression with these submodules (PEP 784).
    names = {path.stem for path in (ROOT / "compression").iterdir()}
    assert not names & {"zstd", "gzip", "bz2", "lzma", "zlib"}
    assert (ROOT / "compression" / "__init__.py").read_text() == ""
