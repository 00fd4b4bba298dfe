"""``x2l serve`` as a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from server.bench.video import ServerUnusable

_READY_S = 60.0
_STOP_S = 20.0


@dataclass(frozen=True)
class Served:
    """A running server. ``plan`` is what it said that it would do."""

    url: str
    pid: int
    plan: Mapping[str, str]

    @property
    def http_cpu_s(self) -> float:
        """Seconds of CPU that the thread behind HTTP has taken, which is the process's first."""
        nanoseconds = Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()[0]
        return int(nanoseconds) / 1e9


@contextlib.contextmanager
def serving(*options: str, log: IO[str] | None = None) -> Iterator[Served]:
    """``x2l serve`` with ``options`` on a free port, gone in the end; ``log`` gets its errors. This process's ``X2L_``
    variables mean nothing to it. Raises ServerUnusable."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("X2L_")}
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--log-level", "warning", *options]
    # In a session of its own: Ctrl-C is for us, who then stop it.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env=kept, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            plan: dict[str, str] = {}
            while "address" not in plan and (line := process.stdout.readline()):
                name, _, plan[name] = (part.strip() for part in line.partition(" "))
            url = plan.pop("address", None)
            if url is None:
                raise ServerUnusable(f"the server did not start (exit code {process.wait()})")
            _wait_ready(url, process)
            yield Served(url, process.pid, plan)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_ready(url: str, process: subprocess.Popen[str]) -> None:
    end_s = time.monotonic() + _READY_S
    while time.monotonic() < end_s and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise ServerUnusable("the server did not become ready")
