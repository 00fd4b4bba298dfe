"""Where a model's files are: a local folder, or a copy of a repository of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from server.models.tensors import CheckpointError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_EXPECTED = "a model is 'tiny' (bundled), a folder with its config.json, or a hub's repository (owner/name)"
_TEXTS = ["*.json", "*.txt", "*.jinja"]


class UnknownModelError(ValueError):
    """There is no such model, or none that can be had or served here."""


def find_folder(name: str) -> Path:
    """The folder of a model: ``name`` itself where it is one, else a repository's, downloaded unless it was before.

    Raises UnknownModelError, and CheckpointError for one without a model in it.
    """
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        folder = _downloaded(name)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"model {name!r}: there is no config.json in {folder}; {_EXPECTED}")
    return folder


def _downloaded(name: str) -> Path:
    if not _REPOSITORY.fullmatch(name):
        raise UnknownModelError(f"unknown model {name!r}: there is no folder of this name; {_EXPECTED}")
    # Slow to import, and not needed by the bundled model.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_TEXTS, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_TEXTS, "*.bin"]))
    except RepositoryNotFoundError as error:
        raise UnknownModelError(f"unknown model {name!r}: the hub has none of this name, or it is private") from error
    except LocalEntryNotFoundError as error:
        raise UnknownModelError(
            f"model {name!r} is not on this machine, and the hub cannot be reached: "
            "download it elsewhere and give its folder"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnknownModelError(f"model {name!r} cannot be downloaded: {reason}") from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError for what is no JSON object."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return read
