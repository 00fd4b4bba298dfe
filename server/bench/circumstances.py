"""When and on what a measurement was made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from server.models.tiny.model import FOLDER

_PACKAGES = ("torch", "transformers", "av")


def circumstances(*program: str, bundled: bool = True) -> dict[str, Any]:
    """``program`` is what runs the measurement again, with this process's arguments; ``bundled``: on the bundled model.

    The machine is this one, also where a server on another was measured.
    """
    model = {"model_sha256": bundled_sha256()} if bundled else {}
    return model | {
        "command": shlex.join([*program, *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "num_cpus": os.cpu_count(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def bundled_sha256() -> str:
    """A short fingerprint of the bundled weights and their configuration."""
    weights = b"".join((FOLDER / name).read_bytes() for name in ("model.safetensors", "config.json"))
    return hashlib.sha256(weights).hexdigest()[:16]


def to_json(result: Mapping[str, Any]) -> str:
    """Indented, but a list of plain values stays on one line."""
    text = json.dumps(result, indent=2)
    return re.sub(
        r"\[\n[^\[\]{}]+?\]", lambda plain: re.sub(r"\n\s*", " ", plain[0]).replace("[ ", "[")[:-2] + "]", text
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
