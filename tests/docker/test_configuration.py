"""The image's and the compose files' texts: valid, and in step with the project that they deploy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import CLIENT_VARIABLES, PREFIX, Settings

ROOT = Path(__file__).parents[2]
COMPOSE_FILES = sorted((ROOT / "docker").glob("compose*.yaml"))
SETTINGS = {PREFIX + name.upper() for name in Settings.model_fields}


def services(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text())["services"]


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_compose_files_follow_the_specification(path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_servers_are_given_settings_that_exist(path: Path) -> None:
    given = {name for service in services(path).values() for name in service.get("environment", {})}
    mentioned = set(re.findall(rf"\b{PREFIX}\w+", path.read_text()))
    assert {name for name in given if name.startswith(PREFIX)} <= SETTINGS
    assert mentioned <= SETTINGS | CLIENT_VARIABLES


def test_compose_waits_for_health_and_keeps_data() -> None:
    assert {path.name for path in COMPOSE_FILES} == {"compose.yaml", "compose.gpu.yaml"}
    base = services(ROOT / "docker/compose.yaml")
    waits = {name: service.get("depends_on", {}) for name, service in base.items()}
    for name, service in {"server": "redis", "replica": "redis", "proxy": "server"}.items():
        assert waits[name] == {service: {"condition": "service_healthy"}}
    assert {name for name, service in base.items() if "profiles" in service} == {"replica", "proxy"}
    assert all(service["restart"] == "unless-stopped" for service in base.values())
    assert "ports" not in base["redis"]  # it has no password
    assert "redis-data:/data" in base["redis"]["volumes"]
    published = [port for service in base.values() for port in service.get("ports", [])]
    assert all(re.match(r"\$\{\w+:-127\.0\.0\.1:\d+\}:", port) for port in published)


def test_gpu_file_covers_every_server() -> None:
    gpu = services(ROOT / "docker/compose.gpu.yaml")
    base = services(ROOT / "docker/compose.yaml")
    assert gpu.keys() == {name for name, service in base.items() if "X2L_STORE" in service.get("environment", {})}


def test_dockerfile_is_in_step_with_the_project() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {name for name in packages if f"COPY {name} {name}\n" in dockerfile} == set(packages)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == {
        *packages,
        "README.md",
        "pyproject.toml",
        "constraints.txt",
    }
    assert set(re.findall(rf"^(?:ENV|   ) +({PREFIX}\w+)=", dockerfile, re.MULTILINE)) <= SETTINGS
    lines = dockerfile.splitlines()
    assert lines.index("USER 10001:10001") < lines.index('ENTRYPOINT ["x2l"]')


def test_haproxy_accepts_its_configuration() -> None:
    haproxy = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if haproxy is None:
        pytest.skip("haproxy is not installed")
    checked = subprocess.run(
        [haproxy, "-c", "-f", str(ROOT / "docker/haproxy.cfg")], capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr
