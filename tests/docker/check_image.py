"""Is the image as it says? ``python tests/docker/check_image.py [--out RESULT.json] [options of buildah bud ...]``

Builds the Dockerfile, runs what it made as an orchestrator would, and tells who it runs as, what its own health check
finds before and after the start, what an upload and a question to it bring, and how it stops. Needs buildah 1.28 or
newer and no daemon; with ``--isolation=chroot``, as here, not even namespaces, so that the server has the host's
network: on a port of its own. Exits with 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from server.bench.circumstances import to_json
from server.bench.long_video import write_long_videos

ROOT = Path(__file__).parents[2]
IMAGE = "x2l-server-check"
READY_S, STOP_S = 120.0, 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options, build_options = parser.parse_known_args()
    result: dict[str, Any] = {"buildah": say("--version"), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    begin_s = time.monotonic()
    # Its other format has no health checks.
    command = ["buildah", "bud", "--isolation=chroot", "--format=docker", "--layers", "--tag", IMAGE]
    subprocess.run([*command, *build_options, str(ROOT)], check=True, stdout=sys.stderr)
    result["built_s"] = round(time.monotonic() - begin_s)
    config = json.loads(say("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    result |= {"user": config["User"], "command": [*config["Entrypoint"], *config["Cmd"]]}
    with container() as name:
        result |= check(name, config)
    if options.out:
        options.out.write_text(to_json(result) + "\n")
    print(to_json(result))
    if not all(value for name, value in result.items() if name.startswith("is_")):
        sys.exit("something is not as it should be")


def check(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """What the container shows; what must be true is named ``is_``."""
    kind, *test = config["Healthcheck"]["Test"]
    assert kind == "CMD"
    port = free_port()
    variable = ["--env", f"X2L_PORT={port}"]
    uid = inside(name, ["id", "-u"]).stdout.strip()
    facts: dict[str, Any] = {
        "version": inside(name, ["x2l", "--version"]).stdout.strip(),
        "python": inside(name, ["python3", "--version"]).stdout.strip(),
        "uid": uid,
        "is_user_not_root": uid not in ("", "0"),
        "is_program_read_only": inside(name, ["touch", "/opt/x2l/bin/x2l"]).returncode != 0,
        "is_unhealthy_before_the_start": inside(name, test, variable).returncode != 0,
    }
    run = ["buildah", "run", "--isolation=chroot", *variable, name, "--", *config["Entrypoint"], *config["Cmd"]]
    with subprocess.Popen(run, stdout=sys.stderr) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            facts["ready_s"] = wait_ready(url, server)
            # Unhealthy is what fails so many times in a row.
            tries = (inside(name, test, variable) for _ in range(config["Healthcheck"]["Retries"]))
            facts["is_healthy"] = any(succeeded(one) for one in tries)
            facts |= ask(url)
        finally:
            begin_s = time.monotonic()
            for process in on_port(port):  # the program itself: buildah passes no signal on
                os.kill(process, signal.SIGTERM)
            facts["is_stopped_cleanly"] = server.wait(STOP_S) == 0
            facts["stopped_s"] = round(time.monotonic() - begin_s, 1)
    return facts


def ask(url: str) -> dict[str, Any]:
    """Uploads a minute of H.264 and asks about it, with the stock client."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "minute.mp4"
        write_long_videos({path: 1}, 320, 180, 10)
        file = client.files.create(file=path, purpose="user_data")
    state = client.files.wait_for_processing(file.id, poll_interval=0.5)
    content: Any = [{"type": "file", "file": {"file_id": file.id}}, {"type": "text", "text": "What is shown?"}]
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}])
    evidence = (answer.model_extra or {})["x2l"]["evidence"]
    return {"is_upload_processed": state.status == "processed", "is_evidence_given": bool(evidence)}


@contextmanager
def container() -> Iterator[str]:
    name = say("from", IMAGE)
    try:
        yield name
    finally:
        say("rm", name)


def say(*arguments: str) -> str:
    return subprocess.run(["buildah", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def inside(name: str, command: list[str], options: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    run = ["buildah", "run", "--isolation=chroot", *(options or []), name, "--", *command]
    return subprocess.run(run, capture_output=True, text=True)


def succeeded(run: subprocess.CompletedProcess[str]) -> bool:
    if run.returncode:
        print(run.stderr, file=sys.stderr)
    return run.returncode == 0


def wait_ready(url: str, server: subprocess.Popen[bytes]) -> float:
    """The seconds that it took."""
    begin_s = time.monotonic()
    while time.monotonic() < begin_s + READY_S and server.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return round(time.monotonic() - begin_s, 1)
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server did not become ready")


def on_port(port: int) -> list[int]:
    """The processes of the server on ``port``, which stands in their environment."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if f"X2L_PORT={port}\0".encode() in variables and b"x2l\0serve" in command and b"buildah" not in command:
            found.append(int(folder.name))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
